"""The OpenAPI document against TGI's: every path that is served, with every field that clients may send."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.router.serving import Router, settings
from tests.tgi_names import TGI_NAMES
from tgi.router.routes import ROUTES
from tgi.router.wire.native import GenerateParameters
from tgi.router.wire.openai import ChatRequest, CompletionRequest


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(settings(tmp_path_factory.mktemp("model")), engine=False) as router:
        yield router


@pytest.fixture(scope="module")
def api(router: Router) -> dict[str, Any]:
    response = router.http.get("/api-doc/openapi.json")
    assert response.headers["content-type"] == "application/json"
    document: dict[str, Any] = response.json()
    return document


def schema(api: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = api["components"]["schemas"][reference["$ref"].removeprefix("#/components/schemas/")]
    return found


def test_routes(api: dict[str, Any]) -> None:
    """TGI's document leaves out the page, the document itself, and two of the three ways to ask for health."""
    documented = {f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods}
    untold = {"GET /", "GET /ping", "GET /docs", "GET /docs/", "GET /api-doc/openapi.json"}
    assert set(TGI_NAMES["routes"]) - untold <= documented
    assert untold.isdisjoint(documented)


@pytest.mark.parametrize(
    "name", [name for name in TGI_NAMES if name.endswith(("Request", "Parameters", "Options")) or name == "Message"]
)
def test_request_fields(api: dict[str, Any], name: str) -> None:
    assert set(TGI_NAMES[name]) <= set(schema(api, {"$ref": f"#/components/schemas/{name}"})["properties"])


@pytest.mark.parametrize("kind", [GenerateParameters, ChatRequest, CompletionRequest])
def test_defaults_are_those_that_are_taken(api: dict[str, Any], kind: Any) -> None:
    """TGI's says of ``details`` that it is true by default."""
    properties = schema(api, {"$ref": f"#/components/schemas/{kind.__name__}"})["properties"]
    taken = msgspec.to_builtins(msgspec.convert({"messages": [], "prompt": "x"}, kind))
    told = {name: told["default"] for name, told in properties.items() if "default" in told}
    assert told == {name: value for name, value in taken.items() if name not in ("messages", "prompt")}


def test_every_reference_leads_somewhere(api: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "$ref")
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from references(item)

    found = set(references(api))
    assert found
    assert {reference.removeprefix("#/components/schemas/") for reference in found} <= set(api["components"]["schemas"])


def test_one_body_of_several(api: dict[str, Any]) -> None:
    operation = api["paths"]["/invocations"]["post"]
    bodies = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [set(schema(api, body)["required"]) for body in bodies] == [{"inputs"}, {"messages"}, {"prompt"}]
    answers = operation["responses"]["200"]["content"]
    assert len(answers["application/json"]["schema"]["anyOf"]) == 3
    _, data = answers["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    assert len(data["contentSchema"]["anyOf"]) == 5
    instance = schema(api, {"$ref": "#/components/schemas/VertexRequest"})["properties"]["instances"]["items"]
    assert [set(schema(api, body)["required"]) for body in instance["anyOf"]] == [{"inputs"}, {"messages"}]


def test_names_in_a_path_are_parameters(api: dict[str, Any]) -> None:
    for path, operations in api["paths"].items():
        for operation in operations.values():
            named = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"]
            assert re.findall(r"{([^}]*)}", path) == named


def test_operations_are_told_apart_and_say_what_they_need(api: dict[str, Any]) -> None:
    operations = [operation for path in api["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for row in ROUTES:
        if row.summary is not None:
            operation = api["paths"][row.path.replace(":path", "")][row.method.lower()]
            assert ("security" in operation) is row.protected
            assert ("text/event-stream" in operation["responses"]["200"].get("content", {})) is (row.event is not None)


def test_dialects_tell_their_own_errors_and_keys(api: dict[str, Any]) -> None:
    def failures(path: str, method: str) -> dict[str, str]:
        responses = api["paths"][path][method]["responses"]
        refs = {status: answer["content"]["application/json"]["schema"] for status, answer in responses.items()}
        return {status: ref["$ref"].rpartition("/")[2] for status, ref in refs.items() if status != "200"}

    found = failures("/v1/messages", "post")
    assert set(found.values()) == {"MessageError"}
    assert {"400", "429", "500", "529"} <= set(found)
    assert not {"415", "422", "424", "503"} & set(found)
    found = failures("/v1/responses", "post")
    assert set(found.values()) == {"OpenAIError"}
    assert {"400", "404", "429", "500", "503"} <= set(found)
    assert not {"415", "422", "424"} & set(found)
    assert "404" in failures("/v1/responses/{response_id}", "delete")
    security = api["paths"]["/v1/messages"]["post"]["security"]
    assert security == [{}, {"api_key": []}, {"x-api-key": []}]
    assert api["components"]["securitySchemes"]["x-api-key"] == {"type": "apiKey", "in": "header", "name": "x-api-key"}


def test_page(router: Router) -> None:
    page = router.http.get("/docs", follow_redirects=True)
    assert page.url.path == "/docs/"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert '"../api-doc/openapi.json"' in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_page_ships_with_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "router/docs.html" in pyproject
