"""Every error that a client can see: its kind, HTTP status, wire name, text and metric label, in one table."""

from typing import NamedTuple


class Kind(NamedTuple):
    """One row of TGI's error table: ``{"error": prefix + detail, "error_type": type}`` with an HTTP status."""

    type: str
    status: int
    prefix: str
    label: str | None = None
    """Value of ``err`` in the metric ``tgi_request_failure``; None: not counted there."""

    @property
    def ours(self) -> bool:
        """The server is at fault, not the client."""
        return self.status >= 500 or self.label == "generation"


GENERATION = Kind("generation", 424, "Request failed during generation: ", "generation")
OVERLOADED = Kind("overloaded", 429, "Model is overloaded", "overloaded")
VALIDATION = Kind("validation", 422, "Input validation error: ", "validation")
INCOMPLETE = Kind("incomplete_generation", 500, "Incomplete generation", "incomplete")
TEMPLATE = Kind("template_error", 422, "Template error: ", "template")
TOOL = Kind("tool_error", 422, "Tool error: ", "validation")
UNHEALTHY = Kind("healthcheck", 503, "unhealthy")
UNAVAILABLE = Kind("unavailable", 503, "The model is not ready: its engine is loading or starting again", "generation")
CRASH = Kind("crash", 500, "The engine ended, and ended again when this request was the only one it had", "generation")
INTERNAL = Kind("internal", 500, "Internal server error", "incomplete")
SUFFIX = Kind(
    "suffix not supported",
    422,
    "Suffix is not supported and can be achieved by preprocessing the prompt.",
    "validation",
)
BATCH_SIZE = Kind(
    "batch size exceeded", 422, "Number of prompts exceeds the maximum allowed batch size of ", "validation"
)
UNAUTHORIZED = Kind("unauthorized", 401, "The API key is missing or wrong")
NOT_FOUND = Kind("not_found", 404, "")
NO_INSTANCES = Kind("Input validation error", 422, "Input validation error", "validation")
UTF8 = Kind("utf8", 422, "", "validation")
LENGTH_MISMATCH = Kind("length mismatch", 422, "Inputs and outputs length mismatch", "validation")


class RequestError(Exception):
    """Ends one request with a kind and a detail; never another request, never the process."""

    def __init__(self, kind: Kind, detail: str = "") -> None:
        super().__init__(kind.prefix + detail)
        self.kind = kind
        self.detail = detail

    @property
    def status(self) -> int:
        return self.kind.status

    @property
    def message(self) -> str:
        return self.kind.prefix + self.detail

    @property
    def body(self) -> dict[str, str]:
        """The JSON body that TGI's clients parse."""
        return {"error": self.message, "error_type": self.kind.type}


class StartupError(Exception):
    """The process can't go on; the text names the flag, field or file at fault and what to change."""
