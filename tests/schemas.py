"""JSON schemas of varied features, made by chance, texts drawn under them, and who judges these."""

import json
import random
import sys
from collections.abc import Callable
from typing import Any

import jsonschema
import jsonschema_rs
import numpy
from llguidance import LLTokenizer

from tgi.core.grammar import start

Schema = dict[str, Any]

NAMES = ["a", "b", "id", "größe", "two words", 'q"', "x/y~z", "$ref", "type", ""]
WORDS = ["", "a", "red", "größe", 'say "hi"', "a\\b", "line\nbreak", "😀", "/", "1", "true"]
PATTERNS = ["^[a-z]+$", "b", "^.{2,5}$", r"^\d{3}-\d{2}$", "^(ab|c)*$", r"\S", r"^\w+@\w+$", "^[^abc]?x", "^(?:a|b)c?$"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
ANNOTATIONS: Schema = {
    "title": "T",
    "description": "d",
    "default": None,
    "examples": [1],
    "deprecated": True,
    "$comment": "",
}


def made(chance: random.Random) -> Schema:
    """A schema of an object that has several of the features."""
    maker = _Maker(chance)
    names = chance.sample(NAMES, chance.randint(1, 4))
    schema = maker.object({name: maker.any(2) for name in names})
    if chance.random() < 0.5:
        schema["additionalProperties"] = False
    if maker.definitions:
        schema["$defs"] = maker.definitions
    return schema


def valid(schema: Schema, text: str) -> bool:
    """Whether the text is JSON that the schema allows, formats included, as two implementations see it."""
    value = json.loads(text, parse_float=_float)
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    strict = jsonschema_rs.validator_for(schema, validate_formats=True)
    return checker.is_valid(value) and strict.is_valid(value)


def draw(tokenizer: LLTokenizer, grammar: str, chance: random.Random, most: int = 300) -> list[int] | None:
    """Tokens of a text, by chance and the grammar alone; None for one that would have more. Ends of strings and objects
    are likelier than chance has them: tokens of text are many."""
    (end,) = tokenizer.eos_tokens
    closing = {token for mark in '"}]' for token in tokenizer.tokenize_str(mark)}
    matcher, ids = start(tokenizer, grammar), list[int]()
    while len(ids) < most:
        mask = numpy.frombuffer(matcher.compute_bitmask(), numpy.uint8)
        allowed = numpy.unpackbits(mask, bitorder="little")[: tokenizer.vocab_size].nonzero()[0].tolist()
        if end in allowed and (len(allowed) == 1 or chance.random() < 0.3):
            return ids
        near = closing.intersection(allowed) if chance.random() < 0.3 else None
        ids.append(chance.choice(sorted(near or set(allowed) - {end})))
        assert matcher.consume_token(ids[-1])
    return None


def _float(text: str) -> float:
    """JSON has numbers of any size; where they are floats of 64 bits the largest stand for what is larger."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.definitions: Schema = {}

    def any(self, depth: int) -> Schema:
        chance = self._chance
        flat = (self.integer, self.number, self.string, self.format, self.choice, self.literal, self.plain)
        deep = (
            self.array,
            self.tuple,
            self.map,
            self.closed,
            self.either,
            self.tagged,
            self.all,
            self.tree,
            self.refined,
        )
        make: Callable[..., Schema] = chance.choice(flat if depth == 0 or chance.random() < 0.4 else deep)
        schema = make() if make in flat else make(depth - 1)
        if chance.random() < 0.15:
            schema |= dict(chance.sample(sorted(ANNOTATIONS.items()), 2))
        return schema

    def integer(self) -> Schema:
        return {"type": "integer"} | self._bounds(lambda: self._chance.randint(-200, 200), multiples=[2, 3, 7, 10])

    def number(self) -> Schema:
        # Multiples that floats can tell.
        return {"type": "number"} | self._bounds(
            lambda: round(self._chance.uniform(-9, 9), 2), multiples=[0.5, 0.25, 2]
        )

    def _bounds(self, value: Callable[[], Any], multiples: list[Any]) -> Schema:
        chance = self._chance
        low, high = sorted((value(), value()))
        schema: Schema = {}
        if chance.random() < 0.5:
            schema[chance.choice(["minimum", "exclusiveMinimum"])] = low
        if chance.random() < 0.5:
            schema[chance.choice(["maximum", "exclusiveMaximum"])] = high
        if chance.random() < 0.3:
            schema["multipleOf"] = chance.choice(multiples)
        return schema

    def string(self) -> Schema:
        chance = self._chance
        schema: Schema = {"type": "string"}
        if chance.random() < 0.5:
            schema["minLength"] = chance.randint(0, 4)
        if chance.random() < 0.6:
            schema["maxLength"] = chance.randint(4, 12)
        if chance.random() < 0.5:
            schema["pattern"] = chance.choice(PATTERNS)
        return schema

    def format(self) -> Schema:
        return {"type": "string", "format": self._chance.choice(FORMATS)}

    def choice(self) -> Schema:
        return {"enum": self._chance.sample([*WORDS, 0, -1.5, 10**15, None, True, [1, "a"], {"k": [False]}, {}], 4)}

    def literal(self) -> Schema:
        return {"const": self._chance.choice([*WORDS, 7, 0.1, None, False, [], ["a", {"b": None}], {"x": {"y": 1.25}}])}

    def plain(self) -> Schema:
        chance = self._chance
        kinds = ["null", "boolean", "integer", "string"]
        return chance.choice([{"type": chance.choice(kinds)}, {"type": chance.sample(kinds, 2)}, {}])

    def array(self, depth: int) -> Schema:
        least = self._chance.randint(0, 2)
        bounds = self._chance.choice([{}, {"minItems": least}, {"minItems": least, "maxItems": least + 2}])
        return {"type": "array", "items": self.any(depth)} | bounds

    def tuple(self, depth: int) -> Schema:
        chance = self._chance
        first = [self.any(depth) for _ in range(chance.randint(1, 3))]
        bounds = chance.choice([{}, {"minItems": 1}, {"minItems": len(first), "maxItems": len(first) + 1}])
        return {"type": "array", "prefixItems": first, "items": chance.choice([False, True, self.any(0)])} | bounds

    def map(self, depth: int) -> Schema:
        chance = self._chance
        schema: Schema = {"type": "object"}
        if chance.random() < 0.5:
            schema["patternProperties"] = {chance.choice(["^x_", "^[a-c]$", "[0-9]"]): self.any(depth)}
        schema["additionalProperties"] = chance.choice([False, self.any(depth)])
        if chance.random() < 0.3:
            schema["minProperties"] = 1
        if chance.random() < 0.3:
            schema["maxProperties"] = chance.randint(1, 3)
        return schema

    def closed(self, depth: int) -> Schema:
        names = self._chance.sample(NAMES, 2)
        return self.object({name: self.any(depth) for name in names}) | {"additionalProperties": False}

    def object(self, properties: Schema) -> Schema:
        chance = self._chance
        required = chance.sample(sorted(properties), chance.randint(0, len(properties)))
        return {"type": "object", "properties": properties, "required": required}

    def either(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self._chance.randint(1, 3))]}

    def tagged(self, depth: int) -> Schema:
        """Exactly one: told apart by a tag."""
        options = [
            {"type": "object", "properties": {"kind": {"const": kind}, "of": self.any(depth)}, "required": ["kind"]}
            for kind in ("first", "second")
        ]
        return {"oneOf": [*options, {"type": "null"}]}

    def all(self, depth: int) -> Schema:
        parts = self._chance.choice(
            [
                [self.integer(), {"minimum": -1000}, {"maximum": 1000}],
                [{"type": "string"}, {"minLength": 1}, {"maxLength": 9}, {"pattern": "[a-z]"}],
                [self.closed(0) | {"additionalProperties": True}, {"properties": {"also": self.any(depth)}}],
            ]
        )
        return {"allOf": parts}

    def tree(self, depth: int) -> Schema:
        """Contains itself."""
        again = {"$ref": "#/$defs/tree"}
        self.definitions["tree"] = {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "left": again, "rest": {"type": "array", "items": again}},
            "required": ["value"],
            "additionalProperties": False,
        }
        return again

    def refined(self, depth: int) -> Schema:
        """A reference, with more beside it."""
        name = f"d{len(self.definitions)}"
        self.definitions[name] = self.integer()
        return {"$ref": f"#/$defs/{name}"} | self._chance.choice([{}, {"maximum": 500}, {"title": "n"}])
