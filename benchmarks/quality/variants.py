"""LoRA, DoRA, PiSSA and LoftQ with one budget, each at its own best learning rate.

    python benchmarks/quality/variants.py --learning_rates 1e-4 5e-4 2e-3

All variants have one model (SmolLM2-135M-Instruct), one task (diagnosis -> chapter of ICD-10-CM),
the same rows in the same order, the same number of steps, r = 16 on every linear layer, and
--seeds seeds at each learning rate. Each run has a separate process. At one rate the variants
cannot be compared: their factors start with different sizes (arXiv:2602.04998).

    lora, dora, pissa       a dense base
    qlora, qdora, loftq     a 4-bit base: NF4(W), or the result of LoftQ's iterations on W

Seconds are those of a training step. Loss and exact match are those of held-out rows: means over
the seeds, ± half their range. `best` marks the rate with a variant's lowest mean loss; if it is the
first or the last one, the best rate may lie outside. The last line is one JSON document.
"""

import argparse
import json
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

FOUR_BIT = {"qlora": {}, "qdora": {"use_dora": True}}
DENSE: dict[str, Any] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 4}}
VARIANTS: dict[str, Any] = DENSE | FOUR_BIT | {"loftq": LOFTQ}
SHOWN = ("trained", "s/step", "loss", "exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--test_rows", type=int, default=300)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-4, 5e-4, 2e-3])
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="of --variant")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--short",
        action="store_true",
        help="a random model of two layers, one step of two rows, r = 2",
    )
    add_dtype(parser)
    parser.add_argument("--model", help="a folder or an id on the Hub, instead of SmolLM2")
    parser.add_argument(
        "--variant", choices=VARIANTS, help="run only this variant, in this process, with --seed"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.short:
        options.steps, options.batch, options.test_rows, options.seeds = 2, 2, 4, 1
        options.learning_rates = options.learning_rates[:1]
    if options.variant:
        print(json.dumps(run(options.variant, options)))
        return
    given = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "test_rows")]
    dtype = compute_dtype(options.dtype)
    document: dict[str, Any] = {"benchmark": "variants", **machine(dtype), "steps": options.steps}
    given.append(f"--dtype={dtype_name(dtype)}")
    if options.short:
        given.append("--short")
    table: dict[str, Any] = {}
    print(f"{'':<16}" + "".join(f"{name:>20}" for name in SHOWN))
    with tempfile.TemporaryDirectory() as folder:
        model = small_chat_model(Path(folder), dtype) if options.short else options.model
        if model:
            given.append(f"--model={model}")
        for name in VARIANTS:
            table[name] = sweep(name, options.learning_rates, options.seeds, given)
    print(f"{options.steps} steps of {options.batch} rows, ", end="")
    print(f"{options.test_rows} rows held out, {options.seeds} seeds")
    print(json.dumps(document | {"variants": table}))


def sweep(variant: str, rates: list[float], seeds: int, given: list[str]) -> dict[str, Any]:
    """Train a variant at every rate; print a line for each, and return the figures by rate."""
    found = {}
    for rate in rates:
        runs = []
        for seed in range(seeds):
            fixed = ("--variant", variant, "--seed", seed, "--learning_rate", rate)
            runs.append(fresh(__file__, *fixed, *given))
        found[rate] = {key: [figures[key] for figures in runs] for key in SHOWN}
        cells = [f"{cell(values):>20}" for values in found[rate].values()]
        print(f"{variant:<8}{rate:<8g}" + "".join(cells), flush=True)
    best = min(rates, key=lambda rate: sum(found[rate]["loss"]))
    print(f"{variant:<8}best: {best:g}", flush=True)
    return {"best": best, "rates": {f"{rate:g}": figures for rate, figures in found.items()}}


def cell(values: list[float]) -> str:
    """Return the mean ± half the range."""
    mean = sum(values) / len(values)
    half = (max(values) - min(values)) / 2
    return f"{mean:,.0f}" if isinstance(values[0], int) else f"{mean:.3f} ± {half:.3f}"


def run(variant: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant in this process; return its figures."""
    source = options.model or ml.samples.smollm2()
    task = ml.samples.icd10(test_rows=options.test_rows, train_rows=options.steps * options.batch)
    tokenizer = ml.load_tokenizer(source)
    quantize = "nf4" if variant in FOUR_BIT else None
    model = ml.load_model(source, quantize=quantize, dtype=options.dtype)
    targets: dict[str, Any] = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
    if options.short:
        targets = {"r": 2, "lora_alpha": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    ml.inject(model, ml.LoRAConfig(**targets, **VARIANTS[variant]), seed=options.seed)
    trained = ml.count_parameters(model).trainable
    config = ml.TrainConfig(
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        warmup_ratio=0.1,
        seed=options.seed,
    )
    result = ml.train(model, tokenizer, task.train, config)
    scores = ml.evaluate(model, tokenizer, task.test, max_new_tokens=4, batch_size=32)
    seconds = result.tokens / result.tokens_per_second / result.steps
    return {
        "trained": trained,
        "s/step": seconds,
        "loss": scores.loss,
        "exact_match": scores.exact_match,
    }


if __name__ == "__main__":
    main()
