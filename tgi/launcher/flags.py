"""Every setting of the launcher in one table: parser, ``--help``, docs/flags.md and tests are made from it.

The only module that reads environment variables. Knows no model and no machine.
"""

import argparse
import dataclasses
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from tgi import __version__
from tgi.core import telemetry
from tgi.core.config import BLOCK_SIZE
from tgi.launcher.errors import ArgumentValidation

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

Status = Literal["works", "refused", "obsolete"]
"""``refused``: an error when used, because the feature isn't there. ``obsolete``: a warning, because this server has
nothing for it to change."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How the text of a value is read. ``parse`` raises ValueError with what it expected."""

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    switch: bool = False
    """On the command line it stands without a value."""
    many: bool = False
    """Repeating it on the command line adds values."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table."""

    key: str
    kind: Kind
    default: Any
    help: str
    status: Status = "works"
    neutral: tuple[Any, ...] = ()
    """Values of a refused or obsolete flag that ask for nothing and pass in silence."""
    short: str | None = None
    only: Literal["cli", "env"] | None = None

    @property
    def name(self) -> str:
        return "" if self.only == "env" else "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        return "" if self.only == "cli" else self.key.upper()

    @property
    def default_text(self) -> str:
        match self.default:
            case None | ():
                return ""
            case bool():
                return str(self.default).lower()
            case tuple():
                return ",".join(map(str, self.default))
        return str(self.default)


def _text(metavar: str = "TEXT", *, suggest: str = "") -> Kind:
    def parse(value: str) -> str:
        if not value:
            raise ValueError("expected a value, not an empty string")
        return value

    return Kind(metavar, suggest, parse)


def _header() -> Kind:
    """The value of an HTTP header."""

    def parse(value: str) -> str:
        if not re.fullmatch("[ -~]+", value):
            raise ValueError("expected printable ASCII characters")
        return value

    return Kind("TEXT", "", parse)


def _integer(low: int = 0, high: int = 2**63 - 1) -> Kind:
    allowed = f"{low}..{high}" if high < 2**32 - 1 else f"{low}.."

    def parse(value: str) -> int:
        if not re.fullmatch(r"\+?[0-9]{1,19}", value) or not low <= (number := int(value)) <= high:
            raise ValueError(f"expected an integer {allowed}")
        return number

    return Kind("N", allowed, parse)


def _number(low: float, high: float, *, above: bool = False) -> Kind:
    """A finite float from ``low`` (or ``above`` it) to ``high``."""
    allowed = f"{'>' if above else ''}{low:g}..{high:g}" if high < float("inf") else f"{'>' if above else ''}{low:g}.."

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not (low < number if above else low <= number) or not number <= high or number == float("inf"):
            raise ValueError(f"expected a number {allowed}")
        return number

    return Kind("X", allowed, parse)


def _choice(**meaning: Any) -> Kind:
    """One of the names, read as its meaning."""
    allowed = "|".join(meaning)

    def parse(value: str) -> Any:
        if value not in meaning:
            raise ValueError(f"expected {' or '.join(meaning)}")
        return meaning[value]

    return Kind("VALUE", allowed, parse)


def _one_of(*names: str) -> Kind:
    return _choice(**{name: name for name in names})


def _list_of(item: Kind, *, many: bool = False) -> Kind:
    return Kind(
        f"{item.metavar},…", item.allowed, lambda value: tuple(item.parse(part) for part in value.split(",")), many=many
    )


def _log_level(value: str) -> str:
    telemetry.level_for("", value)
    return value


_BOOLEAN = _choice(true=True, false=False)
_SWITCH = dataclasses.replace(_BOOLEAN, metavar="", allowed="", switch=True)


