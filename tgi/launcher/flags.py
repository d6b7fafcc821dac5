"""Every setting of the commands in one table: parsers, ``--help``, docs/flags.md and tests are made from it.

The only module that reads environment variables. Knows no model and no machine.
"""

import argparse
import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from tgi import __version__
from tgi.core.config import BLOCK_SIZE, CALL_PARSERS, REASONING_PARSERS
from tgi.launcher import kinds
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.kinds import Kind

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

Status = Literal["works", "refused", "obsolete"]
"""``refused``: an error when used, because the feature isn't there. ``obsolete``: a warning, because this server has
nothing for it to change."""

Command = Literal["launcher", "router", "serve", "download-weights", "detect-watermark", "quantize"]

PROGRAMS: dict[Command, str] = {
    "launcher": "text-generation-launcher",
    "router": "text-generation-router",
    "serve": "text-generation-server serve",
    "download-weights": "text-generation-server download-weights",
    "detect-watermark": "text-generation-server detect-watermark",
    "quantize": "text-generation-server quantize",
}

_PURPOSE: dict[Command, str] = {
    "launcher": "Serve a language model over HTTP.",
    "router": "Serve over HTTP what a running engine generates. With `print-schema`: print the OpenAPI document.",
    "serve": "Run an engine, for text-generation-router.",
    "download-weights": "Fetch a model into the cache.",
    "detect-watermark": "Say whether a text carries the watermark of a server of this model. Status 0: it does, 1: it "
    "doesn't, 2: an error.",
    "quantize": "Write a model with fewer bits for each weight, layer by layer. A run that was ended goes on.",
}

_STORED = ("awq", "compressed-tensors", "exl2", "gptq", "hqq", "marlin")
"""Quantizations that checkpoints have and no load makes."""

_ENGINE: tuple[Command, ...] = ("launcher", "serve")
_HTTP: tuple[Command, ...] = ("launcher", "router")
_WEIGHTS: tuple[Command, ...] = ("launcher", "serve", "download-weights")
_QUANTIZE: tuple[Command, ...] = ("quantize",)
_FILES: tuple[Command, ...] = (*_WEIGHTS, "detect-watermark", *_QUANTIZE)
_SERVING: tuple[Command, ...] = ("launcher", "router", "serve")
_ALL: tuple[Command, ...] = (*_SERVING, "download-weights", *_QUANTIZE)


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
    refused: tuple[Any, ...] = ()
    """Values of a flag that works which ask for a feature that isn't there."""
    short: str | None = None
    only: Literal["cli", "env", "place"] | None = None
    """``place``: on the command line, without a name."""
    commands: tuple[Command, ...] = _ENGINE
    """Which commands have it; by default those that start an engine."""
    lenient: bool = False
    """A value that can't be read is warned of and passed over."""

    @property
    def name(self) -> str:
        match self.only:
            case "env":
                return ""
            case "place":
                return self.kind.metavar
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        return self.key.upper() if self.only in (None, "env") else ""

    @property
    def status_text(self) -> str:
        return f"{self.status}; refused: {', '.join(self.refused)}" if self.refused else self.status

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


