"""Cost and quality of full fine-tuning, LoRA and QLoRA.

    python benchmarks/quality/methods.py

All methods have one model (SmolLM2-135M-Instruct), one task (diagnosis -> chapter of ICD-10-CM),
the same rows in the same order and the same number of steps. Each method runs in a separate
process, because the peak of memory belongs to a process.

    full     every parameter; fp32 weights, computed in bf16 by autocast if the hardware has it
    lora     r = 16 on every linear layer; the base in the dtype of `load_model` (or --dtype)
    qlora    the same with the base in NF4

The learning rates differ: full fine-tuning takes about a tenth. `s/step` is a mean over the run
without evaluation. Memory is resident, from the start of the process to the end of training, or
allocated on a GPU. The last line is one JSON document.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

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

RATES = {"before": None, "full": 5e-5, "lora": 5e-4, "qlora": 5e-4}
SHOWN = {  # column -> figure
    "trained": "trainable_parameters",
    "s/step": "seconds_per_step",
    "peak GB": "peak_memory_gb",
    "loss": "loss",
    "exact_match": "exact_match",
    "constrained": "constrained",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--test_rows", type=int, default=300)
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, one step of one row"
    )
    add_dtype(parser)
    parser.add_argument("--model", help="a folder or an id on the Hub, instead of SmolLM2")
    parser.add_argument("--method", choices=RATES, help="run only this method, in this process")
    options = parser.parse_args()
    if options.short:
        options.steps, options.batch, options.test_rows = 2, 1, 4
    if options.method:
        print(json.dumps(run(options.method, options)))
        return
    dtype = compute_dtype(options.dtype)
    document: dict[str, Any] = {"benchmark": "methods", **machine(dtype)}
    given = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "test_rows")]
    given.append(f"--dtype={dtype_name(dtype)}")
    with tempfile.TemporaryDirectory() as folder:
        model = small_chat_model(Path(folder), dtype) if options.short else options.model
        given += [f"--model={model}"] if model else []
        figures = {method: fresh(__file__, "--method", method, *given) for method in RATES}
    print(f"\n{'':<8}" + "".join(f"{name:>13}" for name in SHOWN))
    for method, found in figures.items():
        cells = [cell(found.get(key)) for key in SHOWN.values()]
        print(f"{method:<8}" + "".join(cells))
    print(f"{options.steps} steps of {options.batch} rows, {options.test_rows} rows held out")
    print(
        json.dumps(document | {"steps": options.steps, "batch": options.batch, "methods": figures})
    )


def cell(value: float | None) -> str:
    """Return a figure as a cell of the table."""
    if value is None:
        return f"{'-':>13}"
    return f"{value:>13,}" if isinstance(value, int) else f"{value:>13.3f}"


def run(method: str, options: argparse.Namespace) -> dict:
    """Train by one method in this process ("before": without training); return its figures."""
    source = options.model or ml.samples.smollm2()
    task = ml.samples.icd10(test_rows=options.test_rows, train_rows=options.steps * options.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = method == "full"
    fast = compute_dtype(options.dtype)
    found: dict[str, Any] = {}
    tokenizer = ml.load_tokenizer(source)
    quantize = "nf4" if method == "qlora" else None
    model = ml.load_model(
        source, device=device, quantize=quantize, dtype=torch.float32 if full else fast
    )
    if method in ("lora", "qlora"):
        ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    if method != "before":
        config = ml.TrainConfig(
            method="full" if full else "lora",
            bf16=True if full and fast == torch.bfloat16 else None,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=RATES[method],
            warmup_ratio=0.1,
        )
        result = ml.train(model, tokenizer, task.train, config)
        found["trainable_parameters"] = sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        found["seconds_per_step"] = result.tokens / result.tokens_per_second / result.steps
        found["peak_memory_gb"] = result.peak_memory_bytes / 1e9
        found["learning_rate"] = RATES[method]
    scores = ml.evaluate(
        model, tokenizer, task.test, labels=task.labels, max_new_tokens=4, batch_size=32
    )
    return found | {
        "loss": scores.loss,
        "exact_match": scores.exact_match,
        "constrained": scores.label_accuracy,
    }


if __name__ == "__main__":
    main()
