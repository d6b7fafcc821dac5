"""The OpenAPI document, made from the table of routes and the wire's types, and a page that shows it."""

import functools
import re
from pathlib import Path
from typing import Any

import msgspec

import tgi
from tgi.core.errors import CRASH, GENERATION, INCOMPLETE, OVERLOADED, UNAUTHORIZED, UNAVAILABLE, VALIDATION
from tgi.router.call import Call
from tgi.router.pipeline import Service
from tgi.router.routes import ROUTES, Row
from tgi.router.wire.base import OneOf

_COMPONENT = "#/components/schemas/{name}"

_NO_SLASH = {"pattern": "^[^/]+$"}
_PARAMETER = re.compile(r"{(\w+)(:\w+)?}")
_PAGE = Path(__file__).with_name("docs.html")

_FAILURES = (VALIDATION, GENERATION, OVERLOADED, INCOMPLETE, CRASH, UNAVAILABLE)
"""What a generation can end with."""

_UNREADABLE = {
    400: "The body is no JSON",
    408: "The body took too long to arrive",
    413: "The body is too large",
    415: "The body isn't declared as JSON",
    422: "The body is JSON of another type, or asks for what can't be done",
}
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


async def tell(call: Call, service: Service, _: None) -> None:
    await call.answer(200, document(), "application/json")


async def page(call: Call, service: Service, _: None) -> None:
    await call.answer(200, _PAGE.read_bytes(), "text/html; charset=utf-8")


async def to_page(call: Call, service: Service, _: None) -> None:
    await call.answer(303, headers={"location": "/docs/"})


OWN_ROUTES = (
    Row("GET", "/api-doc/openapi.json", tell),
    Row("GET", "/docs/", page),
    Row("GET", "/docs", to_page),
)


@functools.cache
def document() -> bytes:
    """The document as JSON."""
    rows = [row for row in ROUTES if row.summary is not None]
    types = [
        kind for row in rows for union in (row.body, row.answer, row.event, row.errors.body) for kind in _kinds(union)
    ]
    schemas, components = msgspec.json.schema_components(types, ref_template=_COMPONENT)
    schema_of = dict(zip(types, schemas, strict=True))
    key_headers = {row.key_header for row in rows}
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        paths.setdefault(_PARAMETER.sub(r"{\1}", row.path), {})[row.method.lower()] = _operation(row, schema_of)
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
                "securitySchemes": {
                    "api_key": {"type": "http", "scheme": "bearer"},
                    **{name: {"type": "apiKey", "in": "header", "name": name} for name in filter(None, key_headers)},
                },
            },
        }
    )


def _kinds(kind: Any) -> tuple[Any, ...]:
    return () if kind is None else kind.kinds if isinstance(kind, OneOf) else (kind,)


def _operation(row: Row, schema_of: dict[Any, Any]) -> dict[str, Any]:
    def json(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": schema(kind)}}

    def schema(kind: Any) -> Any:
        kinds = _kinds(kind)
        return {"anyOf": [schema_of[one] for one in kinds]} if len(kinds) > 1 else schema_of[kind]

    def response(description: str, content: dict[str, Any]) -> dict[str, Any]:
        return {"description": description} | ({"content": content} if content else {})

    content = json(row.answer) if row.answer is not None else {}
    if row.event is not None:
        content["text/event-stream"] = {"schema": _event(schema(row.event))}
    if row.path == "/metrics":
        content |= _TEXT
    responses = {200: response("Success", content)}
    for kind in (*(_FAILURES if row.body is not None else ()), *row.failures):
        status = row.errors.statuses.get(kind.status, kind.status)
        responses[status] = response(kind.prefix, json(row.errors.body))
    if row.body is not None:
        for status, description in _UNREADABLE.items():
            status = row.errors.statuses.get(status, status)
            content = responses.get(status, {}).get("content", {}) | (_TEXT if row.errors.plain else {})
            if not row.errors.plain or isinstance(row.errors.body, OneOf):  # to some clients, if not to all
                content |= json(row.errors.body)
            responses[status] = response(description, content)
    if row.protected:
        content = {} if row.errors.plain else json(row.errors.body)
        responses[401] = response(UNAUTHORIZED.prefix, content)
    operation: dict[str, Any] = {
        "tags": ["Text Generation Inference"],
        "summary": row.summary,
        "operationId": row.handler.__name__,
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    if parameters := _PARAMETER.findall(row.path):
        operation["parameters"] = [
            # Starlette's ``path`` takes slashes, too.
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"} | ({} if kind else _NO_SLASH)}
            for name, kind in parameters
        ]
    if row.body is not None:
        operation["requestBody"] = {"content": json(row.body), "required": True}
    if row.protected:
        schemes = ["api_key"] if row.key_header is None else ["api_key", row.key_header]
        operation["security"] = [{}, *({scheme: []} for scheme in schemes)]
    return operation


def _event(schema: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event, as OpenAPI 3.2 describes them: its data is JSON in a string, or the end of the stream."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}, "event": {"type": "string"}},
        "required": ["data"],
    }


if __name__ == "__main__":
    print(msgspec.json.format(document(), indent=2).decode())
