"""QLoRA on a real model and a real task, measured before and after training.

Run it with `make demo` or `python examples/demo.py`.

A figure after training needs other figures to compare it with. The demo therefore also measures
the base model, the likeliest of the allowed answers (which shows the knowledge that the base model
already has), a table lookup, and the perplexity of general text (which shows how much the model
forgets).

    --task icd10      a diagnosis → its chapter of ICD-10-CM, 22 answers; held out by category
    --task address    a US address → JSON, also scored as JSON

The last printed line is one JSON document with every figure of the table.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import minilora as ml

PROMPTS = 3  # number of held-out questions that are printed with their answers


@dataclass(frozen=True)
class Settings:
    """Rows and options of one task.

    Attributes:
        rows: training rows and held-out rows.
        scoring: arguments of `ml.evaluate`.
        training: fields of `ml.TrainConfig`.
    """

    rows: ml.samples.Task
    scoring: dict[str, Any]
    training: dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """Figures of the model at one time.

    Attributes:
        scores: figures on the held-out rows, and the answers to them.
        perplexity: perplexity of general prose.
    """

    scores: ml.Scores
    perplexity: float


def icd10_settings(short: bool) -> Settings:
    """Return the rows and options for classifying diagnoses."""
    steps = 110
    batch_size = 12
    test_rows = 40 if short else 500
    rows = ml.samples.icd10(test_rows=test_rows, train_rows=steps * batch_size)
    scoring = {"labels": rows.labels, "max_new_tokens": 4}
    return Settings(rows, scoring, training_options(4 if short else steps, batch_size))


def address_settings(short: bool) -> Settings:
    """Return the rows and options for turning addresses into JSON."""
    steps = 4 if short else 140
    rows = ml.samples.address(test_rows=20 if short else 200)
    metrics = {"json_valid": ml.samples.json_valid, "field_f1": ml.samples.field_f1}
    scoring = {"metrics": metrics, "max_new_tokens": 96}
    return Settings(rows, scoring, training_options(steps, batch_size=6))


def training_options(steps: int, batch_size: int) -> dict[str, Any]:
    """Return the fields of TrainConfig that both tasks use."""
    return {
        "learning_rate": 5e-4,
        "warmup_ratio": 0.1,
        "max_steps": steps,
        "save_steps": 20,
        "per_device_train_batch_size": batch_size,
        "save_total_limit": 1,
    }


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command-line options; None reads the command line of this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("icd10", "address"), default="icd10")
    parser.add_argument(
        "--resume", action="store_true", help="continue the training that Ctrl-C stopped"
    )
    return parser.parse_args(arguments)


def compare(before: Measurement, after: Measurement) -> dict[str, tuple]:
    """Return each figure's name and its values before and after training."""
    old = before.scores
    new = after.scores
    figures = {
        "exact_match": (old.exact_match, new.exact_match),
        "constrained": (old.label_accuracy, new.label_accuracy),
        "token_f1": (old.token_f1, new.token_f1),
    }
    for name, value in old.metrics.items():
        figures[name] = (value, new.metrics[name])
    figures["perplexity_general"] = (before.perplexity, after.perplexity)
    return figures


def format_figure(value: float | None) -> str:
    """Return a figure with three decimals, or a dash if the task does not have this figure."""
    return "-" if value is None else f"{value:.3f}"


def print_table(figures: dict[str, tuple], baselines: dict[str, float], scores: ml.Scores) -> None:
    """Print the figures before and after training, and the baselines.

    Args:
        figures: each figure's name and its values before and after training.
        baselines: accuracy of the two baselines by name.
        scores: figures on the held-out rows after training.
    """
    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name, (before, after) in figures.items():
        print(f"{name:<22}{format_figure(before):>8}{format_figure(after):>8}")
    majority = format_figure(baselines["majority"])
    neighbour = format_figure(baselines["nearest_neighbour"])
    print(f"{'majority class':<22}{majority:>16}   the most common training answer, no model")
    print(f"{'nearest neighbour':<22}{neighbour:>16}   the most similar training row, no model")
    interval = scores.interval(scores.exact_match or 0)
    print(f"{scores.answers} rows held out, 95 % interval ± {interval:.3f}")


