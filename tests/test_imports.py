"""Imports point one way, and what starts fast never imports torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tgi"

# Part → parts that it may import besides itself. A part is a file or folder of tgi/; the longest name that fits counts.
ARROWS: dict[str, set[str]] = {
    "cli": {"core", "launcher"},
    "launcher": {"core"},
    "launcher.machine": {"core", "launcher", "kernels.library", "kernels.triton"},
    "launcher.fit": {
        "core",
        "launcher",
        "kernels.library",
        "kernels.triton",
        "models.config",
        "models.registry",
        "quantization.formats",
    },
    "router": {"core"},
    "engine": {"core"},
    "engine.loop": {"core", "engine", "runtime"},
    "engine.process": {"core", "engine", "runtime"},
    "runtime": {"models", "attention", "layers", "quantization", "kernels", "parallel", "core"},
    "models": {"layers", "attention.base", "quantization", "kernels.library", "kernels.sampling", "parallel", "core"},
    "layers": {"quantization", "attention.base", "kernels", "parallel", "core"},
    "quantization": {"kernels", "core"},
    "attention": {"kernels", "core"},
    "quantizer": {
        "models",
        "attention",
        "layers",
        "quantization",
        "parallel",
        "core",
        "launcher.progress",
    },
    "core": set(),
    "kernels": set(),
    "parallel": {"core"},
    "benchmark": set(),
}
TORCH_FREE = ("cli", "launcher", "router", "core", "benchmark")


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(name without ``tgi.``, syntax tree) of every file of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, wherever in it, with the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str | None:
    """The part that a module, or a name in it, belongs to."""
    return max((key for key in ARROWS if f"{name}.".startswith(f"{key}.")), key=len, default=None)


def allowed(source: str, target: str) -> bool:
    reach = ARROWS[source] | {source}
    return any(f"{target}.".startswith(f"{key}.") for key in reach)


def test_imports_point_one_way() -> None:
    wrong = []
    for name, tree in modules():
        source = part(name)
        assert source is not None, f"tgi.{name} is no part of the design: add its arrows"
        for module in imported(tree):
            if module.startswith("tgi.") and (target := module.removeprefix("tgi.")) != "__version__":
                if not allowed(source, target):
                    wrong.append(f"tgi.{name} imports {module}")
            elif module.split(".")[0] == "torch" and source.split(".")[0] in TORCH_FREE:
                wrong.append(f"tgi.{name} imports torch")
    assert not wrong


@pytest.mark.parametrize(
    "source, target, verdict",
    [
        ("launcher", "core.config", True),
        ("launcher", "router.app", False),
        ("models", "attention.base.AttnSpec", True),
        ("models", "attention.sdpa", False),
        ("engine", "engine.blocks", True),
        ("engine", "runtime.runner", False),
        ("engine.loop", "runtime.runner", True),
    ],
)
def test_the_arrows_mean_what_they_say(source: str, target: str, verdict: bool) -> None:
    assert allowed(source, target) is verdict


def test_what_starts_fast_does_not_load_torch() -> None:
    """Not even through others: all their modules are imported in one process, which is then looked into."""
    names = [f"tgi.{name}" for name, _ in modules() if name.split(".")[0] in TORCH_FREE]
    script = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print(*(name for name in ('torch', 'transformers', 'numpy') if name in sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "torch" not in loaded.stdout.split()


def test_the_launcher_loads_nothing_slow_before_it_must() -> None:
    script = (
        "import sys, tgi.cli, tgi.launcher.launch\n"
        "print(*(n for n in ('torch', 'huggingface_hub', 'rich', 'httpx', 'numpy', 'tokenizers') if n in sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
