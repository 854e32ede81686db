"""Which r, α and dropout? A small search, and the best of it on rows that the search did not see.
python examples/sweep.py

One idea: the best of many trials was chosen by the rows it was measured on, so its figure there
flatters it. A third set of rows, looked at once and at the end, says what the choice is worth
beside the defaults.

Each trial is `minilora train` in a process of its own; Optuna (pip install "minilora[sweep]") draws
the options. Task: a diagnosis → its chapter of ICD-10-CM, every set of rows from other disease
categories. The last line printed is one JSON document.
"""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import minilora as ml

FOLDER = Path("out/sweep")
SEARCH = {"r": "2,8,32", "lora_alpha": "4:64:log", "lora_dropout": "0,0.1"}


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts trials, steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    trials, steps, batch = (1, 2, 2) if short else (5, 10, 8)
    if not importlib.util.find_spec("optuna"):
        raise SystemExit('a sweep needs Optuna: pip install "minilora[sweep]"')
    shutil.rmtree(FOLDER, ignore_errors=True)  # an earlier search, which this one would go on with
    FOLDER.mkdir(parents=True)

    # 1. Three sets: to train on, to choose by, to judge by.
    few = 4 if short else 80
    task, source = (
        ml.samples.icd10(test_rows=2 * few, train_rows=steps * batch),
        ml.samples.smollm2(),
    )
    sets = {"train": task.train, "choose": task.test[:few], "judge": task.test[few:]}
    for name, rows in sets.items():
        (FOLDER / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )

    # 2. The search: as `minilora sweep … --search r=2,8,32` does it.
    options = {
        "quantize": "nf4",
        "target_modules": "all-linear",
        "max_steps": steps,
        "learning_rate": 1e-3,
    }
    options |= {
        "per_device_train_batch_size": batch,
        "eval_dataset": FOLDER / "choose.jsonl",
        "warmup_ratio": 0.1,
    }
    arguments = [
        source,
        str(FOLDER / "train.jsonl"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    study = ml.sweep(arguments, SEARCH, FOLDER, trials=trials, metric="eval_loss")
    print(ml.sweep_table(study))

    # 3. The base, the defaults (r = α = 8) and the best, on rows that no trial saw.
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)

    def measure() -> dict[str, float]:
        with ml.dequantized_weights(model):
            scores = ml.evaluate(
                model, tokenizer, sets["judge"], labels=task.labels, max_new_tokens=0, batch_size=50
            )
        return {"loss": scores.loss, "constrained": scores.label_accuracy or 0.0}

    found = {"base": measure()}
    ml.inject(model, ml.LoRAConfig(target_modules="all-linear"))
    fields = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
    }
    ml.train(model, tokenizer, sets["train"], ml.TrainConfig(**fields))
    found["defaults"] = measure()
    ml.eject(model)
    ml.load_adapter(model, FOLDER / f"trial-{study.best_trial.number}" / "adapter")
    found["best trial"] = measure()

    print(f"\n{'':<22}{'loss':>8}{'constrained':>13}")
    for name, row in found.items():
        print(f"{name:<22}{row['loss']:8.3f}{row['constrained']:13.3f}")
    print(f"{'best, as it was chosen':<22}{study.best_value:8.3f}")
    majority = ml.samples.majority_class(sets["train"], sets["judge"])
    neighbour = ml.samples.nearest_neighbour(sets["train"], sets["judge"])
    print(f"{'majority class':<22}{'':8}{majority:13.3f}   the commonest training answer, no model")
    print(
        f"{'nearest neighbour':<22}{'':8}{neighbour:13.3f}   the most similar training row, no model"
    )

    document = {"table": found, "best": study.best_params, "best_value": study.best_value}
    document |= {
        "trials": [{"value": t.value, **t.params} for t in study.trials],
        "majority": majority,
    }
    document |= {
        "nearest_neighbour": neighbour,
        "rows": {name: len(rows) for name, rows in sets.items()},
    }
    document |= {"seconds": time.perf_counter() - started}
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
