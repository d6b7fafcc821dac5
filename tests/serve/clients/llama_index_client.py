"""LlamaIndex's HuggingFaceInferenceAPI."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI

url = sys.argv[1]
for task in ("conversational", "text-generation"):
    model = HuggingFaceInferenceAPI(model_name=url, task=task, temperature=0.01, num_output=40, token="-")
    answer = model.chat([ChatMessage(role="user", content="What is the opposite of hot?")])
    assert "cold" in answer.message.content.lower(), answer
    completed = model.complete("The opposite of hot is")
    assert "cold" in completed.text.lower(), completed
    parts = list(model.stream_chat([ChatMessage(role="user", content="What is the opposite of hot?")]))
    assert "cold" in parts[-1].message.content.lower()
    parts = list(model.stream_complete("The opposite of hot is"))
    assert "cold" in parts[-1].text.lower()
# It reads the room from /info.
assert HuggingFaceInferenceAPI(model_name=url, token="-").context_window > 1000
