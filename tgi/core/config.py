"""The resolved settings that the launcher hands to its children, as data."""

from pathlib import Path

import msgspec

CALL_PARSERS = tuple(
    "gpt_oss kimi_k2 deepseek_v3 deepseek_v31 mistral_v11 mistral command_r7b command_r functiongemma gemma4 "
    "gemma functools phi4_mini granite granite_20b jamba nemotron nemotron_mini internlm qwen3_coder glm45 smollm "
    "hermes lfm2 llama4_pythonic pythonic llama3_json xlam tgi".split()
)
"""The names of ``router.formats.CALLS``."""

REASONING_PARSERS = ("gpt_oss", "mistral", "command", "gemma4", "seed_oss", "kimi", "exaone", "granite", "think")
"""The names of ``router.formats.REASONING``."""

BLOCK_SIZE = 16
"""Tokens per page of the KV cache, and the grain of the prefix cache."""

GATHERED_TOKENS = 1 << 16
"""Tokens whose keys and values attention gathers at once, unless a single request has more; the ledger counts them."""

BESIDE_DECODES = {"cpu": 64}
"""Device → prompt tokens of a step in which others decode. With more of them, those wait longer for it; with fewer, the
linear layers are less busy. On a CPU a step of 32 requests takes at most twice as long for these."""

SCORED_ROWS = 64
"""Prompt tokens whose log-probabilities are computed at once; the ledger counts their logits."""


class KVPool(msgspec.Struct, frozen=True):
    """The KV cache of the layers in which a token sees equally far."""

    blocks: int
    window: int | None = None
    """A token sees itself and the ``window - 1`` tokens before it; None: all."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what clients may ask and on what the engine may hold; all resolved, none open."""

    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    """Tokens that one step may compute, prompts and decodes together."""
    max_batch_total_tokens: int
    """Tokens of KV cache, a multiple of BLOCK_SIZE; of the layers in which a token sees farthest."""
    max_batch_size: int
    """Requests that may run at once."""
    max_client_batch_size: int = 4
    validation_workers: int = 2
    payload_limit: int = 2_000_000


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lies on this machine. A GGUF file has its metadata as JSON files in ``folder`` beside the cache."""

    model_id: str
    """As the operator named it; what /info and /v1/models say."""
    revision: str | None = None
    sha: str | None = None
    pipeline_tag: str | None = None
    folder: str
    """Holds config.json, tokenizer.json and, where the model has them, tokenizer_config.json, generation_config.json,
    chat_template.jinja; for GGUF also gguf_index.json."""
    weights: list[str]
    """Absolute paths: safetensors files, files of torch.save's, or one GGUF file."""
    adapter: list[str] = []
    """adapter_config.json and weights of a PEFT adapter that is merged into these."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the launcher resolved, written once to RUN_DIR/settings.json (mode 0600) and read by its children."""

    model: ModelFiles
    limits: Limits
    run_dir: str
    uds_path: str | None = None
    """Where the engine listens, if not in ``run_dir``."""
    ranks: int = 1
    """Processes that hold the model together."""
    master: tuple[str, int] = ("localhost", 29500)
    """Address and port where they meet if torch lets them talk to each other."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of weights that aren't quantized, of the KV cache, and of activations unless native kernels compute these."""
    quantize: str | None = None
    """"int8", "int4": the weights are rounded so at load; "stored": they stay as the checkpoint has them quantized."""
    kv_cache_dtype: str | None = None
    """"int8", "fp8_e4m3fn", "fp8_e5m2"; None: ``dtype``."""
    attention: str | None = None
    """The backend that is to serve all layers; None: the best that can."""
    graphs: list[int] = []
    """Numbers of requests for which decode steps are captured."""
    deterministic: bool = False
    """What a request gets doesn't depend on what is computed beside it."""
    pools: list[KVPool]
    """Of the KV cache; the first is of the layers in which a token sees farthest."""
    longest_step: float = 60.0
    """Seconds: a step that takes longer hangs."""
    packed: str | None = None
    """Folder where packed weights are kept."""
    compiled: str | None = None
    """Folder where Triton keeps what it has compiled, unless its own variable names another."""
    trust_remote_code: bool = False
    """Python files of the model's folder may be run."""
    rope_scaling: str | None = None
    rope_factor: float | None = None
    ledger: dict[str, int] = {}
    """The memory ledger: name → bytes, in the order it is printed; shown at /info."""
    prefix_caching: bool = True
    router_workers: int = 1
    """Routers that share the port."""
    grammars: bool = True
    """Whether requests may say what their answers must spell."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls; "auto" sees it by the chat template."""
    reasoning_parser: str = "auto"
    """How it writes reasoning; "none" leaves that in the text."""
    api_key: str | None = None
    cors_allow_origin: list[str] = []
    tokenizer_config_path: str | None = None
    watermark_gamma: float = 0.5
    """Share of the vocabulary that a watermark favours."""
    watermark_delta: float = 2.0
    """What it adds to their logits."""
    aip_predict_route: str | None = None
    """Vertex AI's path of /vertex."""
    aip_health_route: str | None = None
    git_sha: str | None = None
    docker_label: str | None = None
    compute_type: str = "cpu"
    json_output: bool = False
    log_level: str = "info"
    log_colorize: bool | None = None
    """None: in colours on a terminal."""
    otlp_endpoint: str | None = None
    otlp_service_name: str = "text-generation-inference.router"
    graceful_termination_timeout: float = 90.0

    @property
    def socket(self) -> Path:
        """The engine's Unix socket. Only this user may connect: its mode or its folder's says so."""
        return Path(self.uds_path or Path(self.run_dir) / "engine.sock")

    @classmethod
    def read(cls, path: str | Path) -> "Settings":
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)
