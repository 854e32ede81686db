"""A request and a function's signature → the function call as JSON, scored argument by argument.

Run it with `python examples/tool_calls.py`.

A call can be checked without running it: the answer must be one JSON object, and each argument must
have the expected value. Three examples in the prompt also teach the form, without any training, so
the table shows them between "before" and "after". No function of the held-out rows is in the
training rows.

Data: the single-call Python parts of the Berkeley Function Calling Leaderboard, from PyPI's
bfcl-eval (Apache-2.0). The last printed line is one JSON document.
"""

import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import minilora as ml

SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
WHEEL = ml.samples.Pin(
    "bfcl-eval",
    "2026.3.23",
    ml.samples.FilePin("bfcl_eval-2026.3.23-py3-none-any.whl", 1925664, SHA256),
)
PARTS = ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json", "BFCL_v4_live_simple.json")
LONGEST = 420  # characters of a question with its signature


def read_lines(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    """Return the JSON documents of one file of the wheel, one a line."""
    text = wheel.read(f"bfcl_eval/data/{name}").decode()
    return [json.loads(line) for line in text.splitlines()]


def read_questions() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each row of the data set with its accepted call."""
    with zipfile.ZipFile(ml.samples.fetch(WHEEL)) as wheel:
        for part in PARTS:
            rows = read_lines(wheel, part)
            solutions = read_lines(wheel, f"possible_answer/{part}")
            for row, solution in zip(rows, solutions, strict=True):
                yield row, solution["ground_truth"][0]


def signature(function: dict[str, Any]) -> str:
    """Return a function's signature as text; a question mark marks an optional parameter."""
    parameters = function["parameters"]
    shown = []
    for name, description in parameters["properties"].items():
        mark = "" if name in parameters["required"] else "?"
        shown.append(f"{name}{mark}: {description['type']}")
    return f"{function['name']}({', '.join(shown)})"


def first_accepted(values: dict[str, list]) -> dict[str, Any]:
    """Return the first accepted value of each argument.

    The data set lists the accepted values of an argument. "" in the list means that the argument
    may be left out, and then it is left out here.
    """
    arguments = {}
    for name, accepted in values.items():
        if accepted and "" not in accepted:
            arguments[name] = accepted[0]
    return arguments


def has_nested_value(arguments: dict[str, Any]) -> bool:
    """Return True if an argument is a list or an object."""
    return any(isinstance(value, dict | list) for value in arguments.values())


def read_calls() -> dict[str, list[ml.samples.Row]]:
    """Return the chat rows of each function, by the function's name without digits and signs."""
    groups: dict[str, list[ml.samples.Row]] = {}
    for row, call in read_questions():
        ((name, values),) = call.items()  # a single call
        arguments = first_accepted(values)
        functions = {function["name"]: function for function in row["function"]}
        request = row["question"][0][-1]["content"]
        question = f"{request}\n{signature(functions[name])}"
        if has_nested_value(arguments) or len(question) > LONGEST:
            continue
        answer = json.dumps({"name": name, **arguments}, ensure_ascii=False, separators=(",", ":"))
        key = re.sub(r"\W|_|\d", "", name.lower())
        rows = groups.setdefault(key, [])
        rows.append(ml.samples.chat_row("Call as JSON.", question, answer))
    return groups


def without_name(text: str) -> str:
    """Return a call without its function name, or the text itself if it is not a JSON object.

    The name is part of the question. If it counted, a copy of it would count as a right argument.
    """
    try:
        call = json.loads(text)
    except ValueError:
        return text
    if not isinstance(call, dict):
        return text
    call.pop("name", None)
    return json.dumps(call)


def argument_f1(prediction: str, reference: str) -> float:
    """Return F1 over the (parameter, value) pairs of two calls."""
    return ml.samples.field_f1(without_name(prediction), without_name(reference))


def add_examples(rows: list[ml.samples.Row], examples: list[ml.samples.Row]) -> list:
    """Return the rows with solved examples in front of each question."""
    shown = examples[0]["messages"][:1]  # the system turn
    for example in examples:
        shown = shown + example["messages"][1:]
    return [{"messages": shown + row["messages"][1:]} for row in rows]


def main() -> dict:
    """Run the example and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    started = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))

    # 1. Load the calls and a model in 4 bits.
    source = ml.samples.smollm2()
    groups = read_calls()
    test_rows = 4 if short else 80
    train, held_out = ml.samples.split_by_group(list(groups.values()), test_rows, seed=0)
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    print(f"{len(groups)} functions: {len(train)} training calls, {len(held_out)} held-out calls.")
    print("The first held-out call:")
    for turn in held_out[0]["messages"]:
        print(turn["content"])

    def measure(rows: list[ml.samples.Row]) -> dict[str, float]:
        metrics = {"json_valid": ml.samples.json_valid, "argument_f1": argument_f1}
        answer_tokens = 2 if short else 64
        with ml.dequantized_weights(model):
            scores = ml.evaluate(
                model, tokenizer, rows, metrics=metrics, max_new_tokens=answer_tokens, batch_size=40
            )
        return {**scores.metrics, "exact_match": scores.exact_match or 0.0}

    # 2. Measure the base model, without and with three examples in the prompt.
    before = measure(held_out)
    shots = measure(add_examples(held_out, train[:3]))

    # 3. Train an adapter, and measure again.
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=2 if short else 28,
        per_device_train_batch_size=2 if short else 6,
        learning_rate=1e-3,
        warmup_ratio=0.1,
    )
    result = ml.train(model, tokenizer, train, config)
    after = measure(held_out)

    # 4. Print the figures and the baseline.
    print(f"\n{'':<22}{'before':>8}{'3 shots':>8}{'after':>8}")
    for name in before:
        print(f"{name:<22}{before[name]:8.3f}{shots[name]:8.3f}{after[name]:8.3f}")
    neighbour = ml.samples.nearest_neighbour(train, held_out)
    print(f"{'nearest neighbour':<22}{neighbour:24.3f}   exact match of the nearest row's call")
    if not short:
        assert after["argument_f1"] > shots["argument_f1"]
        assert shots["argument_f1"] > before["argument_f1"]

    document = {}
    for time_of_measurement, figures in (("before", before), ("shots", shots), ("after", after)):
        for name, value in figures.items():
            document[f"{name}_{time_of_measurement}"] = value
    document |= {
        "nearest_neighbour": neighbour,
        "rows_train": len(train),
        "rows_test": len(held_out),
        "steps": result.steps,
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
