"""Builds the native kernels with the package; all else is in pyproject.toml."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

BUILD = Path(__file__).parent / "tgi" / "kernels" / "build.py"


class BuildKernels(build_ext):
    """Compiles by tgi/kernels/build.py. Without a compiler the package installs all the same, and runs on torch."""

    def build_extension(self, ext: Extension) -> None:
        spec = importlib.util.spec_from_file_location("kernels_build", BUILD)
        assert spec is not None and spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        in_place = self.inplace or self.editable_mode
        folder = BUILD.parent if in_place else Path(self.build_lib) / "tgi" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            kernels.build(folder / kernels.LIBRARY.name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"tgi: no native kernels: {error}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return "tgi/kernels/libtgi_kernels.so"

    def get_outputs(self) -> list[str]:
        path = Path(self.build_lib) / self.get_ext_filename("")
        return [str(path)] if path.exists() else []

    def copy_extensions_to_source(self) -> None:
        """An editable install builds in place."""


class WithKernels(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    cmdclass={"build_ext": BuildKernels},
    distclass=WithKernels,
    ext_modules=[Extension("tgi.kernels.libtgi_kernels", [])],
)
