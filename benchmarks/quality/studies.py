"""Measurements for docs/when.md: ranks, targets, data, forgetting and prompts.

    python benchmarks/quality/studies.py

All runs have one model (SmolLM2-135M-Instruct), one task (diagnosis -> chapter of ICD-10-CM, held
out by category), LoRA with s = 1 (alpha = r), --steps steps of --batch rows, and one seed. Each run
has a separate process.

    ranks       r in {4, 16, 64} x learning rate in {2e-4, 1e-3, 5e-3}, every linear layer
    targets     the same number of parameters in attention, in the MLP, or in both
    rows        the same number of steps over 60, 200 or all rows
    bits        the base dense or in NF4
    forgetting  0, 10 or 20 % of the rows are prose, or KL(adapted || base) is part of the loss
    prompts     no training: no example, eight fixed ones, the eight nearest training rows
                (retrieval)

`exact_match` and `label_accuracy` (the likeliest of the 22 answers) are those of held-out rows,
with a 95 % interval of about ± 1 / sqrt(rows). `prose` is the perplexity on held-out English prose
of the same kind as the prose that is mixed in. The last line is one JSON document.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import (
    add_dtype,
    compute_dtype,
    dtype_name,
    fresh,
    machine,
    small_chat_model,
)
from minilora.evaluation.samples.baselines import overlaps
from minilora.evaluation.samples.task import Row

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {"r": 16, "learning_rate": 1e-3}
STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "ranks": {
        f"r {r}, {lr:.0e}": {"r": r, "learning_rate": lr}
        for r in (4, 16, 64)
        for lr in (2e-4, 1e-3, 5e-3)
    },
    # An adapter of a layer of SmolLM2-135M has 3,840 r parameters in attention and 6,336 r in the
    # MLP. These ranks make the totals equal.
    "targets": {
        "attention": {"r": 42, "target_modules": ATTENTION},
        "MLP": {"r": 26, "target_modules": MLP},
        "all-linear": {"r": 16},
    },
    "rows": {"60 rows": {"rows": 60}, "200 rows": {"rows": 200}, "all rows": {}},
    "bits": {"lora": {}, "qlora": {"quantize": "nf4"}},
    "forgetting": {
        "no prose": {},
        "10 % prose": {"prose": 0.1},
        "20 % prose": {"prose": 0.2},
        "KL to base": {"kl_weight": 0.5},
    },
    "prompts": {
        "no example": {"shots": 0},
        "8 fixed": {"shots": 8},
        "8 nearest": {"shots": 8, "nearest": True},
    },
}
SHOWN = ("trained", "exact_match", "constrained", "loss", "prose")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=STUDIES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--test_rows", type=int, default=300)
    parser.add_argument(
        "--prose", type=int, default=52, help="texts of prose; every second one is held out"
    )
    parser.add_argument(
        "--short", action="store_true", help="a random model, one step; the last run of two studies"
    )
    add_dtype(parser)
    parser.add_argument("--model", help="a folder or an id on the Hub, instead of SmolLM2")
    parser.add_argument("--run", help="settings as JSON: run only these, in this process")
    options = parser.parse_args()
    if options.short:
        options.steps, options.batch, options.test_rows, options.prose = 2, 2, 4, 8
    if options.run:
        print(json.dumps(run(json.loads(options.run), options)))
        return
    dtype = compute_dtype(options.dtype)
    document: dict[str, Any] = {"benchmark": "studies", **machine(dtype), "steps": options.steps}
    options.dtype = dtype_name(dtype)
    given = [
        f"--{name}={getattr(options, name)}"
        for name in ("steps", "batch", "test_rows", "prose", "dtype")
    ]
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, dict[str, Any]] = {}  # equal settings run once
    studies = list(STUDIES)
    if options.only:
        studies = [options.only]
    elif options.short:
        studies = ["forgetting", "prompts"]
    with tempfile.TemporaryDirectory() as folder:
        model = small_chat_model(Path(folder), dtype) if options.short else options.model
        if model:
            given.append(f"--model={model}")
        for study in studies:
            print(f"\n{study:<16}" + "".join(f"{name:>13}" for name in SHOWN))
            runs = list(STUDIES[study].items())[-1 if options.short else 0 :]
            for name, own in runs:
                settings = own if "shots" in own else COMMON | own
                key = json.dumps(settings, sort_keys=True)
                if key not in known:
                    known[key] = fresh(__file__, "--run", json.dumps(own), *given)
                figures = known[key]
                found.setdefault(study, {})[name] = figures
                cells = [cell(figures[column]) for column in SHOWN]
                print(f"{name:<16}" + "".join(cells), flush=True)
    half = 0.98 / math.sqrt(options.test_rows)
    print(f"\n{options.steps} steps of {options.batch} rows, ", end="")
    print(f"{options.test_rows} held out: ± {half:.3f} at most")
    print(json.dumps(document | {"studies": found}))


def cell(value: float | None) -> str:
    """Return a figure as a cell of the table."""
    if value is None:
        return f"{'-':>13}"
    return f"{value:>13,}" if isinstance(value, int) else f"{value:>13.3f}"


def run(own: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run the `own` settings in this process; return the figures."""
    source = options.model or ml.samples.smollm2()
    task = ml.samples.icd10(test_rows=options.test_rows, train_rows=options.steps * options.batch)
    tokenizer = ml.load_tokenizer(source)
    model = ml.load_model(source, quantize=own.get("quantize"), dtype=options.dtype)
    prose = ml.samples.prose(options.prose, 500)  # every second text is held out
    test = task.test
    trained = 0
    if "shots" in own:
        test = with_examples(test, task.train, own["shots"], own.get("nearest", False))
    else:
        trained = train(model, tokenizer, task.train, prose[1::2], COMMON | own, options)
    scores = ml.evaluate(
        model, tokenizer, test, labels=task.labels, max_new_tokens=4, batch_size=16
    )
    general = ml.evaluate(model, tokenizer, prose[::2], batch_size=4).perplexity
    figures = {
        "loss": scores.loss,
        "exact_match": scores.exact_match,
        "constrained": scores.label_accuracy,
    }
    return figures | {"trained": trained, "prose": general}


