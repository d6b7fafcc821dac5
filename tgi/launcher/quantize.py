"""`text-generation-server quantize`: from options to a job, and the process that does it."""

import subprocess
import sys
from pathlib import Path

import msgspec

from tgi.core.job import Job
from tgi.launcher.download import Store, resolve_model
from tgi.launcher.errors import ArgumentValidation
from tgi.launcher.flags import Options
from tgi.launcher.machine import probe

_READING = ("dataset", "samples", "sequence_length", "groupsize")
_METHODS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "gptq": ((4, 8), (*_READING, "sym", "percdamp", "act_order")),
    "awq": ((4,), _READING),
    "int8": ((8,), ()),
    "fp8": ((8,), ()),
}
"""Method → bits of a weight that it may have, the usual number first; settings that mean something to it."""

_PROCESS = (sys.executable, "-m", "tgi.quantizer.process")


def quantize(options: Options, store: Store) -> int:
    """The process's exit status; what went wrong there it has said. Raises StartupError."""
    if options.output_dir is None:
        raise ArgumentValidation("OUTPUT_DIR is missing: `text-generation-server quantize MODEL_ID OUTPUT_DIR`")
    bits = _check(options)
    machine = probe(options.device, options.cuda_visible_devices)
    job = Job(
        model=resolve_model(options.model_id, options.revision, store),
        output=str(Path(options.output_dir).absolute()),
        method=options.method,
        bits=bits,
        group_size=options.groupsize,
        sym=options.sym,
        percdamp=options.percdamp,
        act_order=options.act_order,
        dataset=options.dataset,
        samples=options.samples,
        sequence_length=options.sequence_length,
        device=machine.device,
        trust_remote_code=options.trust_remote_code,
        log_level=options.log_level,
        json_output=options.json_output,
        log_colorize=options.log_colorize,
    )
    return subprocess.run(_PROCESS, input=msgspec.json.encode(job)).returncode


def _check(options: Options) -> int:
    """The bits. ArgumentValidation if what is asked doesn't go together."""
    possible, own = _METHODS[options.method]
    plain = Options()
    for key in _METHODS["gptq"][1]:
        if key not in own and getattr(options, key) != getattr(plain, key):
            raise ArgumentValidation(f"`--{key.replace('_', '-')}` has no meaning for `--method {options.method}`")
    bits = possible[0] if options.bits is None else options.bits
    if bits not in possible:
        raise ArgumentValidation(f"`--bits` {bits}: `--method {options.method}` has {' or '.join(map(str, possible))}")
    if options.groupsize == -1 and options.method == "awq":
        raise ArgumentValidation("`--groupsize` -1: `--method awq` has groups")
    return bits
