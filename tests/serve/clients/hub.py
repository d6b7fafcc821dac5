"""huggingface_hub's InferenceClient, in whichever version the environment holds."""

import sys

from huggingface_hub import InferenceClient

url = sys.argv[1]
question = [{"role": "user", "content": "What is the opposite of hot?"}]

chat = InferenceClient(base_url=url)
answer = chat.chat_completion(question, temperature=0, max_tokens=40)
text = answer.choices[0].message.content
assert "cold" in text.lower(), text
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
parts = list(chat.chat_completion(question, temperature=0, max_tokens=40, stream=True))
assert "".join(part.choices[0].delta.content or "" for part in parts) == text
assert parts[-1].choices[0].finish_reason == answer.choices[0].finish_reason
scored = chat.chat_completion(question, temperature=0, max_tokens=5, logprobs=True, top_logprobs=2)
assert [len(entry.top_logprobs) for entry in scored.choices[0].logprobs.content] == [2] * 5
tools = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
weather = [{"role": "user", "content": "What is the weather in Paris?"}]
called = chat.chat_completion(weather, tools=tools, tool_choice="required", temperature=0, max_tokens=60)
(call,) = called.choices[0].message.tool_calls
assert call.function.name == "get_weather"
assert called.choices[0].finish_reason == "tool_calls"
schema = {"type": "object", "properties": {"answer": {"type": "string", "maxLength": 20}}, "required": ["answer"]}
shaped = chat.chat_completion(question, response_format={"type": "json", "value": schema}, temperature=0, max_tokens=60)
assert shaped.choices[0].message.content.startswith("{")

client = InferenceClient(model=url)
wish = {"prompt": "The opposite of hot is", "max_new_tokens": 8}
# A model without a pipeline tag answers the base URL with the whole text, as TGI does, unless told otherwise.
assert client.text_generation(**wish).startswith("The opposite of hot is cold")
text = client.text_generation(**wish, return_full_text=False)
details = client.text_generation(**wish, return_full_text=False, details=True)
assert (details.generated_text, details.details.generated_tokens) == (text, 8)
assert details.details.finish_reason == "length"
scored = client.text_generation(**wish, details=True, decoder_input_details=True)
assert scored.details.prefill[0].logprob is None
assert all(token.logprob < 0 for token in scored.details.prefill[1:])
events = list(client.text_generation(**wish, return_full_text=False, details=True, stream=True))
assert "".join(event.token.text for event in events) == text == events[-1].generated_text
assert events[-1].details.generated_tokens == 8
assert client.text_generation("1 2 3 4 5 6 7", max_new_tokens=40, stop=["12"]).endswith("12")

for bad in ({"top_p": 2.0}, {"max_new_tokens": 10**6}):
    try:
        client.text_generation("x", **bad)
    except Exception as error:
        assert next(iter(bad)) in str(error), error
    else:
        raise AssertionError(f"{bad} was accepted")

# These two want to be told which provider it is, as if there were others behind a URL.
hosted = InferenceClient(provider="hf-inference")
if hasattr(hosted, "get_endpoint_info"):
    assert hosted.get_endpoint_info(model=url)["max_input_tokens"] > 0
if hasattr(hosted, "health_check"):
    assert hosted.health_check(model=url)
