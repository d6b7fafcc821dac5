"""Every row of TGI's validation table, with its exact words, its order, and what a valid request becomes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from msgspec.structs import replace

from tests import small_tokenizers
from tests.router.serving import LIMITS
from tgi.core.errors import RequestError
from tgi.router.tokenizer import SHORT, Tokenizer
from tgi.router.validate import Generation, Validator
from tgi.router.wire.grammar import JsonGrammar, RegexGrammar
from tgi.router.wire.native import GenerateParameters


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    return Tokenizer.load(small_tokenizers.write(folder, "llama", tokenizer_config={"eos_token": "</s>"}))


@pytest.fixture(scope="module")
def validator(tokenizer: Tokenizer) -> Validator:
    return Validator(LIMITS, tokenizer)


def run(
    validator: Validator, text: str | list[int] = "hello", *, greedy: bool = False, **parameters: Any
) -> Generation:
    return asyncio.run(validator.validate(text, GenerateParameters(**parameters), greedy=greedy))


def refusal(validator: Validator, text: str | list[int] = "hello", **parameters: Any) -> str:
    with pytest.raises(RequestError) as caught:
        run(validator, text, **parameters)
    assert caught.value.kind.status == 422
    assert caught.value.body["error_type"] == "validation"
    prefix, _, detail = caught.value.message.partition("Input validation error: ")
    assert prefix == ""
    return detail


LONG = "cat " * 101
FAILURES: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"seed": 2**64}, "`seed` must be < 2^64. Given: 18446744073709551616"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"temperature": -0.5}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": 2.1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 100. Given: 0"),
    ({"truncate": 101}, "`truncate` must be strictly positive and less than 100. Given: 101"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"text": ""}, "`inputs` cannot be empty"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"stop": ["a", ""]}, "`stop` must not contain an empty string"),
    ({"logit_bias": {10**6: 1.0}}, "`logit_bias` names token 1000000, which the model doesn't have"),
    ({"logit_bias": {-1: 1.0}}, "`logit_bias` names token -1, which the model doesn't have"),
    ({"logit_bias": {3: -101.0}}, "`logit_bias` must be >= -100.0 and <= 100.0. Given: -101.0 for token 3"),
    ({"adapter_id": "mine"}, "`adapter_id` is not supported"),
    ({"min_p": 1.01}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"min_p": -0.01}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"min_tokens": 4, "max_new_tokens": 3}, "`min_tokens` must be <= `max_new_tokens`. Given: 4 and 3"),
    ({"stop_token_ids": [1] * 65}, "`stop_token_ids` supports up to 64 ids. Given: 65"),
    ({"stop_token_ids": [1, 10**6]}, "`stop_token_ids` names token 1000000, which the model doesn't have"),
    ({"cache_salt": "x" * 257}, "`cache_salt` supports up to 256 characters. Given: 257"),
    ({"text": []}, "`inputs` cannot be empty"),
    ({"text": [1, 10**6]}, "`prompt` names token 1000000, which the model doesn't have"),
    ({"text": [1] * 101}, "`inputs` must have less than 100 tokens. Given: 101"),
    ({"grammar": RegexGrammar(value="a")}, "grammar is not supported"),  # of a validator that takes none
]


@pytest.mark.parametrize(("parameters", "detail"), FAILURES)
def test_refusals(validator: Validator, parameters: dict[str, Any], detail: str) -> None:
    assert refusal(validator, **parameters) == detail


def test_each_check_comes_before_the_next(validator: Validator) -> None:
    """A request with every mistake is told the first of TGI's order; with that one mended, the second; and so on."""
    mistakes = {
        "temperature": 0.0,
        "repetition_penalty": 0.0,
        "frequency_penalty": 3.0,
        "top_p": 0.0,
        "typical_p": 0.0,
        "top_k": 0,
        "max_new_tokens": 0,
        "stop": list("abcde"),
        "seed": 1,  # with best_of
        "top_n_tokens": 6,
        "inputs": "",
        "truncate": 0,
    }
    backwards = dict(reversed(mistakes.items()))
    told = []
    while backwards:
        text = backwards.get("inputs", "hello")
        parameters = {name: value for name, value in backwards.items() if name != "inputs"}
        told.append(refusal(validator, text, best_of=2, do_sample=True, **parameters).split("`")[1])
        del backwards[told[-1]]
    assert told == list(mistakes)
    assert "when `best_of` is > 1" in refusal(validator, "", best_of=2, repetition_penalty=0.0)
    grammar = JsonGrammar(value=3)
    assert "must be <= 200" in refusal(validator, LONG, max_new_tokens=200, grammar=grammar)
    assert "must have less than" in refusal(validator, LONG, grammar=grammar)
    assert refusal(validator, grammar=grammar) == "grammar is not supported"


def test_total_is_judged_by_what_was_asked_not_by_a_chunk_of_it(validator: Validator) -> None:
    given = len(run(validator).token_ids)
    assert refusal(validator, max_new_tokens=5000) == (
        f"`inputs` tokens + `max_new_tokens` must be <= 200. Given: {given} `inputs` tokens and 5000 `max_new_tokens`"
    )
    assert run(validator, max_new_tokens=200 - given).max_new_tokens == 200 - given


def test_too_long_inputs(validator: Validator) -> None:
    given = len(asyncio.run(validator.encode(LONG, add_special_tokens=True)))
    assert given > LIMITS.max_input_tokens
    assert refusal(validator, LONG) == f"`inputs` must have less than 100 tokens. Given: {given}"
    assert "must be <= 200" in refusal(validator, LONG, max_new_tokens=200)


