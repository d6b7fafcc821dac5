"""LiteLLM, by its Hugging Face provider and by its OpenAI-compatible one."""

import sys

import litellm

url = sys.argv[1]
question = [{"role": "user", "content": "What is the opposite of hot?"}]
for model, base in (("huggingface/tgi", url), ("openai/tgi", f"{url}/v1")):
    wish = {"model": model, "api_base": base, "api_key": "-", "messages": question, "temperature": 0, "max_tokens": 40}
    answer = litellm.completion(**wish)
    text = answer.choices[0].message.content
    assert "cold" in text.lower(), answer
    assert answer.usage.completion_tokens > 0
    parts = list(litellm.completion(**wish, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
vectors = litellm.embedding(model="openai/tgi", api_base=f"{url}/v1", api_key="-", input=["hello", "bye"])
assert len(vectors.data) == 2
try:
    litellm.completion(**wish, top_p=7)
except (litellm.exceptions.APIError, litellm.exceptions.BadRequestError) as error:
    assert "top_p" in str(error), error
else:
    raise AssertionError("a `top_p` of 7 was accepted")
