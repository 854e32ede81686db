"""A wish and a function's signature → the call as JSON, scored argument by argument. python examples/tool_calls.py

One idea: a call can be checked without running it: is it one JSON object, and is every argument the
expected value? Three examples in the prompt teach the form too, for nothing, so they stand between
before and after. Every function of the held-out rows is new to the model.

Data: the single-call Python parts of the Berkeley Function Calling Leaderboard, of PyPI's bfcl-eval
(Apache-2.0). The last line printed is one JSON document.
"""

import json
import os
import re
import time
import zipfile

import minilora as ml
from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.task import Row, chat_row, split_by_group

SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
WHEEL = Pin(
    "bfcl-eval", "2026.3.23", FilePin("bfcl_eval-2026.3.23-py3-none-any.whl", 1925664, SHA256)
)
PARTS = ("BFCL_v4_simple_python.json", "BFCL_v4_multiple.json", "BFCL_v4_live_simple.json")
LONGEST = 420  # characters of a question with its signature


def read_calls() -> dict[str, list[Row]]:
    """Function's name → its rows. A value is the first that the data set accepts; "" there means: leave it out."""
    groups: dict[str, list[Row]] = {}
    with zipfile.ZipFile(fetch(WHEEL)) as wheel:
        for part in PARTS:
            asked, answered = (
                [
                    json.loads(line)
                    for line in wheel.read(f"bfcl_eval/data/{folder}{part}").decode().splitlines()
                ]
                for folder in ("", "possible_answer/")
            )
            for row, truth in zip(asked, answered, strict=True):
                ((name, values),) = truth["ground_truth"][0].items()
                function = next(f for f in row["function"] if f["name"] == name)
                properties, needed = (
                    function["parameters"]["properties"],
                    function["parameters"]["required"],
                )
                shown = [
                    f"{p}{'' if p in needed else '?'}: {what['type']}"
                    for p, what in properties.items()
                ]
                call = {
                    p: accepted[0]
                    for p, accepted in values.items()
                    if accepted and "" not in accepted
                }
                question = f"{row['question'][0][-1]['content']}\n{name}({', '.join(shown)})"
                flat = not any(isinstance(value, dict | list) for value in call.values())
                if flat and len(question) <= LONGEST:
                    answer = json.dumps(
                        {"name": name} | call, ensure_ascii=False, separators=(",", ":")
                    )
                    key = re.sub(r"\W|_|\d", "", name.lower())
                    groups.setdefault(key, []).append(chat_row("Call as JSON.", question, answer))
    return groups


def without_name(text: str) -> str:
    """The arguments alone: the name stands in the question, and copying it would count as an argument."""
    try:
        call = json.loads(text)
    except ValueError:
        return text
    return (
        json.dumps({k: v for k, v in call.items() if k != "name"})
        if isinstance(call, dict)
        else text
    )


def argument_f1(prediction: str, reference: str) -> float:
    """F1 over (parameter, value) pairs."""
    return ml.samples.field_f1(without_name(prediction), without_name(reference))


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    source, groups = ml.samples.smollm2(), read_calls()
    train, held_out = split_by_group(list(groups.values()), 4 if short else 80, seed=0)
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)
    print(
        f"{len(train)} calls to train on, {len(held_out)} held out, of {len(groups)} functions; a held-out one:"
    )
    print(*(turn["content"] for turn in held_out[0]["messages"]), sep="\n")

    def measure(rows: list[Row]) -> dict[str, float]:
        metrics = {"json_valid": ml.samples.json_valid, "argument_f1": argument_f1}
        room = 2 if short else 64
        with ml.dequantized_weights(model):
            scores = ml.evaluate(
                model, tokenizer, rows, metrics=metrics, max_new_tokens=room, batch_size=40
            )
        return scores.metrics | {"exact_match": scores.exact_match or 0.0}

    shown = train[0]["messages"] + train[1]["messages"][1:] + train[2]["messages"][1:]
    table = {"before": measure(held_out)}
    table["shots"] = measure([{"messages": shown + row["messages"][1:]} for row in held_out])
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=2 if short else 28,
        per_device_train_batch_size=2 if short else 6,
        learning_rate=1e-3,
        warmup_ratio=0.1,
    )
    result = ml.train(model, tokenizer, train, config)
    table["after"] = measure(held_out)

    print(f"\n{'':<22}{'before':>8}{'3 shots':>8}{'after':>8}")
    for name in table["before"]:
        print(f"{name:<22}" + "".join(f"{found[name]:8.3f}" for found in table.values()))
    neighbour = ml.samples.nearest_neighbour(train, held_out)
    print(
        f"{'nearest neighbour':<22}{'':16}{neighbour:8.3f}   exact match of the most similar training row's call"
    )
    if not short:
        assert (
            table["after"]["argument_f1"]
            > table["shots"]["argument_f1"]
            > table["before"]["argument_f1"]
        )

    document = {
        f"{name}_{when}": value for when, found in table.items() for name, value in found.items()
    }
    document |= {
        "nearest_neighbour": neighbour,
        "rows_train": len(train),
        "rows_test": len(held_out),
    }
    document |= {"steps": result.steps, "tokens_per_second": result.tokens_per_second}
    document |= {"seconds": time.perf_counter() - started}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
