"""The OpenAPI document, made from the table of routes and the wire's types, and a page that shows it."""

import functools
from pathlib import Path
from typing import Any

import msgspec

import tgi
from tgi.core.errors import GENERATION, INCOMPLETE, OVERLOADED, UNAVAILABLE, UNHEALTHY, VALIDATION, Kind
from tgi.router.call import Call
from tgi.router.pipeline import Service
from tgi.router.routes import ROUTES, Row
from tgi.router.wire.base import ErrorResponse

_COMPONENT = "#/components/schemas/{name}"

_PAGE = Path(__file__).with_name("docs.html")

_FAILURES = (VALIDATION, GENERATION, OVERLOADED, INCOMPLETE, UNAVAILABLE)
"""What a generation can end with."""


async def document(call: Call, service: Service, _: None) -> None:
    await call.answer(200, _document(), "application/json")


async def page(call: Call, service: Service, _: None) -> None:
    await call.answer(200, _PAGE.read_bytes(), "text/html; charset=utf-8")


async def to_page(call: Call, service: Service, _: None) -> None:
    await call.answer(303, headers={"location": "/docs/"})


OWN_ROUTES = (
    Row("GET", "/api-doc/openapi.json", document),
    Row("GET", "/docs/", page),
    Row("GET", "/docs", to_page),
)


@functools.cache
def _document() -> bytes:
    rows = [row for row in ROUTES if row.summary is not None]
    types = [kind for row in rows for kind in (row.body, row.answer, row.event) if kind is not None]
    schemas, components = msgspec.json.schema_components([*types, ErrorResponse], ref_template=_COMPONENT)
    schema_of = dict(zip([*types, ErrorResponse], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, schema_of)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Text Generation Inference",
                "description": "Text Generation Webserver",
                "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
                "version": tgi.__version__,
            },
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"api_key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _operation(row: Row, schema_of: dict[Any, Any]) -> dict[str, Any]:
    def json(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schema_of[kind]}}

    content = json(row.answer) if row.answer is not None else {}
    if row.event is not None:
        content["text/event-stream"] = {"schema": schema_of[row.event]}
    if row.path == "/metrics":
        content["text/plain"] = {"schema": {"type": "string"}}
    success: dict[str, Any] = {"description": "Success"} | ({"content": content} if content else {})
    failures: tuple[Kind, ...] = _FAILURES if row.body is not None else (UNHEALTHY,) if row.path == "/health" else ()
    operation: dict[str, Any] = {
        "tags": ["Text Generation Inference"],
        "summary": row.summary,
        "operationId": row.handler.__name__,
        "responses": {"200": success}
        | {str(kind.status): {"description": kind.prefix, "content": json(ErrorResponse)} for kind in failures},
    }
    if row.body is not None:
        operation["requestBody"] = {"content": json(row.body), "required": True}
    if row.protected:
        operation["security"] = [{}, {"api_key": []}]
    return operation
