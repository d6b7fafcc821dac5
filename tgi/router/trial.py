"""The process in which a router tries grammars: each in a fork of its own that may take little time, memory and stack,
so that no grammar, whatever it does to llguidance, harms the router or the engine.

Is asked wishes and answers verdicts, as ``worker`` has it. Knows llguidance; knows no request.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from llguidance import LLMatcher, LLTokenizer

from tgi.core.errors import RequestError
from tgi.core.grammar import GrammarError, check, load_tokenizer, spells_all, start
from tgi.core.vocabulary import Vocabulary
from tgi.router.freeform import lark_of
from tgi.router.grammar import EXHAUSTED, Verdict, Wish
from tgi.router.schema import Place, children, path, pointer
from tgi.router.worker import bound, serve

SECONDS = 1
"""Of processor time. Usual grammars take a few thousandths of it."""
MEMORY = 1 << 28
"""Bytes that a grammar may add to the process."""
STACK = 1 << 22
"""Bytes; less than the engine's threads have."""
WALKS = 4
"""Ways that are tried: one may lead out of the grammar at once, as ``{}`` does."""
STEPS = 4
"""Tokens of each: grammars that are too complex mostly show it at once."""
SEARCH = 0.5
"""Of it for finding what is wrong."""
WALK = 0.1
"""Seconds of processor time for these tokens: masks that take longer would hold up all the engine's requests."""


def judge(tokenizer: LLTokenizer, wish: Wish, *, forcing: bool = True) -> Verdict:
    """Compile a grammar, and look whether tokens can follow it. ``forcing``: see ``composed``."""
    try:
        grammar = composed(wish, forcing=forcing)
    except (RecursionError, RequestError, ValueError) as failure:
        reason = failure.detail if isinstance(failure, RequestError) else str(failure)
        return Verdict(error=" ".join(reason.split()))
    error = _error(tokenizer, grammar)
    return Verdict(grammar) if error is None else Verdict(error=error)


def locate(tokenizer: LLTokenizer, wish: Wish, error: str) -> str:
    """The path of the innermost part of a JSON schema that by itself has this error, as far as it is found in time."""
    schema = msgspec.json.decode(wish.text)
    guidance = schema.pop("x-guidance", {})
    schema.setdefault("$id", "tgi:schema")  # by which the parts refer to one another wherever it lies

    def wrong(place: Place) -> bool:
        reference = f"{schema['$id']}#{pointer(place)}"
        part = {"$ref": reference, "$defs": {"schema": schema}, "x-guidance": guidance}
        wish = Wish("json_schema", msgspec.json.encode(part).decode())
        return time.process_time() < SEARCH and _error(tokenizer, composed(wish)) == error

    place: Place = ()
    part = schema
    while inner := next(((place + keys, child) for keys, child in children(part) if wrong(place + keys)), None):
        place, part = inner
    return path(place)


def _error(tokenizer: LLTokenizer, grammar: str) -> str | None:
    try:
        fresh = start(tokenizer, grammar)
        for seed in range(WALKS):
            _walk(fresh.deep_copy(), random.Random(seed))
    except GrammarError as error:
        return str(error).partition(" while processing ")[0]  # a URI of llguidance's own
    return None


class Part(msgspec.Struct):
    """One of the grammars that make up one; the first is where a text begins."""

    name: str | None = None
    lark_grammar: str | None = None
    json_schema: msgspec.Raw | None = None


class Parts(msgspec.Struct):
    grammars: list[Part]


def composed(wish: Wish, *, forcing: bool = True) -> str:
    """The grammar as llguidance reads it. Raises ValueError for what is no grammar.

    ``forcing``: where all that can follow is one text, its tokens are the tokenizer's. Not for vocabularies that don't
    spell every text: there the tokens of a longer text may do what those of the one can't.
    """
    text = wish.text
    if wish.format == "llguidance" and not wish.frame and forcing:
        return text
    match wish.format:
        case "json_schema":
            parts = [Part(json_schema=msgspec.Raw(text.encode()))]
        case "regex":
            parts = msgspec.json.decode(LLMatcher.grammar_from_regex(text), type=Parts).grammars
        case "choice":
            # As one terminal: of alternatives in a rule there can be 2000.
            options = " | ".join(map(json.dumps, msgspec.json.decode(text, type=list[str])))
            parts = [Part(lark_grammar=f"start: CHOICE\nCHOICE: {options}")]
        case "grammar":
            parts = [Part(lark_grammar=lark_of(text))]
        case "llguidance" if text.startswith("{"):
            parts = msgspec.json.decode(text, type=Parts).grammars
        case "llguidance":
            parts = [Part(lark_grammar=text)]
    if wish.frame:
        parts[0].name = "answer"
        parts.insert(0, Part("frame", wish.frame))
    if not forcing:
        first = parts[0]
        lark = first.lark_grammar or f"start: %json {bytes(first.json_schema or b'{}').decode()}"
        parts[0] = Part(first.name, f'%llguidance {{"no_forcing": true}}\n{lark}')
    return msgspec.json.encode(Parts(parts)).decode()


def _walk(matcher: LLMatcher, chance: random.Random) -> None:
    """Follow some tokens, the same ones for the same ``chance``. Raises GrammarError where that leads nowhere."""
    begin = time.process_time()
    for _ in range(STEPS):
        mask = matcher.compute_bitmask()
        check(matcher)
        at = chance.choice([at for at, byte in enumerate(mask) if byte])
        matcher.consume_token(8 * at + chance.choice([bit for bit in range(8) if mask[at] >> bit & 1]))
        check(matcher)
        if time.process_time() - begin > WALK:
            raise GrammarError("its tokens take too long to find")
        if matcher.is_stopped():
            return


def _apart(work: Callable[[], msgspec.Struct | str]) -> bytes:
    """What comes of work in a fork, in MessagePack; nothing if it was too much."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # it dies without a word
            bound(MEMORY, cpu=SECONDS, stack=STACK)
            with os.fdopen(sink, "wb") as stream:
                stream.write(msgspec.msgpack.encode(work()))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else b""


def tried(tokenizer: LLTokenizer, wish: Wish, *, forcing: bool = True) -> Verdict:
    """``judge`` and ``locate``, each in a fork."""
    answer = _apart(lambda: judge(tokenizer, wish, forcing=forcing))
    if not answer:
        return Verdict(error=EXHAUSTED)
    verdict = msgspec.msgpack.decode(answer, type=Verdict)
    if verdict.error and wish.format == "json_schema":
        place = _apart(lambda: locate(tokenizer, wish, verdict.error))
        if place:
            verdict = msgspec.structs.replace(verdict, path=msgspec.msgpack.decode(place, type=str))
    return verdict


def main(folder: str, config_path: str, *end_ids: str) -> None:
    """The process: ``python -m tgi.router.trial MODEL_FOLDER TOKENIZER_CONFIG|"" [END_TOKEN_ID …]``."""
    vocabulary = Vocabulary.load(Path(folder), Path(config_path) if config_path else None)
    error, tokenizer, forcing = "", None, False
    try:
        tokenizer = load_tokenizer(vocabulary, vocabulary.size, [int(id) for id in end_ids])
        forcing = spells_all(tokenizer)
    except GrammarError as failure:
        error = str(failure)

    def answer(question: bytes) -> bytes:
        wish = msgspec.msgpack.decode(question, type=Wish)
        verdict = Verdict(error=error) if tokenizer is None else tried(tokenizer, wish, forcing=forcing)
        return msgspec.msgpack.encode(verdict)

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
