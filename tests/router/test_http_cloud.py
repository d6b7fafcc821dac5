"""The clouds' routes: SageMaker, Vertex AI and KServe, over HTTP, against what the routes behind them say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

import tgi
from tests.router.serving import LIMITS, Router, events, settings, until
from tgi.core.messages import Submit

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
INFER = "/v2/models/a%2Fmodel/versions/1/infer"
TYPE_ERROR = "Failed to deserialize the JSON body into the target type: "


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model"))) as router:
        yield router


def error(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()
    return response.status_code, body["error_type"], body["error"]


# --- SageMaker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "hello", "parameters": {"max_new_tokens": 4, "details": True, "return_full_text": True}}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 4, "temperature": 0}),
        ("/v1/completions", {"prompt": ["hello", "world"], "max_tokens": 4, "temperature": 0}),
        ("/", {"inputs": "hello", "parameters": {"temperature": 0.0}}),
        ("/v1/completions", {"prompt": "hello", "suffix": "x"}),
    ],
)
def test_invocations_answers_as_the_route_behind_it(router: Router, path: str, body: dict[str, Any]) -> None:
    router.says("a b c d e</s>")
    here, there = (router.http.post(at, json=body) for at in ("/invocations", path))
    assert here.status_code == there.status_code
    assert here.headers.keys() == there.headers.keys()
    mine, its = here.json(), there.json()
    for answer in (mine, its):
        if isinstance(answer, dict):
            answer.pop("id", None), answer.pop("created", None)
    assert mine == its


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "hello", "parameters": {"max_new_tokens": 3}}),
        ("/v1/chat/completions", CHAT | {"max_tokens": 3}),
        ("/v1/completions", {"prompt": "hello", "max_tokens": 3}),
    ],
)
def test_invocations_streams_as_the_route_behind_it(router: Router, path: str, body: dict[str, Any]) -> None:
    router.says("a b c d e</s>")
    here, there = (router.http.post(at, json=body | {"stream": True}) for at in ("/invocations", path))
    assert here.headers["content-type"] == there.headers["content-type"] == "text/event-stream"
    assert here.headers["x-compute-characters"] == there.headers["x-compute-characters"]
    mine, its = events(here.content), events(there.content)
    assert len(mine) == len(its) >= 3
    assert [type(event) for event in mine] == [type(event) for event in its]
    assert mine[0].keys() == its[0].keys()


def test_invocations_needs_one_of_three_fields(router: Router) -> None:
    response = router.http.post("/invocations", json={"text": "hello"})
    assert response.status_code == 422
    assert response.text == TYPE_ERROR + "data did not match any variant of untagged enum SagemakerRequest"
    assert router.http.post("/invocations", json=["inputs"]).status_code == 422
    assert router.http.post("/invocations", content=b"{", headers={"content-type": "application/json"}).is_client_error


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"inputs": 3}, "inputs"),
        ({"inputs": "x", "parameters": {"top_p": "1"}}, "parameters.top_p"),
        ({"messages": [{"role": 1}]}, "messages[0].role"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"inputs": 3, "prompt": 4}, "inputs"),
    ],
)
def test_invocations_says_what_is_wrong(router: Router, body: dict[str, Any], path: str) -> None:
    response = router.http.post("/invocations", json=body)
    assert response.status_code == 422
    assert response.text.startswith(f"{TYPE_ERROR}{path}: ")


def test_invocations_takes_what_fits(router: Router) -> None:
    """TGI tries all three: a null that one can't take doesn't hide another."""
    response = router.http.post("/invocations", json=CHAT | {"inputs": None, "prompt": None})
    assert response.json()["object"] == "chat.completion"


# --- Vertex AI -------------------------------------------------------------------------------------------------------


def test_vertex_predicts_in_order(router: Router) -> None:
    router.reply = lambda submit: submit.token_ids[: submit.prompt_length]
    texts = ["hello", "world", "a b c"]
    instances: list[dict[str, Any]] = [{"inputs": text, "parameters": {"max_new_tokens": 20}} for text in texts]
    response = router.http.post("/vertex", json={"instances": instances})
    alone = [router.generate(text, max_new_tokens=20).json()["generated_text"] for text in texts]
    assert response.status_code == 200
    assert response.json() == {"predictions": alone}
    assert len(set(alone)) == 3
    assert "x-compute-type" not in response.headers


def test_vertex_honours_all_parameters(router: Router) -> None:
    router.says("a b c d e</s>")
    before = len(router.engine.submits)
    instances = [
        {"inputs": "hello", "parameters": {"top_k": 3, "seed": 7, "stop": ["c"], "return_full_text": True}},
        CHAT | {"temperature": 0, "stop": "c", "logprobs": True},
    ]
    response = router.http.post("/vertex", json={"instances": instances})
    native, chat = response.json()["predictions"]
    assert native.startswith("hello") and native.endswith("c")
    assert chat.strip() == "a b"
    samplings = {submit.sampling.greedy: submit.sampling for submit in router.engine.submits[before:]}
    assert (samplings[False].top_k, samplings[False].seed) == (3, 7)
    assert True in samplings


def test_vertex_samples_as_generate_does(router: Router) -> None:
    for instance, greedy in (({"inputs": "x"}, False), ({"inputs": "x", "parameters": {}}, True)):
        router.http.post("/vertex", json={"instances": [instance]}).raise_for_status()
        assert router.engine.submits[-1].sampling.greedy is greedy


@pytest.mark.parametrize(
    ("instances", "told"),
    [
        ([], (422, "Input validation error", "Input validation error")),
        (
            [{"inputs": "x"}, {"inputs": "x", "parameters": {"top_p": 1.0}}],
            (422, "validation", "Input validation error: `top_p` must be > 0.0 and < 1.0"),
        ),
        (
            [CHAT | {"n": 2}],
            (422, "validation", "Input validation error: `n` must be 1 in an instance: it gets one prediction"),
        ),
        (
            [{"inputs": "x"}] * 9,
            (422, "batch size exceeded", "Number of prompts exceeds the maximum allowed batch size of 8"),
        ),
    ],
)
def test_vertex_tells_the_true_error(
    router: Router, instances: list[dict[str, Any]], told: tuple[int, str, str]
) -> None:
    assert error(router.http.post("/vertex", json={"instances": instances})) == told


def test_vertex_tells_what_the_engine_and_the_permits_say(router: Router) -> None:
    router.reply = lambda submit: "boom"
    response = router.http.post("/vertex", json={"instances": [{"inputs": "x"}]})
    assert error(response) == (424, "generation", "Request failed during generation: Server error: boom")
    router.says("a b</s>")
    two_each = [{"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}] * 5
    assert error(router.http.post("/vertex", json={"instances": two_each})) == (
        429,
        "overloaded",
        "Model is overloaded",
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Object missing required field `instances`"),
        ({"instances": [CHAT, {"prompt": "x"}]}, "instances[1]: data did not match any variant of untagged enum "),
        ({"instances": [{"inputs": "x", "parameters": {"seed": "1"}}]}, "instances[0].parameters.seed: Expected "),
        ({"instances": [3]}, "instances[0]: Expected `object`, got `int`"),
    ],
)
def test_vertex_names_the_instance_that_is_wrong(router: Router, body: dict[str, Any], text: str) -> None:
    response = router.http.post("/vertex", json=body)
    assert response.status_code == 422
    assert response.text.startswith(TYPE_ERROR + text)


def test_one_wrong_instance_ends_the_others(tmp_path: Path) -> None:
    def reply(submit: Submit) -> list[int] | str:
        return "boom" if submit.max_new_tokens == 7 else submit.token_ids * 100

    with Router(settings(tmp_path), delay=0.02) as router:  # the long one would be ready before it could be ended
        router.reply = reply
        instances = [{"inputs": "hello", "parameters": {"max_new_tokens": count}} for count in (150, 7)]
        assert router.http.post("/vertex", json={"instances": instances}).status_code == 424
        (long,) = {submit.id for submit in router.engine.submits if submit.max_new_tokens == 150}
        until(lambda: long in router.engine.cancels)


# --- The routes that Vertex AI names -------------------------------------------------------------------------------


def test_vertex_names_its_own_routes(tmp_path_factory: pytest.TempPathFactory) -> None:
    named = {"aip_predict_route": "/v1/endpoints/7/m:predict", "aip_health_route": "/alive", "api_key": "k"}
    with Router(settings(tmp_path_factory.mktemp("model"), **named)) as router:
        router.says("a b</s>")
        assert router.http.get("/alive").status_code == 200
        body = {"instances": [{"inputs": "x"}]}
        assert router.http.post("/v1/endpoints/7/m:predict", json=body).status_code == 401
        answer = router.http.post("/v1/endpoints/7/m:predict", json=body, headers={"authorization": "Bearer k"})
        assert answer.json() == {"predictions": ["a b"]}
        assert router.http.get("/health").status_code == 200
        assert router.http.post("/vertex", json=body, headers={"authorization": "Bearer k"}).status_code == 200
        paths = router.http.get("/api-doc/openapi.json").json()["paths"]
        assert "/vertex" in paths and not any("alive" in path or "predict" in path for path in paths)


# --- KServe ----------------------------------------------------------------------------------------------------------


def tensor(text: str | bytes, name: str = "in") -> dict[str, Any]:
    data = text.encode() if isinstance(text, str) else text
    return {"name": name, "shape": [1, len(data)], "datatype": "BYTES", "data": list(data)}


def infer(router: Router, *inputs: dict[str, Any], outputs: list[str] | None = None, **fields: Any) -> httpx.Response:
    names = [f"out-{index}" for index in range(len(inputs))] if outputs is None else outputs
    body = {"id": "7", "inputs": inputs, "outputs": [{"name": name} for name in names], **fields}
    return router.http.post(INFER, json=body)


def test_infer_answers_in_order(router: Router) -> None:
    router.reply = lambda submit: submit.token_ids[: submit.prompt_length]
    parameters = {"max_new_tokens": 20}
    texts = ["a b c hello", "hello", "käse"]
    response = infer(router, *map(tensor, texts), parameters=parameters)
    assert response.status_code == 200
    alone = [router.generate(text, **parameters).json()["generated_text"].encode() for text in texts]
    assert response.json() == {
        "id": "7",
        "outputs": [
            {"name": f"out-{i}", "shape": [1, len(data)], "datatype": "BYTES", "data": list(data)}
            for i, data in enumerate(alone)
        ],
    }


def test_infer_takes_outputs_as_tgi_wants_them(router: Router) -> None:
    body = {"id": "7", "inputs": [tensor("x")], "outputs": [tensor("", "out")]}
    assert router.http.post(INFER, json=body).json()["outputs"][0]["name"] == "out"
    assert infer(router).json() == {"id": "7", "outputs": []}


def test_infer_takes_parameters(router: Router) -> None:
    infer(router, tensor("x"), parameters={"max_new_tokens": 3})
    assert router.engine.submits[-1].max_new_tokens == 3 and router.engine.submits[-1].sampling.greedy
    infer(router, tensor("x"))
    assert not router.engine.submits[-1].sampling.greedy


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"ab\xff", "invalid utf-8 sequence of 1 bytes from index 2"),
        (b"\xe2\x82", "invalid utf-8 sequence of 2 bytes from index 0"),
    ],
)
def test_infer_wants_utf8(router: Router, data: bytes, text: str) -> None:
    assert error(infer(router, tensor("x"), tensor(data))) == (422, "utf8", text)


def test_infer_errors(router: Router) -> None:
    mismatch = (422, "length mismatch", "Inputs and outputs length mismatch")
    assert error(infer(router, tensor("x"), outputs=[])) == mismatch
    assert error(infer(router, *[tensor("x")] * 9))[1] == "batch size exceeded"
    assert error(infer(router, tensor("")))[:2] == (422, "validation")
    router.reply = lambda submit: "boom"
    assert error(infer(router, tensor("x")))[:2] == (424, "generation")
    for wrong in ({"data": [256]}, {"data": [-1]}, {"data": "text"}, {"shape": [-1]}, {"name": None}):
        response = infer(router, tensor("x") | wrong)
        assert response.status_code == 422
        assert response.text.startswith(TYPE_ERROR + f"inputs[0].{next(iter(wrong))}")


def test_metadata(router: Router) -> None:
    assert router.http.get("/v2").json() == {
        "name": "text-generation-inference",
        "version": tgi.__version__,
        "extensions": ["health", "models", "metrics"],
    }
    for path in ("/v2/models/a%2Fmodel/versions/2", "/v2/models/a/model/versions/2"):
        assert router.http.get(path).json() == {"name": "a/model", "version": "2", "extensions": ["infer", "ready"]}
    assert router.http.get("/v2/models/a").status_code == 404


def test_readiness_tells_the_truth(tmp_path_factory: pytest.TempPathFactory) -> None:
    ready = ("/v2/health/ready", "/v2/models/m/versions/1/ready")
    with Router(settings(tmp_path_factory.mktemp("model"), replace(LIMITS))) as router:
        for path in (*ready, "/v2/health/live"):
            response = router.http.get(path)
            assert (response.status_code, response.json()) == (200, {"live": True})
        router.engine.die()
        until(lambda: not router.service.client.connected)
        for path in ready:
            assert error(router.http.get(path)) == (503, "healthcheck", "unhealthy")
        assert router.http.get("/v2/health/live").status_code == 200