def _flag(kind: Kind, default: Any, help: str, status: Status = "works", **more: Any) -> Any:
    """A field of Options that carries its row; its key is added when the table is read."""
    return dataclasses.field(
        default=default, metadata={"row": {"kind": kind, "default": default, "help": help, "status": status, **more}}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The table. A field ``max_best_of`` is the flag ``--max-best-of`` and the variable ``MAX_BEST_OF``."""

    model_id: str = _flag(
        _text("ID"),
        DEFAULT_MODEL,
        "Model to serve: a hub id (`org/name`), a local folder, a local .gguf file, or a GGUF file of a hub repository "
        "(`org/name/file.gguf`).",
    )
    revision: str | None = _flag(
        _text("REV"), None, "Branch, tag or commit of the hub repository. Only for hub ids; unset means `main`."
    )
    validation_workers: int = _flag(
        _integer(), 2, "Threads of the router that validate and tokenize requests; at least 1."
    )
    sharded: bool | None = _flag(
        _BOOLEAN, None, "Split the model over several devices.", "refused", neutral=(None, False)
    )
    num_shard: int | None = _flag(
        _integer(), None, "Number of devices that the model is split over.", "refused", neutral=(None, 1)
    )
    quantize: str | None = _flag(
        _one_of(
            "awq",
            "compressed-tensors",
            "eetq",
            "exl2",
            "gptq",
            "marlin",
            "bitsandbytes",
            "bitsandbytes-nf4",
            "bitsandbytes-fp4",
            "fp8",
        ),
        None,
        "Quantize the weights while loading. A GGUF file keeps its own quantization without this flag.",
        "refused",
    )
    speculate: int | None = _flag(_integer(), None, "Tokens to guess ahead in each step.", "refused", neutral=(None, 0))
    dtype: str = _flag(
        _one_of("auto", "float32", "float16", "bfloat16"),
        "auto",
        "Number format of activations and of weights that aren't quantized. `auto`: float32 on CPU; on GPU bfloat16 or "
        "float16, as the model's config says.",
    )
    device: str = _flag(
        _one_of("auto", "cpu", "cuda"),
        "auto",
        "Where the model runs. `auto`: a CUDA GPU if there is one, else the CPU.",
    )
    kv_cache_dtype: str | None = _flag(
        _one_of("fp8_e4m3fn", "fp8_e5m2"), None, "Number format of the KV cache, if not `--dtype`.", "refused"
    )
    trust_remote_code: bool = _flag(_SWITCH, False, "Run Python code from the model's repository.", "refused")
    max_concurrent_requests: int = _flag(
        _integer(1), 128, "Requests that are served or wait at once; more are answered 429."
    )
    max_best_of: int = _flag(_integer(1), 2, "Largest `best_of` that a client may ask for; 1 turns it off.")
    max_stop_sequences: int = _flag(_integer(), 4, "Longest list of stop strings that a client may send.")
    max_top_n_tokens: int = _flag(
        _integer(0, 2**32 - 1), 5, "Largest `top_n_tokens` or `top_logprobs` that a client may ask for."
    )
    max_input_tokens: int | None = _flag(
        _integer(), None, "Longest prompt in tokens; unset means one less than `--max-total-tokens`."
    )
    max_input_length: int | None = _flag(_integer(), None, "Old name of `--max-input-tokens`.")
    max_total_tokens: int | None = _flag(
        _integer(2),
        None,
        "Most tokens of one request, prompt and answer together; unset means what the model was made for, if that many "
        "fit into the KV cache.",
    )
    waiting_served_ratio: float = _flag(
        _number(0, float("inf")), 0.3, "Prompts always run in chunks beside the running requests.", "obsolete"
    )
    max_batch_prefill_tokens: int | None = _flag(
        _integer(1, 2**32 - 1),
        None,
        "Most tokens of one step, prompts and decodes together; unset means 4096 on GPU and 512 on CPU, or what the "
        "model and the memory allow.",
    )
    max_batch_total_tokens: int | None = _flag(
        _integer(BLOCK_SIZE, 2**32 - 1),
        None,
        "Tokens that the KV cache holds, rounded down to whole pages of 16; unset means what the memory has room for.",
    )
    max_waiting_tokens: int = _flag(_integer(), 20, "Waiting requests are admitted in every step.", "obsolete")
    max_batch_size: int | None = _flag(
        _integer(), None, "Most requests that run at once; unset means `--max-concurrent-requests`."
    )
    cuda_graphs: tuple[int, ...] = _flag(
        _list_of(_integer()),
        (1, 2, 4, 8, 16, 32),
        "Batch sizes to capture as CUDA graphs; 0 means none. Nothing is captured yet.",
        "refused",
        neutral=((0,), (1, 2, 4, 8, 16, 32)),
    )
    hostname: str = _flag(
        _text("ADDRESS"),
        "0.0.0.0",
        "Address or name to listen on. The variable is passed over when it holds this machine's own name, which "
        "shells and containers set by themselves.",
    )
    port: int = _flag(_integer(0, 65535), 3000, "Port to listen on; 0 takes a free one.", short="-p")
    prometheus_port: int = _flag(_integer(0, 65535), 9000, "Metrics are served at /metrics of `--port`.", "obsolete")
    shard_uds_path: str = _flag(
        _text("PATH"),
        "/tmp/text-generation-server",
        "Sockets between the processes lie in a private folder made at start.",
        "obsolete",
    )
    master_addr: str = _flag(_text("ADDRESS"), "localhost", "Only split models need a meeting point.", "obsolete")
    master_port: int = _flag(_integer(), 29500, "Only split models need a meeting point.", "obsolete")
    huggingface_hub_cache: str | None = _flag(
        _text("DIR"), None, "Folder of the hub cache; unset means huggingface_hub's own (`HF_HOME`)."
    )
    weights_cache_override: str | None = _flag(
        _text("DIR"), None, "Folder to read the .safetensors files from, instead of the hub cache."
    )
    disable_custom_kernels: bool = _flag(_SWITCH, False, "The kernels that it turned off don't exist here.", "obsolete")
    cuda_memory_fraction: float = _flag(
        _number(0, 1, above=True),
        1.0,
        "Share of the device's memory that the server may use; on CPU the share of the memory available at start.",
    )
    rope_scaling: str | None = _flag(
        _one_of("linear", "dynamic"), None, "Stretch the rotary positions; alone it means `--rope-factor 1.0`."
    )
    rope_factor: float | None = _flag(
        _number(0, float("inf"), above=True), None, "Factor of the stretch; alone it means `--rope-scaling linear`."
    )
    json_output: bool = _flag(_SWITCH, False, "Log one JSON object per line.")
    otlp_endpoint: str | None = _flag(_text("URL"), None, "OpenTelemetry collector.", "refused")
    otlp_service_name: str = _flag(
        _text(), "text-generation-inference.router", "There are no traces to name yet.", "obsolete"
    )
    cors_allow_origin: tuple[str, ...] = _flag(
        _list_of(_text("ORIGIN"), many=True), (), "Origins that browsers may call from; unset means any."
    )
    api_key: str | None = _flag(_text("KEY"), None, "Bearer token that clients must send.")
    watermark_gamma: float = _flag(
        _number(0, 1), 0.5, "Share of the vocabulary that a watermark favours, for requests that ask for a watermark."
    )
    watermark_delta: float = _flag(
        _number(0, 1e4), 2.0, "What a watermark adds to the logits of the tokens that it favours."
    )
    ngrok: bool = _flag(_SWITCH, False, "Open an ngrok tunnel.", "refused")
    ngrok_authtoken: str | None = _flag(_text(), None, "Token of the ngrok tunnel.", "refused")
    ngrok_edge: str | None = _flag(_text(), None, "Edge of the ngrok tunnel.", "refused")
    tokenizer_config_path: str | None = _flag(
        _text("FILE"), None, "tokenizer_config.json to take the chat template and the special tokens from."
    )
    disable_grammar_support: bool = _flag(
        _SWITCH, False, "Refuse requests with a grammar, and so tool calls. Today they are refused without it, too."
    )
    env: bool = _flag(_SWITCH, False, "Log what this machine is made of at start.", short="-e", only="cli")
    max_client_batch_size: int = _flag(_integer(), 4, "Most prompts in one call of /v1/completions.")
    lora_adapters: str | None = _flag(_text("ID,…"), None, "LoRA adapters to load.", "refused")
    usage_stats: str = _flag(
        _one_of("on", "off", "no-stack"), "on", "Accepted in every form; nothing is ever sent to anybody."
    )
    payload_limit: int = _flag(_integer(), 2_000_000, "Largest body of an HTTP request in bytes.")
    enable_prefill_logprobs: bool = _flag(
        _SWITCH, False, "Log-probabilities of the prompt are always there for requests that ask.", "obsolete"
    )
    graceful_termination_timeout: int = _flag(
        _integer(), 90, "Seconds that open requests have to end after SIGTERM.", short="-g"
    )

    log_level: str = _flag(
        Kind("LEVEL", "|".join(telemetry.LEVELS), _log_level),
        "info",
        "What is logged: a level, or a list like `info,text_generation_router=debug`.",
        only="env",
    )
    compute_type: str | None = _flag(
        _header(), None, "Value of the header x-compute-type; unset names the device.", only="env"
    )
    prefix_caching: bool = _flag(
        _choice(**{"true": True, "1": True, "false": False, "0": False}),
        True,
        "Share the KV cache of equal prompt beginnings.",
        only="env",
    )
    prefill_chunking: bool = _flag(
        _choice(**{"true": True, "1": True, "false": False, "0": False}),
        True,
        "Prompts always run in chunks.",
        "refused",
        neutral=(True,),
        only="env",
    )
    attention: str | None = _flag(
        _one_of("paged", "flashdecoding", "flashdecoding-ipex", "flashinfer"),
        None,
        "The attention kernel is chosen by model and device.",
        "obsolete",
        only="env",
    )
    tgi_wiggle_room: float | None = _flag(
        _number(0, 1, above=True), None, "Use `--cuda-memory-fraction`.", "refused", only="env"
    )
    hf_api_token: str | None = _flag(
        _text(), None, "Hub token; wins over `HF_TOKEN` and `HUGGING_FACE_HUB_TOKEN`.", only="env"
    )
    cuda_visible_devices: str | None = _flag(
        Kind("LIST", "", str), None, "GPUs to see; the first one is used.", only="env"
    )
    xdg_cache_home: str | None = _flag(
        _text("DIR"), None, "Parent of this server's own cache folder `tgi`; unset means `~/.cache`.", only="env"
    )


FLAGS: tuple[Flag, ...] = tuple(Flag(key=field.name, **field.metadata["row"]) for field in dataclasses.fields(Options))


class _Parser(argparse.ArgumentParser):
    """argparse with a one-line usage; the table speaks for itself in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n\nusage: {self.usage}\n\nFor more information, try '--help'.\n")


def _described(flag: Flag) -> str:
    parts = [flag.help if flag.status == "works" else f"({flag.status}) {flag.help}"]
    if flag.env:
        parts.append(f"[env: {flag.env}]")
    if flag.default_text:
        parts.append(f"[default: {flag.default_text}]")
    if flag.kind.allowed and not flag.kind.switch:
        parts.append(f"[allowed: {flag.kind.allowed}]")
    return " ".join(parts).replace("%", "%%")


def _parser() -> argparse.ArgumentParser:
    environment = "\n".join(f"  {flag.env:<20} {_described(flag)}" for flag in FLAGS if flag.only == "env")
    parser = _Parser(
        prog="text-generation-launcher",
        usage="text-generation-launcher [OPTIONS]",
        description="Serve a language model over HTTP. The command line wins over the environment.",
        epilog=f"environment only:\n{environment}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"text-generation-launcher {__version__}")
    for flag in FLAGS:
        if flag.only == "env":
            continue
        names = (flag.short, flag.name) if flag.short else (flag.name,)
        shared: dict[str, Any] = {"dest": flag.key, "default": argparse.SUPPRESS, "help": _described(flag)}
        if flag.kind.switch:
            parser.add_argument(*names, action="store_const", const="true", **shared)
        else:
            action = "append" if flag.kind.many else "store"
            parser.add_argument(*names, action=action, metavar=flag.kind.metavar, **shared)
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[Options, list[str]]:
    """The options and the warnings to log about them. Ends the process with status 2 and a usage on a bad one."""
    parser = _parser()
    written: dict[str, str | list[str]] = vars(parser.parse_args(list(argv)))
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for flag in FLAGS:
        if flag.key in written:
            source, text = f"`{flag.name}`", written[flag.key]
        elif flag.env and flag.env in environ:
            source, text = f"`{flag.env}` (environment)", environ[flag.env]
            if flag.key == "hostname" and text == socket.gethostname():
                continue
        else:
            continue
        try:
            joined = ",".join(text) if isinstance(text, list) else text
            joined.encode()  # an argument can hold bytes that are no text
            value = flag.kind.parse(joined)
        except ValueError as error:
            parser.error(f"invalid value {text!r} for {source}: {error}")
        if flag.status != "works" and value not in (flag.neutral or (flag.default,)):
            if flag.status == "refused":
                parser.error(f"{source} is not supported yet. {flag.help}")
            warnings.append(f"{source} changes nothing here: {flag.help}")
        values[flag.key] = value
    return Options(**values), warnings


def cache_options(environ: Mapping[str, str] = os.environ) -> Options:
    """The options that say where models are kept, from the environment; all others at their defaults."""
    names = ("HUGGINGFACE_HUB_CACHE", "WEIGHTS_CACHE_OVERRIDE", "HF_API_TOKEN", "XDG_CACHE_HOME")
    return parse([], {name: environ[name] for name in names if name in environ})[0]


def check(options: Options) -> Options:
    """Contradictions between the limits that are set, in TGI's words; the old name is folded into the new one."""
    if options.max_input_length is not None:
        if options.max_input_tokens is not None:
            raise ArgumentValidation(
                f"Both `max_input_tokens` ({options.max_input_tokens}) and `max_input_length` "
                f"({options.max_input_length}) are set. Please define only `max_input_tokens` as `max_input_length is "
                "deprecated for naming consistency."
            )
        options = dataclasses.replace(options, max_input_tokens=options.max_input_length, max_input_length=None)
    inputs, total = options.max_input_tokens, options.max_total_tokens
    prefill, batch = options.max_batch_prefill_tokens, options.max_batch_total_tokens
    if options.validation_workers == 0:
        raise ArgumentValidation("`validation_workers` must be > 0")
    if options.max_batch_size == 0:
        raise ArgumentValidation("`max_batch_size` must be > 0")
    if inputs is not None and total is not None and inputs >= total:
        raise ArgumentValidation(f"`max_input_tokens`({inputs}) must be < `max_total_tokens`({total})")
    if prefill is not None and batch is not None and prefill > batch:
        raise ArgumentValidation(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {batch}"
        )
    if total is not None and batch is not None and total > batch:
        raise ArgumentValidation(f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {batch}")
    return options


def document() -> str:
    """docs/flags.md."""
    rows = [
        f"| {f'`{flag.name}`' if flag.name else ''}{f' `{flag.short}`' if flag.short else ''} | "
        f"{f'`{flag.env}`' if flag.env else ''} | {flag.default_text} | "
        f"{'' if flag.kind.switch else flag.kind.allowed.replace('|', ', ')} | {flag.status} | {flag.help} |"
        for flag in FLAGS
    ]
    return "\n".join(
        [
            "# Settings of the launcher",
            "",
            "Made by `python -m tgi.launcher.flags > docs/flags.md`; a test checks that it is up to date.",
            "",
            "The command line wins over the environment, the environment over the default. A flag without a value is",
            "`true` or `false` in the environment. A bad value ends the launcher with status 2.",
            "",
            "* **works**: does what is said.",
            "* **refused**: the feature isn't there; using the flag ends the launcher with status 2 and its name.",
            "* **obsolete**: this server has nothing for it to change; setting it logs one warning.",
            "",
            "| Flag | Environment | Default | Allowed | Status | Meaning |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "huggingface_hub reads its own variables, among them `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, `HF_ENDPOINT`,",
            "`HF_HOME` and `HF_HUB_OFFLINE`.",
            "",
        ]
    )


if __name__ == "__main__":
    print(document(), end="")
