"""Seconds of `ml.evaluate`: loss, likeliest label and greedy answer of rows of ICD-10.

    python benchmarks/inference/bench_evaluate.py [--adapter FOLDER] [--rows 500] [--rounds 1]
        [--dtype auto] [--short]

The model is SmolLM2-135M in NF4. The rows are those of the demo: a diagnosis, its chapter of 22, an
answer of at most 8 tokens. Without an adapter the model gives wrong answers, and nearly every label
may be the likeliest one. An adapter of the demo (out/demo/icd10/adapter) leaves few labels to read.
"positions" are the tokens that go through the decoder, padding included. The last line is one JSON
document.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

# The root of the repository: benchmarks import each other by their full names.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import minilora as ml
from benchmarks._lib.side_by_side import add_dtype, compute_dtype, machine

NEW_TOKENS = 8


def count_positions(model: Any) -> list[int]:
    """Return a list that receives the number of tokens of each forward pass."""
    sizes: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].numel()))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, help="folder of an adapter of the demo")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="4 rows, one round")
    add_dtype(parser)
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    found: dict[str, Any] = {"benchmark": "bench_evaluate", **machine(dtype)}
    source = ml.samples.smollm2()
    model = ml.load_model(source, quantize="nf4", dtype=dtype)
    tokenizer = ml.load_tokenizer(source)
    if options.adapter is not None:
        ml.load_adapter(model, options.adapter)
    rows = 4 if options.short else options.rows
    task = ml.samples.icd10(test_rows=rows, train_rows=480)
    labels = task.labels or []
    sizes = count_positions(model)
    found["rounds"] = []
    for _ in range(1 if options.short else options.rounds):
        sizes.clear()
        wall = time.perf_counter()
        cpu = time.process_time()
        scores = ml.evaluate(model, tokenizer, task.test, labels=labels, max_new_tokens=NEW_TOKENS)
        figures = {
            "seconds": round(time.perf_counter() - wall, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "positions": sum(sizes),
            "passes": len(sizes),
            "loss": scores.loss,
            "label_accuracy": scores.label_accuracy,
            "exact_match": scores.exact_match,
        }
        found["rounds"].append(figures)
        print(f"{len(task.test)} rows, {len(labels)} labels: {figures}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