def train(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    prose: list[dict[str, str]],
    own: dict[str, Any],
    options: Any,
) -> int:
    """Train an adapter; return its number of parameters."""
    targets = own.get("target_modules", "all-linear")
    ml.inject(model, ml.LoRAConfig(r=own["r"], lora_alpha=own["r"], target_modules=targets))
    dataset: list[Any] = rows[: own.get("rows")]
    share = own.get("prose")
    if share:
        dataset = ml.mix_datasets([(rows, 1 - share), (prose, share)], rows=len(rows))
    objective = ml.KLToBase(kl_weight=own["kl_weight"]) if "kl_weight" in own else ml.SFT()
    config = ml.TrainConfig(
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=own["learning_rate"],
        warmup_ratio=0.1,
    )
    ml.train(model, tokenizer, dataset, config, objective=objective)
    return ml.count_parameters(model).trainable


def with_examples(rows: list[Row], train: list[Row], shots: int, nearest: bool) -> list[Row]:
    """Return the rows with `shots` training rows as turns before each question.

    The training rows are fixed, or the nearest to each row by words, the nearest last.
    """
    order: list[Any] = [range(len(train))] * len(rows)
    if nearest:
        order = [(-overlap).argsort(kind="stable") for overlap in overlaps(train, rows)]
    found = []
    for row, numbers in zip(rows, order, strict=True):
        instruction, question, answer = row["messages"]
        turns = []
        for n in reversed(numbers[:shots]):
            turns += train[n]["messages"][1:]
        found.append({"messages": [instruction, *turns, question, answer]})
    return found


if __name__ == "__main__":
    main()
