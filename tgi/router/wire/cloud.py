"""The wire of clouds: Vertex AI's predictions and the KServe v2 protocol as TGI speaks it. Types only."""

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

from tgi.router.wire.base import OneOf
from tgi.router.wire.native import CompatGenerateRequest, GenerateParameters, GenerateRequest
from tgi.router.wire.openai import ChatRequest, CompletionRequest

U8 = Annotated[int, Meta(ge=0, le=255)]

INVOCATION = OneOf((CompatGenerateRequest, ChatRequest, CompletionRequest), "SagemakerRequest")
INSTANCE = OneOf((GenerateRequest, ChatRequest), "VertexInstance")

_INSTANCE_SCHEMA = {"anyOf": [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in INSTANCE.kinds]}


class VertexRequest(Struct, frozen=True):
    instances: list[Annotated[Raw, Meta(extra_json_schema=_INSTANCE_SCHEMA)]]
    """Each is an INSTANCE."""


class VertexResponse(Struct, frozen=True):
    predictions: list[str]


class InferInput(Struct, frozen=True, kw_only=True):
    """A prompt as a tensor. Its name, shape and type say nothing that its data don't."""

    name: str
    shape: list[Annotated[int, Meta(ge=0)]]
    datatype: str
    data: list[U8]
    """The bytes of the text in UTF-8."""


class InferRequestedOutput(Struct, frozen=True):
    name: str


class InferRequest(Struct, frozen=True, kw_only=True):
    id: str
    inputs: list[InferInput]
    outputs: list[InferRequestedOutput]
    """As many as inputs: what the answer to each is called."""
    parameters: GenerateParameters = GenerateParameters(do_sample=True)  # TGI: as on /generate


class InferOutput(Struct, frozen=True, kw_only=True):
    name: str
    shape: tuple[int, int]
    datatype: Literal["BYTES"] = "BYTES"
    data: list[U8]


class InferResponse(Struct, frozen=True):
    id: str
    outputs: list[InferOutput]


class Live(Struct, frozen=True):
    live: bool


class Metadata(Struct, frozen=True):
    """Of the server or of a model."""

    name: str
    version: str
    extensions: list[str]
