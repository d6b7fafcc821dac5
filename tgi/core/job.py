"""What `text-generation-server quantize` was asked: from the launcher to the process that does it."""

import msgspec

from tgi.core.config import ModelFiles


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Everything resolved; the meaning of each setting is told in launcher/flags.py."""

    model: ModelFiles
    output: str
    method: str
    """gptq, awq, int8 or fp8."""
    bits: int
    group_size: int | None = None
    """Inputs that share a scale; -1: all; None: the largest usual number that divides all matrices."""
    sym: bool = True
    percdamp: float = 0.01
    act_order: bool = True
    dataset: str | None = None
    samples: int | None = None
    sequence_length: int = 512
    device: str = "cpu"
    trust_remote_code: bool = False
    log_level: str = "info"
    json_output: bool = False
    log_colorize: bool | None = None

    @property
    def settings(self) -> dict[str, object]:
        """What the result depends on, besides the files it is made of."""
        names = "method bits group_size sym percdamp act_order samples sequence_length".split()
        return {name: getattr(self, name) for name in names}
