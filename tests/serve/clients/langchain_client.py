"""LangChain's Hugging Face classes: HuggingFaceEndpoint and, on top of it, ChatHuggingFace."""

import asyncio
import sys

from langchain_core.messages import HumanMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

url = sys.argv[1]
endpoint = HuggingFaceEndpoint(
    endpoint_url=url, max_new_tokens=40, temperature=0.01, do_sample=True, seed=1, huggingfacehub_api_token="-"
)
text = endpoint.invoke("The opposite of hot is", stop=["."])
assert "cold" in text.lower(), text
assert not text.endswith(".")
assert "cold" in "".join(endpoint.stream("The opposite of hot is", stop=["."])).lower()
assert "cold" in asyncio.run(endpoint.ainvoke("The opposite of hot is", stop=["."])).lower()

question = [HumanMessage("What is the opposite of hot?")]
chat = ChatHuggingFace(llm=endpoint, model_id="tgi")
answer = chat.invoke(question)
assert "cold" in answer.content.lower(), answer
assert answer.usage_metadata["output_tokens"] > 0
chunks = list(chat.stream(question, stream_usage=True))
assert "cold" in "".join(chunk.content for chunk in chunks).lower()


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


called = chat.bind_tools([get_weather], tool_choice="required").invoke([HumanMessage("What is the weather in Paris?")])
assert [call["name"] for call in called.tool_calls] == ["get_weather"], called
