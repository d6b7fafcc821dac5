"""The wire of what a generation must spell, in TGI's and OpenAI's shapes. Types only: ``router.grammar`` judges."""

from typing import Any

from msgspec import UNSET, Struct, UnsetType


class NamedSchema(Struct, frozen=True, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: Any = True
    """A JSON schema; without one, any JSON."""
    strict: bool | None = None
    """false: what of the schema can't be enforced is left to the model. Otherwise it is refused."""


class JsonGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="json"):
    value: Any
    """A JSON schema, as itself or in a string."""


class JsonObjectGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Without ``value`` OpenAI's: any JSON object. With it TGI's other name of ``json``."""

    value: Any | UnsetType = UNSET


class JsonSchemaGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """The schema is TGI's ``value`` or OpenAI's ``json_schema``."""

    value: NamedSchema | None = None
    json_schema: NamedSchema | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.json_schema is None):
            raise ValueError("the type `json_schema` needs either `json_schema` or `value`")


class RegexGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="regex"):
    value: str
    """What the whole text must match, in the syntax of Rust's regex crate."""


class ChoiceGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="choice"):
    value: list[str]
    """One of these is the text."""


class FreeGrammar(Struct, frozen=True, kw_only=True, tag_field="type", tag="grammar"):
    value: str
    """A context-free grammar, in llguidance's Lark or in GBNF."""


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    """Anything."""


Grammar = JsonGrammar | JsonObjectGrammar | JsonSchemaGrammar | RegexGrammar | ChoiceGrammar | FreeGrammar

ResponseFormat = Grammar | TextFormat
