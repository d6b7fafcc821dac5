"""guidellm's benchmark over the completions, chat and responses routes: every request must succeed and be counted."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:]
guidellm = Path(sys.executable).with_name("guidellm")
for route in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(guidellm, "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={url},request_format={route}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", "kind=max_requests,count=6"),
            *("--tokenizer", f"kind=hf_auto,model={model}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
            *("--output", f"kind=json,path={folder}/report.json"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
        report = json.loads(Path(folder, "report.json").read_text())
    for benchmark in report["benchmarks"]:
        totals = benchmark["metrics"]["request_totals"]
        assert totals["successful"] == 6 and not totals["errored"], totals
        tokens = benchmark["metrics"]["output_token_count"]["successful"]
        assert tokens["mean"] == 16, tokens
