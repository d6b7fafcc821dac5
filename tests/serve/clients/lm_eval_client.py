"""lm-eval's local-completions: log-likelihoods by ``echo`` and ``logprobs``. Prints them; the test knows the truth."""

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

url, model, requests = sys.argv[1:]
api = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions",
    pretrained="tgi",
    tokenizer_backend="huggingface",
    tokenizer=model,
    tokenized_requests=True,
    batch_size=2,
)
instances = [
    Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=index)
    for index, pair in enumerate(json.loads(requests))
]
print(json.dumps(api.loglikelihood(instances)))