def print_answers(before: ml.Scores, after: ml.Scores) -> None:
    """Print some questions with their answers before and after training.

    Args:
        before: figures and answers before training.
        after: figures and answers after training.
    """
    for old, new in zip(before.rows[:PROMPTS], after.rows[:PROMPTS], strict=True):
        print(f"\n{new.prompt[-1]['content']}")
        print(f"  before: {old.got!r}")
        print(f"  after:  {new.got!r}")
        print(f"  answer: {new.expected!r}")


def main(arguments: list[str] | None = None) -> dict:
    """Run the demo and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    options = parse_options(arguments)
    started = time.perf_counter()
    folder = Path("out/demo") / options.task
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)  # remove the output of an earlier demo

    # 1. Load a model in 4 bits, a task with held-out rows, and text of another kind.
    print("Loading SmolLM2-135M in 4 bits.", flush=True)
    source = ml.samples.smollm2()
    short = bool(os.environ.get("MINILORA_SHORT"))
    load_settings = {"icd10": icd10_settings, "address": address_settings}[options.task]
    settings = load_settings(short)
    rows = settings.rows
    prose = ml.samples.prose()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    print(f"{rows.name}: {len(rows.train)} training rows, {len(rows.test)} held-out rows.")
    print(rows.source)

    def measure(name: str) -> Measurement:
        print(f"Measuring the {name} on the held-out rows.", flush=True)
        scores = ml.evaluate(model, tokenizer, rows.test, **settings.scoring)
        print(f"Measuring the {name} on {len(prose)} texts of general prose.", flush=True)
        perplexity = ml.evaluate(model, tokenizer, prose).perplexity
        return Measurement(scores, perplexity)

    # 2. Measure the base model.
    before = measure("base model")

    # 3. Train an adapter on every linear layer.
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    count = ml.count_parameters(model)
    print(count)
    checkpoint = "last" if options.resume else None
    config = ml.TrainConfig(
        output_dir=str(folder), resume_from_checkpoint=checkpoint, **settings.training
    )
    result = ml.train(model, tokenizer, rows.train, config)
    if result.interrupted:
        raise SystemExit(
            f"The training stopped after step {result.steps}. "
            f"The checkpoint is {result.checkpoint}. Continue with --resume."
        )

    # 4. Measure the trained model.
    after = measure("trained model")

    # 5. Save the adapter alone (20 MB), and load it into a fresh base model.
    ml.save_adapter(model, folder / "adapter")
    fresh = ml.load_model(source, quantize="nf4")
    ml.load_adapter(fresh, folder / "adapter")
    tokens = torch.tensor([tokenizer.encode(prose[0]["text"])[:128]])  # (1, T)
    with torch.no_grad():
        same = torch.equal(fresh(tokens), model(tokens))  # every bit of the logits

    # 6. Print the figures, next to those of two baselines without a model.
    figures = compare(before, after)
    baselines = {
        "majority": ml.samples.majority_class(rows.train, rows.test),
        "nearest_neighbour": ml.samples.nearest_neighbour(rows.train, rows.test),
    }
    print_table(figures, baselines, after.scores)
    print_answers(before.scores, after.scores)
    document = {
        "model": "SmolLM2-135M-Instruct",
        "source": Path(source).name,
        "task": rows.name,
        "rows_train": len(rows.train),
        "rows_test": len(rows.test),
    }
    for name, (value_before, value_after) in figures.items():
        document[f"{name}_before"] = value_before
        document[f"{name}_after"] = value_after
    document |= {
        **baselines,
        "trainable_parameters": count.trainable,
        "total_parameters": count.total,
        "stored_bytes": count.stored_bytes,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": time.perf_counter() - started,
        "adapter_reload_equal": same,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
