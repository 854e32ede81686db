"""QLoRA on a real model and a real task, measured before and after. `make demo`, or: python examples/demo.py

One idea: a figure after training means nothing without the one before, without what the model knew
already (the likeliest of the allowed answers), without what a table lookup reaches, and without
what was forgotten.

    --task icd10      a diagnosis → its chapter of ICD-10-CM, 22 answers; held out by disease category
    --task address    a US address → JSON; scored as JSON too
The last line printed is one JSON document with every figure of the table.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch

import minilora as ml

PROMPTS = 3  # shown before and after


def settings(task: str, short: bool) -> tuple[ml.samples.Task, dict, dict]:
    """(rows, arguments of evaluate, fields of TrainConfig)."""
    if task == "icd10":
        steps, batch = 110, 12
        rows = ml.samples.icd10(test_rows=40 if short else 500, train_rows=steps * batch)
        scoring = {"labels": rows.labels, "max_new_tokens": 4}
    else:
        steps, batch = 140, 6
        rows = ml.samples.address(test_rows=20 if short else 200)
        metrics = {"json_valid": ml.samples.json_valid, "field_f1": ml.samples.field_f1}
        scoring = {"metrics": metrics, "max_new_tokens": 96}
    training = {
        "learning_rate": 5e-4,
        "warmup_ratio": 0.1,
        "max_steps": 4 if short else steps,
        "save_steps": 20,
    }
    training |= {"per_device_train_batch_size": batch, "save_total_limit": 1}
    return rows, scoring | {"batch_size": 64}, training


def main(arguments: list[str] | None = None) -> dict:
    """Run the demo; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("icd10", "address"), default="icd10")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the training that Ctrl-C stopped"
    )
    options = parser.parse_args(arguments)
    started, folder = time.perf_counter(), Path("out/demo") / options.task
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)  # an earlier demo's

    # 1. A model in 4 bits, a task with held-out rows, and text of another kind.
    source = ml.samples.smollm2()
    rows, scoring, training = settings(options.task, short=bool(os.environ.get("MINILORA_SHORT")))
    prose = ml.samples.prose()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    print(
        f"{rows.name}: {len(rows.train)} rows to train on, {len(rows.test)} held out. {rows.source}"
    )

    # 2. What it knows already.
    shown = [row["messages"][:-1] for row in rows.test[:PROMPTS]]
    before = ml.evaluate(model, tokenizer, rows.test, **scoring)
    prose_before = ml.evaluate(model, tokenizer, prose, batch_size=4).perplexity
    answers_before = ml.generate(model, tokenizer, shown, max_new_tokens=scoring["max_new_tokens"])

    # 3. An adapter on every linear layer, trained.
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    count = ml.count_parameters(model)
    print(count)
    resume = "last" if options.resume else None
    config = ml.TrainConfig(output_dir=str(folder), resume_from_checkpoint=resume, **training)
    result = ml.train(model, tokenizer, rows.train, config)
    if result.interrupted:
        raise SystemExit(
            f"stopped after step {result.steps}, kept in {result.checkpoint}: go on with --resume"
        )

    # 4. What it knows now, and what it forgot.
    after = ml.evaluate(model, tokenizer, rows.test, **scoring)
    prose_after = ml.evaluate(model, tokenizer, prose, batch_size=4).perplexity
    answers_after = ml.generate(model, tokenizer, shown, max_new_tokens=scoring["max_new_tokens"])

    # 5. The adapter alone, 20 MB, makes a fresh base the same model.
    ml.save_adapter(model, folder / "adapter")
    fresh = ml.load_model(source, quantize="nf4")
    ml.load_adapter(fresh, folder / "adapter")
    tokens = torch.tensor([tokenizer.encode(prose[0]["text"])[:128]])
    with torch.no_grad():
        same = torch.equal(fresh(tokens), model(tokens))

    figures = {
        "exact_match": (before.exact_match, after.exact_match),
        "constrained": (before.label_accuracy, after.label_accuracy),
        "token_f1": (before.token_f1, after.token_f1),
        **{name: (before.metrics[name], after.metrics[name]) for name in before.metrics},
        "perplexity_general": (prose_before, prose_after),
    }
    majority = ml.samples.majority_class(rows.train, rows.test)
    neighbour = ml.samples.nearest_neighbour(rows.train, rows.test)
    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name, values in figures.items():
        print(
            f"{name:<22}"
            + "".join(f"{'-' if value is None else f'{value:.3f}':>8}" for value in values)
        )
    print(f"{'majority class':<22}{'':8}{majority:8.3f}   the commonest training answer, no model")
    print(
        f"{'nearest neighbour':<22}{'':8}{neighbour:8.3f}   the most similar training row, no model"
    )
    print(
        f"{after.answers} rows held out, 95 % interval ± {after.interval(after.exact_match or 0):.3f}"
    )
    for prompt, old, new, row in zip(shown, answers_before, answers_after, rows.test, strict=False):
        expected = row["messages"][-1]["content"]
        print(
            f"\n{prompt[-1]['content']}\n  before: {old!r}\n  after:  {new!r}\n  answer: {expected!r}"
        )

    document = {"model": "SmolLM2-135M-Instruct", "source": Path(source).name, "task": rows.name}
    document |= {"rows_train": len(rows.train), "rows_test": len(rows.test)}
    for name, (value_before, value_after) in figures.items():
        document |= {f"{name}_before": value_before, f"{name}_after": value_after}
    document |= {
        "majority": majority,
        "nearest_neighbour": neighbour,
        "trainable_parameters": count.trainable,
    }
    document |= {"total_parameters": count.total, "stored_bytes": count.stored_bytes}
    document |= {
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
    }
    document |= {"seconds": time.perf_counter() - started, "adapter_reload_equal": same}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
