"""One base, two adapters: trained apart, answering in one batch, added up. python examples/several_tasks.py

One idea: an adapter is a task that is switched on by name. Two of them in one batch answer as each
alone. Their sum is one adapter that holds both tasks, and what that costs each of them is measured,
with half of each beside it.

Tasks: a diagnosis → its chapter of ICD-10-CM, and a US address → JSON, each held out by group. The
last line printed is one JSON document.
"""

import json
import os
import time

import minilora as ml


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    steps, batch = (2, 2) if short else (32, 6)

    # 1. One base in 4 bits, two tasks.
    source = ml.samples.smollm2()
    tasks = {
        "icd10": ml.samples.icd10(test_rows=4 if short else 80, train_rows=steps * batch),
        "address": ml.samples.address(test_rows=2 if short else 24),
    }
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)

    scoring: dict[str, dict] = {
        "icd10": {"labels": tasks["icd10"].labels, "max_new_tokens": 4},
        "address": {
            "metrics": {"json_valid": ml.samples.json_valid, "field_f1": ml.samples.field_f1},
            "max_new_tokens": 2 if short else 64,
        },
    }

    def measure() -> dict[str, float]:
        with ml.dequantized_weights(model):
            chapter, fields = (
                ml.evaluate(model, tokenizer, task.test, batch_size=50, **scoring[name])
                for name, task in tasks.items()
            )
        exact, likeliest = chapter.exact_match or 0.0, chapter.label_accuracy or 0.0
        return {"chapter exact": exact, "chapter constrained": likeliest} | fields.metrics

    table = {"base": measure()}

    # 2. An adapter each. Only the one at work trains; the base is never written to.
    for name, task in tasks.items():
        ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"), name=name)
        ml.set_adapter(model, name)
        config = ml.TrainConfig(
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-3,
            warmup_ratio=0.1,
            max_length=160,
        )
        ml.train(model, tokenizer, task.train, config)
        table[name] = measure()

    # 3. One batch, a row each: every row is answered as if its adapter were the only one.
    names = [name for name in tasks for _ in range(2)]
    prompts = [row["messages"][:-1] for name in tasks for row in tasks[name].test[:2]]
    together = ml.generate(
        model, tokenizer, prompts, max_new_tokens=2 if short else 64, adapters=names
    )
    for name, prompt, answer in zip(names, prompts, together, strict=True):
        ml.set_adapter(model, name)  # the switch
        alone = ml.generate(model, tokenizer, prompt, max_new_tokens=2 if short else 64)
        print(
            f"{name:<8} {prompt[-1]['content']!r} → {answer!r}{'' if answer == alone else f', alone {alone!r}'}"
        )

    # 4. Adapters as values: ΔW of both tasks in one adapter, of rank 32.
    one, other = (ml.AdapterWeights.of(model, name) for name in tasks)
    for label, value in {"sum": one + other, "half of each": 0.5 * one + 0.5 * other}.items():
        value.put(model, label.replace(" ", "-"))
        ml.set_adapter(model, label.replace(" ", "-"))
        table[label] = measure()

    columns = list(table["base"])
    print(f"\n{'':<14}" + "".join(f"{name:>21}" for name in columns))
    for label, found in table.items():
        print(f"{label:<14}" + "".join(f"{found[name]:21.3f}" for name in columns))
    rows = tasks["icd10"]
    majority = ml.samples.majority_class(rows.train, rows.test)
    neighbour = ml.samples.nearest_neighbour(rows.train, rows.test)
    print(f"{'majority class':<14}{majority:21.3f}   the commonest training answer, no model")
    print(f"{'neighbour':<14}{neighbour:21.3f}   the most similar training row's chapter, no model")
    if not short:
        assert table["icd10"]["chapter exact"] > table["address"]["chapter exact"], (
            "an adapter's task is not its own"
        )
        assert table["address"]["field_f1"] > table["icd10"]["field_f1"]
    document = {"table": table, "majority": majority, "nearest_neighbour": neighbour}
    document |= {
        "rows_test": {name: len(task.test) for name, task in tasks.items()},
        "steps": steps,
    }
    document |= {"seconds": time.perf_counter() - started}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
