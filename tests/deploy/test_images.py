"""The Dockerfiles without Docker: read as it reads them, linted, and held against what TGI's images promise."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tgi.launcher import flags

ROOT = Path(__file__).parents[2]
DOCKERFILES = ["deploy/Dockerfile", "deploy/Dockerfile.cpu"]


@dataclass
class Stage:
    """What an image would be, as far as its instructions say."""

    base: str
    env: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        return next((value for name, value in reversed(self.steps) if name == instruction), None)


def stages(path: str) -> dict[str, Stage]:
    """Stages by name, the last one as "". A stage has all that its base has."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    name, arguments = "", {}
    for line in re.split(r"(?<!\\)\n", "\n".join(lines)):
        instruction, _, value = line.replace("\\\n", " ").strip().partition(" ")
        if instruction == "FROM":
            base, _, name = value.partition(" AS ")
            below = found.get(base, Stage(base))
            found[name] = Stage(below.base, dict(below.env), list(below.steps))
        elif instruction == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = default
        elif instruction == "ENV":
            for pair in shlex.split(value):
                key, _, text = pair.partition("=")
                found[name].env[key] = arguments[text[1:]] if text.startswith("$") else text
        elif instruction:
            found[name].steps.append((instruction, value))
    return found


def sources(stage: Stage) -> list[str]:
    """What comes out of the repository."""
    copied = [value for name, value in stage.steps if name == "COPY" and not value.startswith("--from=")]
    return [source for value in copied for source in value.split()[:-1]]


@pytest.mark.parametrize("path", DOCKERFILES)
def test_lint(path: str) -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / path], check=True)


def test_lint_of_the_script() -> None:
    subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), ROOT / "deploy" / "sagemaker-entrypoint.sh"], check=True
    )


@pytest.mark.parametrize("path", DOCKERFILES)
def test_what_is_copied_is_there_and_in_the_context(path: str) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in stages(path).values():
        for source in sources(stage):
            assert (ROOT / source).exists()
            assert source in kept
    assert kept == {source for stage in stages(path).values() for source in sources(stage)}


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_image_is_started_as_tgi_is(path: str) -> None:
    """``docker run --gpus all -p 8080:80 -v $PWD/data:/data IMAGE --model-id …``"""
    image = stages(path)[""]
    entry = json.loads(image.last("ENTRYPOINT") or "")
    assert entry == ["text-generation-launcher"]
    assert f'{entry[0]} = "' in (ROOT / "pyproject.toml").read_text()
    assert image.last("CMD") is None
    assert (image.last("EXPOSE"), image.last("VOLUME"), image.last("WORKDIR")) == ("80", "/data", "/")
    assert {"PORT": "80", "HF_HOME": "/data"}.items() <= image.env.items()
    assert image.env.get("HUGGINGFACE_HUB_CACHE") == ("/data" if path.endswith("cpu") else None)


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_launcher_understands_what_the_image_sets(path: str) -> None:
    options, warnings = flags.parse(["--model-id", "org/name"], stages(path)[""].env)
    assert warnings == []
    assert (options.port, options.xdg_cache_home) == (80, "/data")
    assert options.git_sha is None and options.docker_label is None
    known = {flag.env for flag in flags.FLAGS} | {name for names in flags.VARIABLES.values() for name in names.split()}
    assert set(stages(path)[""].env) - known <= {"NVIDIA_DRIVER_CAPABILITIES"}


@pytest.mark.parametrize("path", DOCKERFILES)
def test_the_image_for_sagemaker(path: str) -> None:
    image = stages(path)["sagemaker"]
    script = "sagemaker-entrypoint.sh"
    assert json.loads(image.last("ENTRYPOINT") or "") == [script]
    assert ("COPY", f"deploy/{script} /usr/local/bin/") in image.steps
    assert (ROOT / "deploy" / script).stat().st_mode & 0o111 == 0o111
    assert image.last("EXPOSE") == "8080"


@pytest.mark.parametrize("path", DOCKERFILES)
def test_what_changes_often_comes_last_and_versions_are_pinned(path: str) -> None:
    image = stages(path)[""]
    assert re.search(r":\d+\.\d+\.\d+", image.base)
    steps = [f"{name} {value}" for name, value in image.steps]
    order = [
        next(index for index, step in enumerate(steps) if step.startswith(start))
        for start in ("RUN pip install", "COPY pyproject.toml", "RUN python -c", "COPY --from=package", "VOLUME")
    ]
    assert order == sorted(order)
    assert re.search(r"torch==\d+\.\d+\.\d+$", steps[order[0]])


def test_the_dependencies_are_those_of_the_package() -> None:
    """The step that reads them out of pyproject.toml, run."""
    (step,) = {value for path in DOCKERFILES for name, value in stages(path)[""].steps if value.startswith("python -c")}
    code = shlex.split(step.partition(">")[0])[2]
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch>=2.11" in printed.stdout.splitlines()
    assert all(f'"{line}"' in (ROOT / "pyproject.toml").read_text() for line in printed.stdout.splitlines())
