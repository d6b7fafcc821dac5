"""Engine and router started by hand: what the router takes from the engine's settings, and what it refuses."""

import fcntl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tgi.core.config import Limits, ModelFiles, Settings
from tgi.core.errors import StartupError
from tgi.launcher import apart
from tgi.launcher.apart import serve_router
from tgi.launcher.flags import Options

ENGINE = Settings(
    model=ModelFiles(model_id="org/model", revision="v1", folder="/", weights=[]),
    limits=Limits(
        max_input_tokens=100,
        max_total_tokens=200,
        max_batch_prefill_tokens=64,
        max_batch_total_tokens=1024,
        max_batch_size=8,
    ),
    pools=[],
    run_dir="/engine",
    compute_type="1-gpu",
    json_output=True,
    uds_path="/engine-0",
)


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[Path]:
    """Where an engine runs, as far as a router's start can see."""
    path = tmp_path / "e-0.json"
    path.write_bytes(msgspec.json.encode(ENGINE))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield tmp_path / "e-0"


@pytest.fixture
def served(socket: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a router with these options would be started with."""
    found: list[Settings] = []

    def supervise(settings: Settings, listener: object, started: float, engine: object) -> None:
        assert listener is not None and engine is None
        found.append(settings)

    def serve(**options: Any) -> Settings:
        serve_router(Options(port=0, master_shard_uds_path=str(socket), **options), 0.0)
        return found.pop()

    monkeypatch.setattr(apart, "supervise", supervise)
    return serve


def test_the_engine_says_what_it_is(served: Any) -> None:
    settings = served()
    assert settings == msgspec.structs.replace(
        ENGINE, run_dir=settings.run_dir, json_output=False, limits=settings.limits
    )
    assert settings.limits == ENGINE.limits
    assert settings.run_dir != ENGINE.run_dir


def test_the_router_has_its_own_say(served: Any) -> None:
    settings = served(
        tokenizer_name="org/model",
        revision="v1",
        api_key="k",
        aip_predict_route="/p",
        compute_type="x",
        max_best_of=7,
        max_concurrent_requests=3,
        max_total_tokens=50,
        max_batch_total_tokens=1030,  # the engine holds whole pages
        max_batch_size=8,
    )
    assert (settings.api_key, settings.aip_predict_route, settings.compute_type) == ("k", "/p", "x")
    limits = settings.limits
    assert (limits.max_best_of, limits.max_concurrent_requests) == (7, 3)
    assert (limits.max_input_tokens, limits.max_total_tokens) == (49, 50)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_total_tokens": 201}, "`max_total_tokens` must be <= 200, what the engine serves. Given: 201"),
        ({"max_input_tokens": 101}, "`max_input_tokens` must be <= 100, what the engine serves. Given: 101"),
        ({"max_input_tokens": 60, "max_total_tokens": 60}, "`max_input_tokens`(60) must be < `max_total_tokens`(60)"),
        ({"max_input_tokens": 90, "max_total_tokens": 50}, "`max_input_tokens`(90) must be < `max_total_tokens`(50)"),
        ({"max_batch_prefill_tokens": 63}, "`max_batch_prefill_tokens` is 64 in the engine"),
        ({"max_batch_total_tokens": 2048}, "`max_batch_total_tokens` is 1024 in the engine"),
        ({"max_batch_size": 9}, "`max_batch_size` is 8 in the engine"),
        ({"tokenizer_name": "org/other"}, "`--tokenizer-name` is org/other, but the engine serves org/model"),
        ({"revision": "main"}, "`--revision` is main, but the engine serves v1"),
        ({"validation_workers": 0}, "`validation_workers` must be > 0"),
    ],
)
def test_contradictions(served: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(StartupError) as error:
        served(**options)
    assert text in str(error.value)


def test_a_folder_is_the_same_by_any_name(
    served: Any, socket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = msgspec.structs.replace(ENGINE.model, model_id="./model")
    socket.with_name("e-0.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(ENGINE, model=model)))
    monkeypatch.chdir(tmp_path)
    assert served(tokenizer_name=str(tmp_path / "model")).model.model_id == "./model"


@pytest.mark.parametrize(
    ("content", "text"), [("", "still looking for its model's files"), ("{}", "is not of this version")]
)
def test_settings_that_are_not_there(served: Any, socket: Path, content: str, text: str) -> None:
    socket.with_name("e-0.json").write_text(content)
    with pytest.raises(StartupError, match=text):
        served()


def test_what_a_dead_engine_left_behind_deceives_nobody(tmp_path: Path) -> None:
    (tmp_path / "e-0.json").write_bytes(msgspec.json.encode(ENGINE))
    with pytest.raises(StartupError, match="there is no engine on"):
        serve_router(replace(Options(), master_shard_uds_path=str(tmp_path / "e-0")), 0.0)


def test_one_engine_for_each_path(socket: Path) -> None:
    with pytest.raises(StartupError, match="there is an engine on"):
        apart.serve_engine(Options(uds_path=str(socket).removesuffix("-0")), 0.0)
    assert socket.with_name("e-0.json").exists()
