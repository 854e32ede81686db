"""One base model with two adapters: trained separately, used in one batch, and added.

Run it with `python examples/several_tasks.py`.

An adapter holds one task and is activated by its name. In one batch, each row is answered as if its
adapter were the only one. The sum of two adapters is one adapter for both tasks. The example
measures the cost of the sum for each task, and the cost of half of each adapter.

Tasks: a diagnosis → its chapter of ICD-10-CM, and a US address → JSON, each held out by group. The
last printed line is one JSON document.
"""

import json
import os
import time
from typing import Any

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows
STEPS = 2 if SHORT else 32
BATCH_SIZE = 2 if SHORT else 6
ANSWER_TOKENS = 2 if SHORT else 64


def load_tasks() -> dict[str, ml.samples.Task]:
    """Return the two tasks by name."""
    return {
        "icd10": ml.samples.icd10(test_rows=4 if SHORT else 80, train_rows=STEPS * BATCH_SIZE),
        "address": ml.samples.address(test_rows=2 if SHORT else 24),
    }


def measure(model, tokenizer, tasks: dict[str, ml.samples.Task]) -> dict[str, float]:
    """Return the figures of both tasks on the held-out rows.

    Args:
        model: the model, with or without an active adapter.
        tokenizer: its tokenizer.
        tasks: the two tasks by name.
    """
    json_metrics = {"json_valid": ml.samples.json_valid, "field_f1": ml.samples.field_f1}
    with ml.dequantized_weights(model):
        chapter = ml.evaluate(
            model,
            tokenizer,
            tasks["icd10"].test,
            labels=tasks["icd10"].labels,
            max_new_tokens=4,
            batch_size=50,
        )
        address = ml.evaluate(
            model,
            tokenizer,
            tasks["address"].test,
            metrics=json_metrics,
            max_new_tokens=ANSWER_TOKENS,
            batch_size=50,
        )
    return {
        "chapter exact": chapter.exact_match or 0.0,
        "chapter constrained": chapter.label_accuracy or 0.0,
        **address.metrics,
    }


def train_adapter(model, tokenizer, name: str, rows: list) -> None:
    """Add an adapter to the model, activate it and train it.

    Args:
        model: the model; its other adapters and its base do not change.
        tokenizer: its tokenizer.
        name: name of the new adapter.
        rows: training rows.
    """
    config = ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear")
    ml.inject(model, config, name=name)
    ml.set_adapter(model, name)
    training = ml.TrainConfig(
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        warmup_ratio=0.1,
        max_length=160,
    )
    ml.train(model, tokenizer, rows, training)


def answer_in_one_batch(model, tokenizer, tasks: dict[str, ml.samples.Task]) -> None:
    """Answer two prompts of each task in one batch, and print them with the separate answers.

    Args:
        model: a model with one adapter for each task.
        tokenizer: its tokenizer.
        tasks: the two tasks by name.
    """
    adapters = []
    prompts = []
    for name, task in tasks.items():
        for row in task.test[:2]:
            adapters.append(name)
            prompts.append(row["messages"][:-1])
    answers = ml.generate(
        model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, adapters=adapters
    )
    for name, prompt, answer in zip(adapters, prompts, answers, strict=True):
        ml.set_adapter(model, name)
        separate = ml.generate(model, tokenizer, prompt, max_new_tokens=ANSWER_TOKENS)
        print(f"{name:<8} {prompt[-1]['content']!r} → {answer!r}")
        if separate != answer:
            print(f"{'':<8} separately: {separate!r}")


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print one line for each model and one column for each figure."""
    print("\n" + " " * 14, end="")
    for name in table["base"]:
        print(f"{name:>21}", end="")
    print()
    for label, figures in table.items():
        print(f"{label:<14}", end="")
        for value in figures.values():
            print(f"{value:21.3f}", end="")
        print()


def main() -> dict[str, Any]:
    """Run the example and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    started = time.perf_counter()

    # 1. Load one base in 4 bits and two tasks.
    source = ml.samples.smollm2()
    tasks = load_tasks()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    table = {"base": measure(model, tokenizer, tasks)}

    # 2. Train an adapter for each task. Only the active adapter is trained.
    for name, task in tasks.items():
        train_adapter(model, tokenizer, name, task.train)
        table[name] = measure(model, tokenizer, tasks)

    # 3. Use both adapters in one batch.
    answer_in_one_batch(model, tokenizer, tasks)

    # 4. Add the adapters: one adapter of rank 32 holds ΔW of both tasks.
    chapter = ml.AdapterWeights.of(model, "icd10")
    address = ml.AdapterWeights.of(model, "address")
    combinations = {
        "sum": chapter + address,
        "half of each": 0.5 * chapter + 0.5 * address,
    }
    for label, weights in combinations.items():
        name = label.replace(" ", "-")
        weights.put(model, name)
        ml.set_adapter(model, name)
        table[label] = measure(model, tokenizer, tasks)

    # 5. Print the figures, and the baselines of the first task.
    print_table(table)
    rows = tasks["icd10"]
    majority = ml.samples.majority_class(rows.train, rows.test)
    neighbour = ml.samples.nearest_neighbour(rows.train, rows.test)
    print(f"{'majority class':<14}{majority:21.3f}   the most common training answer, no model")
    print(
        f"{'neighbour':<14}{neighbour:21.3f}   chapter of the most similar training row, no model"
    )
    if not SHORT:
        chapters = {name: table[name]["chapter exact"] for name in tasks}
        fields = {name: table[name]["field_f1"] for name in tasks}
        assert chapters["icd10"] > chapters["address"], "Each adapter must be best at its task."
        assert fields["address"] > fields["icd10"], "Each adapter must be best at its task."
    document = {
        "table": table,
        "majority": majority,
        "nearest_neighbour": neighbour,
        "rows_test": {name: len(task.test) for name, task in tasks.items()},
        "steps": STEPS,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
