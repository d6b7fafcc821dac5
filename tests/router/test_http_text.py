"""The same tokens are the same text on every route, streamed or whole, whatever the tokenizer."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import small_tokenizers
from tests.router.serving import Router, events, settings

KINDS = ["byte_level", "byte_level_added", "llama", "unigram_bytes", "word_piece"]
SPOKEN = "the cat 😀 größe; 你好 dog </s>"
"""What the model says, its end included: tokens for a word, and several for a character."""


@pytest.fixture(scope="module", params=KINDS)
def router(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    made = settings(tmp_path_factory.mktemp("model"))
    small_tokenizers.write(tmp_path_factory.getbasetemp() / made.model.folder, request.param)
    with Router(made) as router:
        yield router


def whole_and_streamed(router: Router, route: str, fields: dict[str, Any]) -> tuple[str, str]:
    """The answer's text as it comes at once, and as the sum of what a stream's events add."""

    def ask(stream: bool) -> Any:
        response = router.http.post(path, json={**body, **({"stream": True} if stream and route != "generate" else {})})
        assert response.status_code == 200, response.text
        return [event for event in events(response.content) if event != "[DONE]"] if stream else response.json()

    match route:
        case "generate":
            body = {"inputs": "hello", "parameters": fields}
            path = "/generate"
            whole = ask(False)["generated_text"]
            path = "/generate_stream"
            said = ask(True)
            shown = (event["token"] for event in said)
            text = "".join(
                token["text"] for token in shown if not token["special"] or not fields["skip_special_tokens"]
            )
            assert said[-1]["generated_text"] == whole
            return whole, text
        case "completions":
            body, path = {"prompt": "hello", **fields}, "/v1/completions"
            return ask(False)["choices"][0]["text"], "".join(one["choices"][0]["text"] for one in ask(True))
        case _:
            body = {"messages": [{"role": "user", "content": "hello"}], **fields}
            path = "/v1/chat/completions"
            deltas = (one["choices"][0]["delta"]["content"] or "" for one in ask(True))
            return ask(False)["choices"][0]["message"]["content"], "".join(deltas)


@pytest.mark.parametrize("route", ["generate", "completions", "chat"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", [[], ["at"], ["ö", "😀"], [" dog"], ["t", "the cat"], ["never"]])
def test_a_stream_s_text_is_the_whole_one_s(router: Router, route: str, skip: bool, stop: list[str]) -> None:
    tokenizer = router.service.tokenizer
    ids = router.says(SPOKEN)
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    native = route == "generate"
    # On OpenAI's routes the token that ends it is as hidden as a stop string.
    shown = ids if native else ids[:-1]
    said = tokenizer.decode([*prompt, *shown], skip_special_tokens=skip)
    text = said.removeprefix(tokenizer.decode(prompt, skip_special_tokens=skip))
    ends = [at + len(one) for one in stop if (at := text.find(one)) >= 0]
    if ends:
        end = min(ends)
        length = max(len(one) for one in stop if text[:end].endswith(one))
        text = text[: end if native else end - length]
    fields = {"stop": stop, "skip_special_tokens": skip, "max_new_tokens" if native else "max_tokens": len(ids)}
    whole, streamed = whole_and_streamed(router, route, fields)
    assert whole == text
    assert streamed == text


def test_a_prompt_of_any_length_keeps_the_first_space(router: Router) -> None:
    """TGI lost it behind prompts of four tokens."""
    cat = router.says("the cat")[-1:]
    router.reply = lambda submit: cat
    alone = router.service.tokenizer.token_bytes(cat[0]).decode()
    for words in range(1, 8):
        answer = router.generate(" ".join(["dog"] * words), max_new_tokens=1).json()
        assert answer["generated_text"] == alone
