"""TGI's own Python client."""

import asyncio
import json
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError

url = sys.argv[1]
question = [{"role": "user", "content": "What is the opposite of hot?"}]
client = Client(url, timeout=60)

answer = client.generate("The opposite of hot is", max_new_tokens=8)
events = list(client.generate_stream("The opposite of hot is", max_new_tokens=8))
assert answer.generated_text == "".join(event.token.text for event in events) == events[-1].generated_text != ""
assert answer.details.generated_tokens == len(events) == 8
full = client.generate("The opposite of hot is", max_new_tokens=8, return_full_text=True)
assert full.generated_text == "The opposite of hot is" + answer.generated_text
best = client.generate("Hello", max_new_tokens=4, best_of=2, do_sample=True)
assert len(best.details.best_of_sequences) == 1
top = client.generate("Hello", max_new_tokens=4, top_n_tokens=3, decoder_input_details=True)
assert [len(tokens) for tokens in top.details.top_tokens] == [3] * 4
assert top.details.prefill[0].logprob is None

chat = client.chat(question, max_tokens=40, temperature=0.0)
assert "cold" in chat.choices[0].message.content.lower()
parts = []
try:
    for part in client.chat(question, max_tokens=40, temperature=0.0, stream=True):
        parts.append(part)
except json.JSONDecodeError as error:
    # This client can't read the [DONE] with which TGI, too, ends a chat's stream; every chunk has arrived by then.
    assert error.doc.strip() == "[DONE]"
assert "".join(part.choices[0].delta.content or "" for part in parts) == chat.choices[0].message.content
assert parts[-1].choices[0].finish_reason == chat.choices[0].finish_reason

try:
    client.generate("x", temperature=0.5, max_new_tokens=10**6)
except ValidationError as error:
    assert "max_new_tokens" in str(error)
else:
    raise AssertionError("a million tokens were promised")


async def stream() -> int:
    return len([event async for event in AsyncClient(url).generate_stream("One two", max_new_tokens=5)])


assert asyncio.run(stream()) == 5