def _flag(kind: Kind, default: Any, help: str, status: Status = "works", **more: Any) -> Any:
    """A field of Options that carries its row; its key is added when the table is read."""
    return dataclasses.field(
        default=default, metadata={"row": {"kind": kind, "default": default, "help": help, "status": status, **more}}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The table. A field ``max_best_of`` is the flag ``--max-best-of`` and the variable ``MAX_BEST_OF``."""

    model_id: str = _flag(
        kinds.text("ID"),
        DEFAULT_MODEL,
        "Model to serve: a hub id (`org/name`), a local folder, a local .gguf file, or a GGUF file of a hub repository "
        "(`org/name/file.gguf`).",
        commands=_FILES,
    )
    revision: str | None = _flag(
        kinds.text("REV"),
        None,
        "Branch, tag or commit of the hub repository. Only for hub ids; unset means `main`.",
        commands=(*_ALL, "detect-watermark"),
    )
    validation_workers: int = _flag(
        kinds.integer(), 2, "Threads of the router that validate and tokenize requests; at least 1.", commands=_HTTP
    )
    router_workers: int = _flag(
        kinds.integer(1, 64),
        1,
        "Router processes that share the port, for more HTTP than one processor can do. Each takes some 90 MB: 55 for "
        "itself, more with a large vocabulary, and 16 for each of its own `--validation-workers`. "
        "`--max-concurrent-requests` bounds all of them together, and `/metrics` of any counts for all. With more than "
        "one, `/v1/responses` refuses to store.",
        commands=_HTTP,
    )
    sharded: bool | None = _flag(
        kinds.BOOLEAN,
        None,
        "Split the model over all visible GPUs, or as many as `--num-shard` says; `false`: only if that says so.",
    )
    num_shard: int | None = _flag(
        kinds.integer(),
        None,
        "Processes that hold the model together, each with a GPU of its own; on a CPU any number, which share its "
        "cores. Unset means the GPUs that `CUDA_VISIBLE_DEVICES` or `NVIDIA_VISIBLE_DEVICES` name, else 1. With fewer "
        "key-value heads than processes these have copies of them. Not for models without a row in docs/models.md.",
    )
    quantize: str | None = _flag(
        kinds.one_of(
            *("int8", "int4", "eetq", "fp8", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"),
            *_STORED,
        ),
        None,
        "Quantize the weights while loading: `int8`, `int4` and `eetq`, which is `int8`, in groups of 32, on CPU with "
        "activations in int8, too; `fp8`, a scale for each row; `bitsandbytes`, int8 with a scale for each row; "
        "`bitsandbytes-nf4` and `-fp4`, blocks of 64. The last four leave embedding and head alone. Weights that are "
        "quantized stay so without this flag; it may name their format.",
    )
    speculate: int | None = _flag(
        kinds.integer(), None, "Tokens to guess ahead in each step.", "refused", neutral=(None, 0)
    )
    dtype: str = _flag(
        kinds.one_of("auto", "float32", "float16", "bfloat16"),
        "auto",
        "Number format of the KV cache and of weights that aren't quantized, and on a GPU of activations; on CPU these "
        "are float32. `auto`: bfloat16; float16 on a GPU if the model's config says so; float32 on a CPU without the "
        "native kernels.",
    )
    device: str = _flag(
        kinds.one_of("auto", "cpu", "cuda", "xpu"),
        "auto",
        "Where the model runs. `auto`: a GPU that torch is built for, if there is one, else the CPU. `cuda` is torch's "
        "name for AMD's GPUs, too; `xpu` for Intel's.",
        commands=(*_ENGINE, *_QUANTIZE),
    )
    kv_cache_dtype: str | None = _flag(
        kinds.one_of("int8", "fp8_e4m3fn", "fp8_e5m2"),
        None,
        "Number format of the KV cache, if not `--dtype`; `int8` on CPU. `fp8_e4m3fn` takes its scales from the "
        "checkpoint, if that has any.",
    )
    trust_remote_code: bool = _flag(
        kinds.SWITCH,
        False,
        "Run the Python files of the model's repository, if neither this server nor transformers has the model itself.",
        commands=_ALL,
    )
    max_concurrent_requests: int = _flag(
        kinds.integer(1), 128, "Requests that are served or wait at once; more are answered 429.", commands=_SERVING
    )
    max_best_of: int = _flag(
        kinds.integer(1), 2, "Largest `best_of` that a client may ask for; 1 turns it off.", commands=_HTTP
    )
    max_stop_sequences: int = _flag(
        kinds.integer(), 4, "Longest list of stop strings that a client may send.", commands=_HTTP
    )
    max_top_n_tokens: int = _flag(
        kinds.integer(0, 2**32 - 1),
        5,
        "Largest `top_n_tokens` or `top_logprobs` that a client may ask for.",
        commands=_HTTP,
    )
    max_input_tokens: int | None = _flag(
        kinds.integer(),
        None,
        "Longest prompt in tokens; unset means one less than `--max-total-tokens`.",
        commands=_SERVING,
    )
    max_input_length: int | None = _flag(
        kinds.integer(), None, "Old name of `--max-input-tokens`.", commands=("launcher",)
    )
    max_total_tokens: int | None = _flag(
        kinds.integer(2),
        None,
        "Most tokens of one request, prompt and answer together; unset means what the model was made for, if that many "
        "fit into the KV cache.",
        commands=_SERVING,
    )
    waiting_served_ratio: float = _flag(
        kinds.number(0, float("inf")),
        0.3,
        "Prompts always run in chunks beside the running requests.",
        "obsolete",
        neutral=(0.3, 1.2),
        commands=_HTTP,
    )
    max_batch_prefill_tokens: int | None = _flag(
        kinds.integer(1, 2**32 - 1),
        None,
        "Most tokens of one step, prompts and decodes together; unset means 4096 on GPU and 512 on CPU, or what the "
        "model and the memory allow.",
        commands=_SERVING,
    )
    max_batch_total_tokens: int | None = _flag(
        kinds.integer(BLOCK_SIZE, 2**32 - 1),
        None,
        "Tokens that the KV cache holds, rounded down to whole pages of 16; unset means what the memory has room for.",
        commands=_SERVING,
    )
    max_waiting_tokens: int = _flag(
        kinds.integer(), 20, "Waiting requests are admitted in every step.", "obsolete", commands=_HTTP
    )
    max_batch_size: int | None = _flag(
        kinds.integer(),
        None,
        "Most requests that run at once; unset means `--max-concurrent-requests`.",
        commands=_SERVING,
    )
    cuda_graphs: tuple[int, ...] | None = _flag(
        kinds.list_of(kinds.integer()),
        None,
        "Numbers of requests for which a GPU's decode steps are captured as graphs, once it serves. 0: none; unset: "
        "a ladder from 1 up to `--max-batch-size`.",
    )
    deterministic: bool = _flag(
        kinds.SWITCH,
        False,
        "What a request gets doesn't depend, bit by bit, on what is computed beside it. On CPUs with our kernels it is "
        "always so; GPUs become slower by it.",
    )
    hostname: str = _flag(
        kinds.text("ADDRESS"),
        "0.0.0.0",
        "Address or name to listen on. The variable is passed over when it holds this machine's own name, which "
        "shells and containers set by themselves.",
        commands=_HTTP,
    )
    port: int = _flag(
        kinds.integer(0, 65535), 3000, "Port to listen on; 0 takes a free one.", short="-p", commands=_HTTP
    )
    prometheus_port: int = _flag(
        kinds.integer(0, 65535), 9000, "Metrics are served at /metrics of `--port`.", "obsolete", commands=_HTTP
    )
    shard_uds_path: str | None = _flag(
        kinds.text("PATH"),
        None,
        "Unix socket of the engine, with `-0` behind it, for routers that are started by hand; unset means one in a "
        "private folder. The processes of a split model need no others.",
        commands=("launcher",),
    )
    master_addr: str = _flag(
        kinds.text("ADDRESS"),
        "localhost",
        "Where the processes of a split model meet, on GPUs and on CPUs without native kernels. With these they share "
        "memory, and need no address.",
    )
    master_port: int = _flag(kinds.integer(1, 65535), 29500, "Port of `--master-addr`.")
    huggingface_hub_cache: str | None = _flag(
        kinds.text("DIR"),
        None,
        "Folder of the hub cache; unset means huggingface_hub's own (`HF_HOME`).",
        commands=_FILES,
    )
    weights_cache_override: str | None = _flag(
        kinds.text("DIR"),
        None,
        "Folder to read the files of weights from, instead of the hub cache.",
        commands=(*_WEIGHTS, *_QUANTIZE),
    )
    disable_custom_kernels: bool = _flag(
        kinds.SWITCH, False, "The kernels that it turned off don't exist here.", "obsolete"
    )
    cuda_memory_fraction: float = _flag(
        kinds.number(0, 1, above=True),
        1.0,
        "Share of the device's memory that the server may use; on CPU the share of the memory available at start.",
    )
    rope_scaling: str | None = _flag(
        kinds.one_of("linear", "dynamic"), None, "Stretch the rotary positions; alone it means `--rope-factor 1.0`."
    )
    rope_factor: float | None = _flag(
        kinds.number(0, float("inf"), above=True),
        None,
        "Factor of the stretch; alone it means `--rope-scaling linear`.",
    )
    json_output: bool = _flag(kinds.SWITCH, False, "Log one JSON object per line.", commands=_ALL)
    otlp_endpoint: str | None = _flag(
        kinds.COLLECTOR,
        None,
        "OpenTelemetry collector to send traces to, by gRPC (`http://host:4317`), or by HTTP if the URL has a path or "
        "port 4318. The router sends them; what an engine does is part of its spans.",
        commands=_SERVING,
    )
    otlp_service_name: str = _flag(
        kinds.text(), "text-generation-inference.router", "The traces' `service.name`.", commands=_SERVING
    )
    cors_allow_origin: tuple[str, ...] = _flag(
        kinds.list_of(kinds.text("ORIGIN"), many=True),
        (),
        "Origins that browsers may call from; unset means any.",
        commands=_HTTP,
    )
    api_key: str | None = _flag(kinds.text("KEY"), None, "Bearer token that clients must send.", commands=_HTTP)
    watermark_gamma: float = _flag(
        kinds.number(0, 1),
        0.5,
        "Share of the vocabulary that a watermark favours, for requests that ask for a watermark.",
        commands=(*_ENGINE, "detect-watermark"),
    )
    watermark_delta: float = _flag(
        kinds.number(0, 1e4), 2.0, "What a watermark adds to the logits of the tokens that it favours."
    )
    ngrok: bool = _flag(kinds.SWITCH, False, "Open an ngrok tunnel.", "refused", commands=_HTTP)
    ngrok_authtoken: str | None = _flag(kinds.text(), None, "No ngrok tunnel is opened.", "obsolete", commands=_HTTP)
    ngrok_edge: str | None = _flag(kinds.text(), None, "No ngrok tunnel is opened.", "obsolete", commands=_HTTP)
    tokenizer_config_path: str | None = _flag(
        kinds.text("FILE"),
        None,
        "tokenizer_config.json to take the chat template and the special tokens from.",
        commands=_SERVING,
    )
    tool_call_parser: str = _flag(
        kinds.one_of("auto", *CALL_PARSERS),
        "auto",
        "How the model writes tool calls; `auto` sees it by the chat template, `tgi` is the way of models that have "
        "none of their own.",
        commands=_HTTP,
    )
    reasoning_parser: str = _flag(
        kinds.one_of("auto", "none", *REASONING_PARSERS),
        "auto",
        "How the model writes its reasoning, which chat routes tell apart from the answer; `auto` sees it by the chat "
        "template, `none` leaves it in the text.",
        commands=_HTTP,
    )
    disable_grammar_support: bool = _flag(
        kinds.SWITCH,
        False,
        "Refuse requests that say what the answer must spell: grammars, response formats, and so tool calls.",
        commands=_HTTP,
    )
    env: bool = _flag(
        kinds.SWITCH,
        False,
        "Log what this machine is made of at start.",
        short="-e",
        only="cli",
        commands=("launcher",),
    )
    max_client_batch_size: int = _flag(
        kinds.integer(), 4, "Most prompts in one call of /v1/completions.", commands=_HTTP
    )
    lora_adapters: str | None = _flag(kinds.text("ID,…"), None, "LoRA adapters to load.", "refused")
    usage_stats: str = _flag(
        kinds.one_of("on", "off", "no-stack"),
        "on",
        "Accepted in every form; nothing is ever sent to anybody.",
        commands=_HTTP,
    )
    payload_limit: int = _flag(kinds.integer(), 2_000_000, "Largest body of an HTTP request in bytes.", commands=_HTTP)
    enable_prefill_logprobs: bool = _flag(
        kinds.SWITCH, False, "Log-probabilities of the prompt are always there for requests that ask.", "obsolete"
    )
    graceful_termination_timeout: int = _flag(
        kinds.integer(), 90, "Seconds that open requests have to end after SIGTERM.", short="-g", commands=_SERVING
    )
    tokenizer_name: str | None = _flag(
        kinds.text("ID"), None, "The model that the engine serves; another one is an error.", commands=("router",)
    )
    master_shard_uds_path: str = _flag(
        kinds.text("PATH"),
        "/tmp/text-generation-server-0",
        "Socket of the engine that `text-generation-server serve` started.",
        commands=("router",),
    )
    max_image_fetch_size: int = _flag(kinds.integer(), 1 << 30, "No image is ever fetched.", "obsolete", commands=_HTTP)
    uds_path: str = _flag(
        kinds.text("PATH"),
        "/tmp/text-generation-server",
        "The engine listens on this path with `-0` behind it.",
        only="cli",
        commands=("serve",),
    )
    logger_level: str | None = _flag(
        kinds.LOGGER_LEVEL,
        None,
        "What is logged; wins over `LOG_LEVEL`.",
        only="cli",
        commands=("serve", "download-weights", *_QUANTIZE),
    )
    extension: str = _flag(
        kinds.one_of(".safetensors"), ".safetensors", "Files to fetch.", only="cli", commands=("download-weights",)
    )
    auto_convert: bool = _flag(
        kinds.SWITCH,
        True,
        "Pickled weights are never converted; a repository that has no others is refused.",
        "obsolete",
        neutral=(False,),
        only="cli",
        commands=("download-weights",),
    )
    merge_lora: bool = _flag(
        kinds.SWITCH,
        False,
        "Nothing is merged; a repository that has only an adapter is refused.",
        "obsolete",
        only="cli",
        commands=("download-weights",),
    )
    file: str = _flag(
        kinds.text("FILE"),
        "-",
        "The text, in UTF-8: the answer without its prompt. `-`: standard input.",
        only="place",
        commands=("detect-watermark",),
    )
    threshold: float = _flag(
        kinds.number(0, float("inf"), above=True),
        4.0,
        "From this z-score on a text counts as watermarked. At 4 some 3 of 100,000 other texts do.",
        only="cli",
        commands=("detect-watermark",),
    )
    count_repeats: bool = _flag(
        kinds.SWITCH,
        False,
        "Count a pair of tokens as often as it comes, not once. Texts that repeat themselves then prove too much.",
        only="cli",
        commands=("detect-watermark",),
    )
    json: bool = _flag(
        kinds.SWITCH, False, "Print the result as a JSON object.", only="cli", commands=("detect-watermark",)
    )
    output_dir: str | None = _flag(
        kinds.text("OUTPUT_DIR"),
        None,
        "Folder that is written: empty or not there, or begun by the same command.",
        only="place",
        commands=_QUANTIZE,
    )
    method: str = _flag(
        kinds.one_of("gptq", "awq", "int8", "fp8"),
        "gptq",
        "How weights are quantized. `gptq` and `awq` read a text to see what matters, `int8` and `fp8` just round.",
        only="cli",
        commands=_QUANTIZE,
    )
    bits: int | None = _flag(
        kinds.integer(),
        None,
        "Bits of a weight: 4 or 8 for `gptq`; `awq` has 4, the others 8. Unset means 4 where there is a choice.",
        only="cli",
        commands=_QUANTIZE,
    )
    groupsize: int | None = _flag(
        kinds.GROUP,
        None,
        "Inputs that share a scale, for `gptq` and `awq`; -1: all, for `gptq`. Unset means 128, or the largest of 64, "
        "32 and 16 that divides the inputs of all matrices.",
        short="--group-size",
        only="cli",
        commands=_QUANTIZE,
    )
    sym: bool = _flag(
        kinds.SWITCH, True, "`gptq`: zero is in the middle of each group's range.", only="cli", commands=_QUANTIZE
    )
    percdamp: float = _flag(
        kinds.number(0, 1, above=True),
        0.01,
        "`gptq`: what is added to the Hessian's diagonal, as a share of its mean.",
        only="cli",
        commands=_QUANTIZE,
    )
    act_order: bool = _flag(
        kinds.SWITCH,
        True,
        "`gptq`: weights of large inputs are rounded first. Groups stay runs of neighbours.",
        only="cli",
        commands=_QUANTIZE,
    )
    dataset: str | None = _flag(
        kinds.text("FILE"),
        None,
        "Text that is read, in UTF-8; unset means a novel of 1865 that comes with this server.",
        only="cli",
        commands=_QUANTIZE,
    )
    samples: int | None = _flag(
        kinds.integer(1),
        None,
        "Sequences of the text; unset means what it has, up to 128.",
        only="cli",
        commands=_QUANTIZE,
    )
    sequence_length: int = _flag(kinds.integer(16, 2**20), 512, "Tokens of a sequence.", only="cli", commands=_QUANTIZE)
    upload_to_model_id: str | None = _flag(
        kinds.text("ID"), None, "Nothing is sent to a hub.", "refused", only="cli", commands=_QUANTIZE
    )

    log_level: str = _flag(
        kinds.LOG_LEVEL,
        "info",
        "What is logged: a level, or a list like `info,text_generation_router=debug`; the lines about requests are "
        "`text_generation_router::server`.",
        only="env",
        commands=_ALL,
    )
    log_colorize: bool | None = _flag(
        kinds.BIT,
        None,
        "Colours in the log's text; unset means on a terminal only. In TGI `1` turns them off, everything else on.",
        only="env",
        commands=_ALL,
        lenient=True,
    )
    compute_type: str | None = _flag(
        kinds.HEADER, None, "Value of the header x-compute-type; unset names the device.", only="env", commands=_HTTP
    )
    prefix_caching: bool = _flag(
        kinds.BIT,
        True,
        "Share the KV cache of equal prompt beginnings.",
        only="env",
    )
    prefill_chunking: bool = _flag(
        kinds.BIT,
        True,
        "Prompts always run in chunks.",
        "refused",
        neutral=(True,),
        only="env",
    )
    attention: str | None = _flag(
        kinds.one_of("paged", "flashdecoding", "flashdecoding-ipex", "flashinfer"),
        None,
        "`flashinfer`: attention by this package, which must be installed, on NVIDIA's GPUs. Others and none: our own "
        "kernels, which read pages where they lie and split long contexts.",
        refused=("flashdecoding-ipex",),
    )
    tgi_wiggle_room: float | None = _flag(
        kinds.number(0, 1, above=True),
        None,
        "Share of the memory that is planned with, the rest being left alone; unset means 0.95 on GPU and 0.98 on CPU.",
        only="env",
    )
    hf_api_token: str | None = _flag(
        kinds.text(), None, "Hub token; wins over `HF_TOKEN` and `HUGGING_FACE_HUB_TOKEN`.", only="env", commands=_FILES
    )
    cuda_visible_devices: str | None = _flag(
        kinds.ANY, None, "GPUs to see.", only="env", commands=(*_ENGINE, *_QUANTIZE)
    )
    nvidia_visible_devices: str | None = _flag(
        kinds.ANY, None, "GPUs that the container runtime shows; also read by that.", only="env"
    )
    aip_http_port: int | None = _flag(
        kinds.integer(0, 65535),
        None,
        "Port to listen on, of Vertex AI; wins over `--port`.",
        only="env",
        commands=_HTTP,
        lenient=True,
    )
    aip_predict_route: str | None = _flag(
        kinds.PATH, None, "One more path of /vertex, of Vertex AI.", only="env", commands=_HTTP
    )
    aip_health_route: str | None = _flag(
        kinds.PATH, None, "One more path of /health, of Vertex AI.", only="env", commands=_HTTP
    )
    git_sha: str | None = _flag(kinds.LABEL, None, "`sha` of /info; images carry it.", only="env", commands=_HTTP)
    docker_label: str | None = _flag(
        kinds.LABEL,
        None,
        "`docker_label` of /info and end of `system_fingerprint`; images carry it.",
        only="env",
        commands=_HTTP,
    )
    request_logprobs: str | None = _flag(
        kinds.ANY,
        None,
        "Log-probabilities of the prompt are always there for requests that ask.",
        "obsolete",
        only="env",
        commands=("serve",),
    )
    rank: int = _flag(
        kinds.integer(), 0, "Which part of a split model this is.", "refused", only="env", commands=("serve",)
    )
    world_size: int = _flag(
        kinds.integer(),
        1,
        "Number of devices that the model is split over.",
        "refused",
        only="env",
        commands=("serve",),
    )
    use_flash_attention: str | None = _flag(
        kinds.ANY, None, "The attention kernel is chosen by model and device.", "obsolete", only="env"
    )
    exllama_version: str | None = _flag(kinds.ANY, None, "There are no ExLlama kernels.", "obsolete", only="env")
    disable_exllama: str | None = _flag(kinds.ANY, None, "There are no ExLlama kernels.", "obsolete", only="env")
    use_cutlass_w8a8: str | None = _flag(kinds.ANY, None, "There are no CUTLASS kernels.", "obsolete", only="env")
    ze_affinity_mask: str | None = _flag(kinds.ANY, None, "Intel GPUs are not used.", "obsolete", only="env")
    xdg_cache_home: str | None = _flag(
        kinds.text("DIR"),
        None,
        "Parent of this server's own cache folder `tgi`; unset means `~/.cache`.",
        only="env",
        commands=_FILES,
    )


FLAGS: tuple[Flag, ...] = tuple(Flag(key=field.name, **field.metadata["row"]) for field in dataclasses.fields(Options))


VARIABLES: dict[str, str] = {
    "huggingface_hub reads them.": (
        "HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_HOME HF_ENDPOINT HF_HUB_OFFLINE HF_HUB_USER_AGENT_ORIGIN "
        "HF_HUB_DISABLE_PROGRESS_BARS"
    ),
    "huggingface_hub knows it no more, and says so.": "HF_HUB_ENABLE_HF_TRANSFER",
    "torch reads it: threads of the engine on CPU.": "OMP_NUM_THREADS",
    "The SageMaker image makes `MODEL_ID`, `REVISION`, `NUM_SHARD`, `QUANTIZE` and `TRUST_REMOTE_CODE` of them.": (
        "HF_MODEL_ID HF_MODEL_REVISION SM_NUM_GPUS HF_MODEL_QUANTIZE HF_MODEL_TRUST_REMOTE_CODE"
    ),
    "Use `GIT_SHA`.": "VERGEN_GIT_SHA",
    "TGI's launcher sets them for its own children.": "TORCH_NCCL_AVOID_RECORD_STREAMS SAFETENSORS_FAST_GPU",
    "Switches of kernels that aren't here.": "DEBUG HF_KERNELS_CACHE EXLLAMA_NO_FLASH_ATTN VLLM_MOE_PADDING",
    "Switches for GPUs of AMD and Intel, which are not used.": (
        "XPU_MEMORY_FRACTION ROCM_USE_SKINNY_GEMM ROCM_USE_FLASH_ATTN_V2_TRITON ROCM_USE_CUSTOM_PAGED_ATTN "
        "HIP_FORCE_DEV_KERNARG PYTORCH_TUNABLEOP_ENABLED PYTORCH_TUNABLEOP_TUNING PYTORCH_TUNABLEOP_SEQLENS "
        "PYTORCH_TUNABLEOP_TUNING_AFTER_WARMUP"
    ),
}
"""Why no command reads TGI's other variables."""


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


def _positional(flag: Flag, command: Command) -> bool:
    """``text-generation-server`` takes the model's name without a flag."""
    return flag.only == "place" or (flag.key == "model_id" and command != "launcher")


def _parser(command: Command) -> argparse.ArgumentParser:
    flags = [flag for flag in FLAGS if command in flag.commands]
    environment = "\n".join(f"  {flag.env:<20} {_described(flag)}" for flag in flags if flag.only == "env")
    program = PROGRAMS[command]
    places = "".join(
        f" [{flag.name}]" if flag.only == "place" else " MODEL_ID" for flag in flags if _positional(flag, command)
    )
    parser = _Parser(
        prog=program,
        usage=f"{program} [OPTIONS]{places}",
        description=f"{_PURPOSE[command]} The command line wins over the environment.",
        epilog=f"environment only:\n{environment}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"{program} {__version__}")
    for flag in flags:
        if flag.only == "env":
            continue
        names = (flag.short, flag.name) if flag.short else (flag.name,)
        shared: dict[str, Any] = {"dest": flag.key, "default": argparse.SUPPRESS, "help": _described(flag)}
        if flag.only == "place":
            parser.add_argument(nargs="?", metavar=flag.name, **shared)
        elif _positional(flag, command):
            parser.add_argument(flag.key, metavar="MODEL_ID", help=flag.help)
        elif flag.kind in (kinds.BOOLEAN, kinds.SWITCH) and command not in ("launcher", "router"):
            parser.add_argument(*names, action="store_const", const="true", **shared)
            parser.add_argument(f"--no-{flag.name[2:]}", action="store_const", const="false", **shared)
        elif flag.kind.switch:
            parser.add_argument(*names, action="store_const", const="true", **shared)
        else:
            action = "append" if flag.kind.many else "store"
            parser.add_argument(*names, action=action, metavar=flag.kind.metavar, **shared)
    return parser


def parse(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ, command: Command = "launcher"
) -> tuple[Options, list[str]]:
    """The options and the warnings to log about them. Ends the process with status 2 and a usage on a bad one."""
    parser = _parser(command)
    written: dict[str, str | list[str]] = vars(parser.parse_intermixed_args(list(argv)))
    values: dict[str, Any] = {}
    warnings: list[str] = []
    for flag in FLAGS:
        if command not in flag.commands:
            continue
        text: str | list[str]
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
            problem = f"invalid value {text!r} for {source}: {error}"
            if not flag.lenient:
                parser.error(problem)
            warnings.append(f"{problem}; it is passed over")
            continue
        if value in flag.refused:
            parser.error(f"{source} {value} is not supported yet. {flag.help}")
        if flag.status != "works" and value not in (flag.neutral or (flag.default,)):
            if flag.status == "refused":
                parser.error(f"{source} is not supported yet. {flag.help}")
            warnings.append(f"{source} changes nothing here: {flag.help}")
        values[flag.key] = value
    if "logger_level" in values:
        values["log_level"] = values["logger_level"]
    return Options(**values), warnings


def cache_options(environ: Mapping[str, str] = os.environ) -> Options:
    """The options that say where models are kept, from the environment; all others at their defaults."""
    names = ("HUGGINGFACE_HUB_CACHE", "WEIGHTS_CACHE_OVERRIDE", "HF_API_TOKEN", "XDG_CACHE_HOME")
    return parse([], {name: environ[name] for name in names if name in environ})[0]


def check(options: Options) -> Options:
    """Contradictions between the limits that are set, in TGI's words; values under two names are folded into one."""
    if options.max_input_length is not None:
        if options.max_input_tokens is not None:
            raise ArgumentValidation(
                f"Both `max_input_tokens` ({options.max_input_tokens}) and `max_input_length` "
                f"({options.max_input_length}) are set. Please define only `max_input_tokens` as `max_input_length is "
                "deprecated for naming consistency."
            )
        options = dataclasses.replace(options, max_input_tokens=options.max_input_length, max_input_length=None)
    if options.aip_http_port is not None:
        options = dataclasses.replace(options, port=options.aip_http_port, aip_http_port=None)
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


_LETTERS: dict[Command, str] = {
    "launcher": "L",
    "router": "R",
    "serve": "S",
    "download-weights": "D",
    "detect-watermark": "W",
    "quantize": "Q",
}


def document() -> str:
    """docs/flags.md."""
    rows = [
        f"| {f'`{flag.name}`' if flag.name else ''}{f' `{flag.short}`' if flag.short else ''} | "
        f"{f'`{flag.env}`' if flag.env else ''} | {' '.join(map(_LETTERS.__getitem__, flag.commands))} | "
        f"{flag.default_text} | {'' if flag.kind.switch else flag.kind.allowed.replace('|', ', ')} | "
        f"{flag.status_text} | "
        f"{flag.help} |"
        for flag in FLAGS
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Made by `python -m tgi.launcher.flags > docs/flags.md`; a test checks that it is up to date.",
            "",
            *(f"* **{_LETTERS[command]}** `{program}`: {_PURPOSE[command]}" for command, program in PROGRAMS.items()),
            "",
            "The command line wins over the environment, the environment over the default. A flag without a value is",
            "`true` or `false` in the environment. A bad value ends the command with status 2.",
            "`text-generation-server` takes the model's name without `--model-id`, and its switches have a `--no-…`.",
            "",
            "* **works**: does what is said.",
            "* **refused**: the feature isn't there; the flag, or that value of it, ends the command with status 2 and",
            "  its name.",
            "* **obsolete**: this server has nothing for it to change; setting it logs one warning.",
            "",
            "| Flag | Environment | Of | Default | Allowed | Status | Meaning |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "## Variables that others read, or nobody",
            "",
            "| Variables | |",
            "|---|---|",
            *(f"| {', '.join(f'`{name}`' for name in names.split())} | {why} |" for why, names in VARIABLES.items()),
            "",
        ]
    )


if __name__ == "__main__":
    print(document(), end="")
