"""The process in which a router tries grammars: each in a fork of its own that may take little time, memory and stack,
so that no grammar, whatever it does to llguidance, harms the router or the engine.

Is asked wishes and answers verdicts, as ``worker`` has it. Knows llguidance; knows no request.
"""

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
from llguidance import LLMatcher, LLTokenizer

from tgi.core.errors import RequestError
from tgi.core.grammar import GrammarError, check, load_tokenizer, spells_all, start
from tgi.core.vocabulary import Vocabulary
from tgi.router.grammar import EXHAUSTED, Question, Verdict, Wish
from tgi.router.schema import INVALID, UNENFORCEABLE, Place, children, enforced, path, pointer
from tgi.router.spelling import composed
from tgi.router.worker import bound, serve

Answer = TypeVar("Answer")

QUICK = 0.05
"""Seconds of processor time at first. Usual grammars take a few thousandths."""
PATIENT = 1.0
"""When no other grammar waits."""
MEMORY = 1 << 28
"""Bytes that a grammar may add to the process."""
STACK = 1 << 22
"""Bytes; less than the engine's threads have."""
WALKS = 4
"""Ways that are tried: one may lead out of the grammar at once, as ``{}`` does."""
STEPS = 4
"""Tokens of each: grammars that are too complex mostly show it at once."""
WALK = 0.1
"""Seconds of processor time for these tokens: masks that take longer would hold up all the engine's requests."""

_MALFORMED = re.compile(r"Invalid type: |Expected |.*\bmust be an? ")
"""How llguidance's messages on what is no JSON schema at all begin; the others are on what it can't enforce."""


class LateError(Exception):
    """Work in a fork has taken its time."""


class DeadError(Exception):
    """Work in a fork has taken more memory or stack than there is for it."""


class Outcome(msgspec.Struct):
    """A verdict, or llguidance's reason against a schema, of which the place is to be found."""

    verdict: Verdict = Verdict()
    reason: str = ""


def tried(tokenizer: LLTokenizer, wish: Wish, *, patient: bool = True, forcing: bool = True) -> Verdict | None:
    """What comes of a grammar; None if it takes longer than the impatient wait. ``forcing``: see ``composed``."""
    seconds = PATIENT if patient else QUICK
    words = UNENFORCEABLE if wish.format == "json_schema" else INVALID
    try:
        outcome = _apart(lambda: _judge(tokenizer, wish, forcing), Outcome, seconds)
    except LateError:
        return Verdict(error=words + EXHAUSTED) if patient else None
    except DeadError:
        return Verdict(error=words + EXHAUSTED)
    if not (reason := outcome.reason):
        return outcome.verdict
    try:
        place = _apart(lambda: _place(tokenizer, wish, reason, seconds / 2), str, seconds)
    except (LateError, DeadError):
        place = path(())
    return Verdict(error=f"{INVALID if _MALFORMED.match(reason) else words}{reason} at `{place}`")


def _judge(tokenizer: LLTokenizer, wish: Wish, forcing: bool) -> Outcome:
    """Compile a grammar, and look whether tokens can follow it."""
    try:
        grammar = composed(wish, forcing=forcing)
    except RequestError as error:
        return Outcome(Verdict(error=error.detail))
    except (RecursionError, ValueError) as error:
        return Outcome(Verdict(error=INVALID + " ".join(str(error).split())))
    reason = _fault(tokenizer, grammar)
    if reason is None:
        return Outcome(Verdict(grammar))
    return Outcome(reason=reason) if wish.format == "json_schema" else Outcome(Verdict(error=INVALID + reason))


def _place(tokenizer: LLTokenizer, wish: Wish, reason: str, seconds: float) -> str:
    """The path of the innermost part of a JSON schema that by itself has this fault, as far as it is found in time."""
    schema = msgspec.json.decode(enforced(msgspec.json.decode(wish.text)))
    beside = {"$defs": {"schema": schema}, "x-guidance": schema.pop("x-guidance")}
    schema.setdefault("$id", "tgi:schema")  # by which the parts refer to one another wherever it lies

    def wrong(place: Place) -> bool:
        part = msgspec.json.encode({"$ref": f"{schema['$id']}#{pointer(place)}", **beside}).decode()
        fault = _fault(tokenizer, LLMatcher.grammar_from_json_schema(part))
        return fault == reason and time.process_time() < seconds

    place: Place = ()
    part = schema
    while inner := next(((place + keys, child) for keys, child in children(part) if wrong(place + keys)), None):
        place, part = inner
    return path(place)


def _fault(tokenizer: LLTokenizer, grammar: str) -> str | None:
    try:
        fresh = start(tokenizer, grammar)
        for seed in range(WALKS):
            _walk(fresh.deep_copy(), random.Random(seed))
    except GrammarError as error:
        return str(error).partition(" while processing ")[0]  # a URI of llguidance's own
    return None


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


def _apart(work: Callable[[], Answer], kind: type[Answer], seconds: float) -> Answer:
    """What comes of work in a fork, within so much processor time. Raises LateError, DeadError."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # it dies without a word
            signal.setitimer(signal.ITIMER_PROF, seconds)
            bound(MEMORY, stack=STACK)
            with os.fdopen(sink, "wb") as stream:
                stream.write(msgspec.msgpack.encode(work()))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        raise LateError
    if status != 0:
        raise DeadError
    return msgspec.msgpack.decode(answer, type=kind)


def main(folder: str, config_path: str, *end_ids: str) -> None:
    """The process: ``python -m tgi.router.trial MODEL_FOLDER TOKENIZER_CONFIG|"" [END_TOKEN_ID …]``."""
    os.nice(10)  # the engine's steps go first
    vocabulary = Vocabulary.load(Path(folder), Path(config_path) if config_path else None)
    error, tokenizer, forcing = "", None, False
    try:
        tokenizer = load_tokenizer(vocabulary, vocabulary.size, [int(id) for id in end_ids])
        forcing = spells_all(tokenizer)
    except GrammarError as failure:
        error = INVALID + str(failure)

    def answer(message: bytes) -> bytes:
        question = msgspec.msgpack.decode(message, type=Question)
        verdict: Verdict | None = Verdict(error=error)
        if tokenizer is not None:
            verdict = tried(tokenizer, question.wish, patient=question.patient, forcing=forcing)
        return msgspec.msgpack.encode(verdict)

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
