"""guidellm: a short benchmark with synthetic prompts, all of whose requests succeed."""

import json
import subprocess
import sys
from pathlib import Path

url, folder, out = sys.argv[1:]
report = Path(out) / "report.json"
subprocess.run(
    [
        *(Path(sys.executable).parent / "guidellm", "run", "--disable-console"),
        *("--backend", f"kind=openai_http,target={url},model=base"),
        *("--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=3"),
        *("--tokenizer", f"kind=huggingface_auto,model={folder}"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--output", f"kind=json,path={report}"),
    ],
    check=True,
)
(benchmark,) = json.loads(report.read_text())["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert totals["successful"] >= 3 and totals["errored"] == 0, totals