def test_truncate_keeps_the_end(validator: Validator, tokenizer: Tokenizer) -> None:
    generation = run(validator, LONG, truncate=100)
    assert generation.token_ids == tokenizer.encode(LONG, add_special_tokens=True)[-100:]
    assert generation.text == LONG
    assert generation.max_new_tokens == 100


def test_what_is_checked_before_a_request_counts(validator: Validator, tokenizer: Tokenizer) -> None:
    def told(check: Any, **parameters: Any) -> str:
        with pytest.raises(RequestError) as caught:
            check(GenerateParameters(**parameters))
        return caught.value.detail

    assert told(validator.check_best_of, best_of=3) == "`best_of` must be > 0 and <= 2. Given: 3"
    single = Validator(replace(LIMITS, max_best_of=1), tokenizer)
    assert told(single.check_best_of, best_of=2) == "`best_of` != 1 is not allowed for this endpoint"
    for best_of in (0, 2):
        text = "`best_of` != 1 is not supported when streaming tokens"
        assert told(validator.check_stream, best_of=best_of, decoder_input_details=True) == text
    text = "`decoder_input_details` == true is not supported when streaming tokens"
    assert told(validator.check_stream, decoder_input_details=True) == text
    validator.check_best_of(GenerateParameters(best_of=0))
    validator.check_stream(GenerateParameters(best_of=1))


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"temperature": 1.0}, False),
        ({"repetition_penalty": 1.2, "frequency_penalty": 1.0, "seed": 3}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"min_p": 0.1}, True),
        ({"min_p": 0.0}, False),
    ],
)
def test_sampling_only_if_something_asks_for_it(
    validator: Validator, parameters: dict[str, Any], samples: bool
) -> None:
    generation = run(validator, **parameters)
    assert generation.sampling.greedy is not samples
    assert (generation.seed is not None) is samples


def test_greedy_overrides(validator: Validator) -> None:
    sampling = run(validator, greedy=True, do_sample=True, top_k=5, top_p=0.5, seed=3, presence_penalty=1.0).sampling
    assert (sampling.greedy, sampling.top_k, sampling.top_p, sampling.presence_penalty) == (True, 0, 1, 1)


def test_seeds(validator: Validator) -> None:
    assert run(validator, do_sample=True, seed=0).seed == 0
    seeds = {run(validator, do_sample=True).seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)


def test_each_choice_has_a_seed_that_follows_from_the_first(validator: Validator) -> None:
    one, again, other = (run(validator, do_sample=True, seed=seed) for seed in (5, 5, 6))
    assert one.choice(0) is one
    seeds = [generation.choice(index).seed for generation in (one, other) for index in range(8)]
    assert len(set(seeds)) == 16
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)
    assert [again.choice(index).seed for index in range(8)] == seeds[:8]
    assert one.choice(1).token_ids == one.token_ids
    assert run(validator).choice(1) == run(validator)


def test_end_of_text_tokens(validator: Validator) -> None:
    assert run(validator).stop_token_ids == [2]
    assert run(validator, ignore_eos=True).stop_token_ids == []
    assert run(validator, stop_token_ids=[9, 2, 7]).stop_token_ids == [2, 7, 9]
    assert run(validator, stop_token_ids=[9], ignore_eos=True).stop_token_ids == [9]


def test_special_tokens_are_added_only_where_asked(validator: Validator) -> None:
    bare = run(validator, add_special_tokens=False).token_ids
    assert run(validator).token_ids == [1, *bare]


def test_token_ids_are_taken_as_they_are(validator: Validator, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    generation = run(validator, ids)
    assert generation.token_ids == ids
    assert generation.text == "the cat"
    assert run(validator, ids, truncate=1).token_ids == ids[-1:]


def test_nothing_but_the_prompt(validator: Validator) -> None:
    parameters = GenerateParameters(max_new_tokens=0)
    assert asyncio.run(validator.validate("hello", parameters, generates=False)).max_new_tokens == 0
    assert asyncio.run(validator.validate([1] * 100, GenerateParameters(), generates=False)).max_new_tokens == 0


def test_salts_are_kept_apart_and_never_sent_as_they_are(validator: Validator) -> None:
    salts = [run(validator, cache_salt=salt).cache_salt for salt in (None, "", "a", "b")]
    assert salts[:2] == [b"", b""]
    assert len(set(salts)) == 3
    assert all(len(salt) == 32 for salt in salts[2:])


def test_watermark(validator: Validator, tokenizer: Tokenizer) -> None:
    assert run(validator).sampling.watermark is None
    assert run(validator, watermark=True).sampling.watermark == (0.5, 2.0)
    assert run(Validator(LIMITS, tokenizer, (0.25, 3.0)), watermark=True).sampling.watermark == (0.25, 3.0)


def test_a_tokenizer_that_fails(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    model.save(str(tmp_path / "tokenizer.json"))
    validator = Validator(LIMITS, Tokenizer.load(tmp_path))
    assert refusal(validator, "zebra").startswith("tokenizer error ")


def test_long_and_short_texts_get_the_same_tokens(validator: Validator, tokenizer: Tokenizer) -> None:
    text = "cat " * SHORT
    assert asyncio.run(validator.encode(text, add_special_tokens=True)) == tokenizer.encode(
        text, add_special_tokens=True
    )
    assert asyncio.run(validator.spans(text, add_special_tokens=False)) == tokenizer.spans(
        text, add_special_tokens=False
    )
