"""A small search over r, α and dropout, judged on rows that the search did not use.

Run it with `python examples/sweep.py`.

The best of many trials was chosen by the rows it was measured on, so its figure on these rows is
too good. The example therefore holds out a third set of rows, measures the best trial on it once,
at the end, and compares it with the defaults.

Each trial is one run of `minilora train` in a new process. Optuna (pip install -e '.[sweep]')
draws the options. Task: a diagnosis → its chapter of ICD-10-CM, with different disease categories
in each set of rows. The last printed line is one JSON document.
"""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer trials, steps and rows
FOLDER = Path("out/sweep")
SEARCH = {"r": "2,8,32", "lora_alpha": "4:64:log", "lora_dropout": "0,0.1"}
TRIALS = 1 if SHORT else 5
HELD_OUT = 4 if SHORT else 80  # rows to choose by, and rows to judge by
STEPS = 2 if SHORT else 10
BATCH_SIZE = 2 if SHORT else 8
TRAINING: dict[str, Any] = {  # options that the trials and the defaults share
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH_SIZE,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.1,
}


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON Lines."""
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def search_options(source: str):
    """Run the trials and return Optuna's study.

    The command line does the same: `minilora sweep MODEL rows.jsonl --search r=2,8,32`.
    """
    options = {
        "quantize": "nf4",
        "target_modules": "all-linear",
        "eval_dataset": FOLDER / "choose.jsonl",
        **TRAINING,
    }
    arguments = [source, str(FOLDER / "train.jsonl")]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    return ml.sweep(arguments, SEARCH, FOLDER, trials=TRIALS, metric="eval_loss")


def main() -> dict:
    """Run the example and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    started = time.perf_counter()
    if not importlib.util.find_spec("optuna"):
        raise SystemExit("This example needs Optuna: pip install -e '.[sweep]'")
    shutil.rmtree(FOLDER, ignore_errors=True)  # otherwise the sweep would continue an earlier one
    FOLDER.mkdir(parents=True)

    # 1. Split the rows into three sets: to train on, to choose by, to judge by.
    task = ml.samples.icd10(test_rows=2 * HELD_OUT, train_rows=STEPS * BATCH_SIZE)
    source = ml.samples.smollm2()
    sets = {
        "train": task.train,
        "choose": task.test[:HELD_OUT],
        "judge": task.test[HELD_OUT:],
    }
    for name, rows in sets.items():
        write_rows(FOLDER / f"{name}.jsonl", rows)

    # 2. Search.
    study = search_options(source)
    print(ml.sweep_table(study))

    # 3. Measure the base, the defaults (r = α = 8) and the best trial on rows that no trial used.
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)

    def measure() -> dict[str, float]:
        with ml.dequantized_weights(model):
            scores = ml.evaluate(
                model,
                tokenizer,
                sets["judge"],
                labels=task.labels,
                max_new_tokens=0,
                batch_size=50,
            )
        return {"loss": scores.loss, "constrained": scores.label_accuracy or 0.0}

    table = {"base": measure()}
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    ml.train(model, tokenizer, sets["train"], ml.TrainConfig(**TRAINING))
    table["defaults"] = measure()
    ml.eject(model)
    ml.load_adapter(model, FOLDER / f"trial-{study.best_trial.number}" / "adapter")
    table["best trial"] = measure()

    # 4. Print the figures and the baselines.
    print(f"\n{'':<22}{'loss':>8}{'constrained':>13}")
    for name, row in table.items():
        print(f"{name:<22}{row['loss']:8.3f}{row['constrained']:13.3f}")
    print(f"{'best, when chosen':<22}{study.best_value:8.3f}")
    majority = ml.samples.majority_class(sets["train"], sets["judge"])
    neighbour = ml.samples.nearest_neighbour(sets["train"], sets["judge"])
    print(f"{'majority class':<22}{majority:21.3f}   the most common training answer, no model")
    print(f"{'nearest neighbour':<22}{neighbour:21.3f}   the most similar training row, no model")

    trials = [{"value": trial.value, **trial.params} for trial in study.trials]
    document = {
        "table": table,
        "best": study.best_params,
        "best_value": study.best_value,
        "trials": trials,
        "majority": majority,
        "nearest_neighbour": neighbour,
        "rows": {name: len(rows) for name, rows in sets.items()},
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
