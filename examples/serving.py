"""Two adapters served from one base, asked over HTTP at the same time. python examples/serving.py

One idea: an adapter is a model of its own to whoever asks, and a few megabytes to the server. So
train two for two tasks, serve both beside their base from one process, and ask each question three
times: the base, the right adapter, the wrong one. Requests for all three run in one batch. The last
line printed is one JSON document.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, every check
FOLDER = Path("out/serving")
STEPS, HELD_OUT, CLIENTS = (4, 2, 4) if SHORT else (120, 40, 8)
TOKENS = {"icd10": 4, "address": 16 if SHORT else 96}  # of an answer


def tasks() -> dict[str, ml.samples.Task]:
    return {
        "icd10": ml.samples.icd10(test_rows=HELD_OUT, train_rows=STEPS * 8),
        "address": ml.samples.address(test_rows=HELD_OUT),
    }


def train(source: str, name: str, rows: ml.samples.Task) -> None:
    """One adapter, on a base of its own for as long as it learns."""
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=STEPS, per_device_train_batch_size=8, learning_rate=5e-4, save_steps=None
    )
    ml.train(model, tokenizer, rows.train, config)
    ml.save_adapter(model, FOLDER / name)


@contextmanager
def serving(source: str) -> Iterator[str]:
    """`minilora serve` in a process of its own, for as long as it is needed; it says where it listens."""
    command = [
        sys.executable,
        "-m",
        "minilora",
        "serve",
        source,
        "--quantize=nf4",
        "--name=base",
        "--port=0",
    ]
    command += [f"--adapter={name}={FOLDER / name}" for name in TOKENS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            print(line, end="")
            if "listens at" in line:
                yield line.split()[-1]
                break
        else:
            raise SystemExit(f"the server ended with status {process.wait()}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()  # whatever went wrong, it does not stay


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """What any client of OpenAI's interface sends; here without one."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def score(task: str, said: str, row: dict[str, Any]) -> float:
    """Whether the chapter is right; how much of the address is."""
    expected = row["messages"][-1]["content"]
    return (
        float(said.strip() == expected) if task == "icd10" else ml.samples.field_f1(said, expected)
    )


def main() -> dict[str, Any]:
    """Train, serve, ask; returns the document it prints."""
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    source, rows = ml.samples.smollm2(), tasks()
    for name, task in rows.items():
        train(source, name, task)

    # Everything is asked at once, in an order in which neighbours want different models.
    models = ["base", *TOKENS]
    jobs = [(task, row, model) for pair in zip(*(t.test for t in rows.values()), strict=True)
            for task, row in zip(rows, pair, strict=True) for model in models]  # fmt: skip

    def ask(url: str, job: tuple[str, dict[str, Any], str]) -> str:
        task, row, model = job
        body = {
            "model": model,
            "messages": row["messages"][:-1],
            "max_tokens": TOKENS[task],
            "temperature": 0,
        }
        return post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]

    with serving(source) as url:
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == models
        begun = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(partial(ask, url), jobs))
        seconds = time.perf_counter() - begun
        assert ask(url, jobs[0]) == answers[0]  # who else asks changes nothing

    table: dict[str, dict[str, float]] = {task: {} for task in rows}
    print(f"\n{'':<10}" + "".join(f"{model:>12}" for model in models))
    for task in rows:
        for model in models:
            asked = [
                (said, job[1])
                for job, said in zip(jobs, answers, strict=True)
                if (job[0], job[2]) == (task, model)
            ]
            found = [score(task, said, row) for said, row in asked]
            table[task][model] = sum(found) / len(found)
        print(f"{task:<10}" + "".join(f"{value:12.3f}" for value in table[task].values()))
    print(
        f"{HELD_OUT} rows held out of each task; {len(jobs)} questions by {CLIENTS} clients in {seconds:.1f} s"
    )
    document = {"scores": table, "rows_test": HELD_OUT, "steps": STEPS, "questions": len(jobs)}
    document |= {"seconds_asking": seconds, "seconds": time.perf_counter() - started}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
