"""What a file of torch.save's holds, by its pickle alone: names, types and shapes. Reads no numbers, needs no torch.

A pickle is a program. This one may call what state dicts are made of and nothing else: any other name that it asks for
is refused before it is looked up.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tgi.core.errors import StartupError


class Tensor(NamedTuple):
    """A tensor of a state dict."""

    dtype: str
    """As safetensors names it."""
    storage: str
    """Key of the memory it lies in."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first of four pickles in a file that torch wrote before 1.6; since then files are zip archives."""


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict's tensors by name. StartupError if the file is none, or asks for what no state dict needs."""
    try:
        with path.open("rb") as file:
            state = _from_zip(path, file) if zipfile.is_zipfile(file) else _from_pickles(path, file)
    except StartupError:
        raise
    except Exception as error:  # whatever a damaged program may raise
        raise StartupError(f"{path}: not a readable file of torch.save's: {error or type(error).__name__}") from None
    if not isinstance(state, dict):
        raise StartupError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise StartupError(f"{path}: {name!r}: expected a tensor, got {type(tensor).__name__}")
    return state


def _from_zip(path: Path, file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        with archive.open(name) as member:
            return _Reader(path, member).load()


def _from_pickles(path: Path, file: BinaryIO) -> Any:
    file.seek(0)
    if _Reader(path, file).load() != _MAGIC:
        raise ValueError("neither a zip archive nor torch's older format")
    for _ in ("version", "machine"):
        _Reader(path, file).load()
    return _Reader(path, file).load()


class _Reader(pickle.Unpickler):
    """Runs a pickle in which tensors are their descriptions."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self._path = path
        # Made anew for each file: a pickle may set attributes of what it is given.
        self._known: Mapping[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _stand_in(4),
            ("torch._utils", "_rebuild_tensor_v2"): _stand_in(6),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
            **{("torch", name): dtype for name, dtype in _DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise StartupError(
                f"{self._path}: its pickle asks for {module}.{name}, which weights have no need of: nothing was run"
            ) from None

    def persistent_load(self, reference: Any) -> tuple[str, str]:
        """The storage that is meant, as (dtype, key)."""
        kind, dtype, key, *_ = reference
        if kind != "storage" or dtype not in _DTYPES.values():
            raise ValueError(f"an unknown reference: {reference!r}")
        return dtype, str(key)


def _stand_in(most: int) -> Any:
    """For a function of torch's that makes a tensor of up to ``most`` arguments."""

    def tensor(
        storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any
    ) -> Tensor:
        if len(rest) > most - 4 + 1:  # newer files add metadata
            raise ValueError("too many arguments for a tensor")
        return Tensor(*storage, offset, tuple(shape), tuple(stride))

    return tensor
