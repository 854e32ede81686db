"""Two adapters served from one base model, with concurrent requests over HTTP.

Run it with `python examples/serving.py`.

Each adapter appears to the clients as a separate model, and costs the server a few megabytes. The
example trains two adapters for two tasks and serves both and their base from one process. It asks
each question three times: the base, the right adapter and the wrong one. Requests for all three
are answered in one batch. The last printed line is one JSON document.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, but every check
FOLDER = Path("out/serving")
STEPS = 4 if SHORT else 120
HELD_OUT = 2 if SHORT else 40  # held-out rows of each task
CLIENTS = 4 if SHORT else 8
ANSWER_TOKENS = {"icd10": 4, "address": 16 if SHORT else 96}  # longest answer of each task


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        task: name of the task.
        row: a held-out row of the task.
        model: name of the model that answers: "base" or an adapter.
    """

    task: str
    row: dict[str, Any]
    model: str


def load_tasks() -> dict[str, ml.samples.Task]:
    """Return the two tasks by name."""
    return {
        "icd10": ml.samples.icd10(test_rows=HELD_OUT, train_rows=STEPS * 8),
        "address": ml.samples.address(test_rows=HELD_OUT),
    }


def train_adapter(source: str, name: str, rows: list) -> None:
    """Train one adapter on a new base model, and save it in a folder with its name.

    Args:
        source: file of the base model.
        name: name of the task and of the adapter.
        rows: training rows.
    """
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=STEPS, per_device_train_batch_size=8, learning_rate=5e-4, save_steps=None
    )
    ml.train(model, tokenizer, rows, config)
    ml.save_adapter(model, FOLDER / name)


@contextmanager
def running_server(source: str) -> Iterator[str]:
    """Run `minilora serve` in a new process, yield its URL, and stop it at the end."""
    command = [sys.executable, "-m", "minilora", "serve", source]
    command += ["--quantize=nf4", "--name=base", "--port=0"]
    command += [f"--adapter={name}={FOLDER / name}" for name in ANSWER_TOKENS]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield wait_for_url(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()  # after an error the server must not keep running


def wait_for_url(process: subprocess.Popen) -> str:
    """Print the server's messages up to the one with its URL, and return the URL."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="")
        if "listens at" in line:
            return line.split()[-1]
    raise SystemExit(f"The server ended with status {process.wait()}.")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a JSON document as an OpenAI client does, and return the JSON answer."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def list_models(url: str) -> list[str]:
    """Return the names of the served models."""
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return [model["id"] for model in json.load(response)["data"]]


def ask(url: str, question: Question) -> str:
    """Return the server's answer to one question."""
    body = {
        "model": question.model,
        "messages": question.row["messages"][:-1],
        "max_tokens": ANSWER_TOKENS[question.task],
        "temperature": 0,
    }
    response = post(f"{url}/v1/chat/completions", body)
    return response["choices"][0]["message"]["content"]


def score(question: Question, answer: str) -> float:
    """Return the exact match of a chapter, or the F1 of the fields of an address."""
    reference = question.row["messages"][-1]["content"]
    if question.task == "icd10":
        return float(answer.strip() == reference)
    return ml.samples.field_f1(answer, reference)


def list_questions(tasks: dict[str, ml.samples.Task], models: list[str]) -> list[Question]:
    """Return every held-out question for every model; neighbours are for different models."""
    questions = []
    for number in range(HELD_OUT):
        for name, task in tasks.items():
            for model in models:
                questions.append(Question(name, task.test[number], model))
    return questions


def score_table(questions: list[Question], answers: list[str]) -> dict[str, dict[str, float]]:
    """Return the mean score for each task and model."""
    scores: dict[str, dict[str, list[float]]] = {}
    for question, answer in zip(questions, answers, strict=True):
        task_scores = scores.setdefault(question.task, {})
        task_scores.setdefault(question.model, []).append(score(question, answer))
    table: dict[str, dict[str, float]] = {}
    for task, task_scores in scores.items():
        table[task] = {}
        for model, values in task_scores.items():
            table[task][model] = sum(values) / len(values)
    return table


def print_table(table: dict[str, dict[str, float]], models: list[str]) -> None:
    """Print one line for each task and one column for each model."""
    print("\n" + " " * 10, end="")
    for model in models:
        print(f"{model:>12}", end="")
    print()
    for task, values in table.items():
        print(f"{task:<10}", end="")
        for model in models:
            print(f"{values[model]:12.3f}", end="")
        print()


def main() -> dict[str, Any]:
    """Train, serve, ask, score; return the printed document."""
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)

    # 1. Train one adapter for each task.
    source = ml.samples.smollm2()
    tasks = load_tasks()
    for name, task in tasks.items():
        train_adapter(source, name, task.train)

    # 2. Send all questions at the same time.
    models = ["base", *ANSWER_TOKENS]
    questions = list_questions(tasks, models)
    with running_server(source) as url:
        assert list_models(url) == models
        first_request = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(partial(ask, url), questions))
        seconds = time.perf_counter() - first_request
        # Without concurrent requests the answer is the same.
        assert ask(url, questions[0]) == answers[0]

    # 3. Score the answers.
    table = score_table(questions, answers)
    print_table(table, models)
    print(f"{HELD_OUT} held-out rows of each task")
    print(f"{len(questions)} questions from {CLIENTS} clients in {seconds:.1f} s")
    document = {
        "scores": table,
        "rows_test": HELD_OUT,
        "steps": STEPS,
        "questions": len(questions),
        "seconds_asking": seconds,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
