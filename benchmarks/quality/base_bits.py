"""What rounding a GGUF file to NF4 costs, and what keeping its bytes saves.

    python benchmarks/quality/base_bits.py [FILE.gguf …]

Each file is loaded in three storages: dense, in its own bytes (quantize="keep") and in NF4. For
each one the script prints

    prose       loss on English prose (minilora/evaluation/samples/prose.py), nats a token
    stored MB   memory of all parameters
    step s      median time of a training step on that prose (LoRA on all linear layers, r 16)
    bytes       "equal" if training left the bytes of the base unchanged

The storages take turns, so that they meet the same conditions. Without a FILE it is the GGUF file
of SmolLM2-135M-Instruct. The last line is one JSON document.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
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
    machine,
    small_chat_model,
    spread,
)
from minilora.losses.sft import SFT
from minilora.training.optim.param_groups import new_optimizer

STORAGES: dict[str, str | None] = {"dense": None, "keep": "keep", "nf4": "nf4"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="GGUF files; the default is SmolLM2's")
    parser.add_argument("--texts", type=int, default=20, help="texts of prose")
    parser.add_argument("--rounds", type=int, default=5, help="training steps that are timed")
    parser.add_argument(
        "--short", action="store_true", help="a random model of two layers, one round"
    )
    add_dtype(parser)
    options = parser.parse_args()
    dtype = compute_dtype(options.dtype)
    document: dict[str, Any] = {"benchmark": "base_bits", **machine(dtype)}
    with tempfile.TemporaryDirectory() as folder:
        files = options.files or [ml.samples.smollm2("wheel")]
        if options.short:
            options.texts, options.rounds = 2, 1
            files = [small_file(Path(folder), dtype)]
        for file in files:
            document[Path(file).name] = measure(str(file), dtype_name(dtype), options)
    print(json.dumps(document))


def small_file(folder: Path, dtype: torch.dtype) -> Path:
    """Return a random model of two layers in Q4_0."""
    source = small_chat_model(folder / "dense", dtype)
    file = folder / "small.gguf"
    tokenizer = ml.load_tokenizer(source)
    ml.save_model(ml.load_model(source), file, format="gguf", dtype="q4_0", tokenizer=tokenizer)
    return file


def measure(file: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each storage of a file, and print them as a table."""
    rows = ml.samples.prose(options.texts)
    tokenizer = ml.load_tokenizer(file)
    figures: dict[str, dict[str, Any]] = {}
    models: dict[str, Any] = {}
    for name, quantize in STORAGES.items():
        model = ml.load_model(file, quantize=quantize, dtype=dtype)
        figures[name] = {
            "prose": ml.evaluate(model, tokenizer, rows).loss,
            "stored_MB": ml.count_parameters(model).stored_bytes / 1e6,
        }
        ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        models[name] = model
    before = {name: hash_of_base(model) for name, model in models.items()}
    seconds = time_steps(models, tokenizer, rows, options.rounds)
    print(f"\n{Path(file).name}\n{'':8}{'prose':>10}{'stored MB':>11}{'step s':>9}  bytes")
    for name, values in figures.items():
        values["step"] = spread(seconds[name])
        values["bytes"] = "equal" if hash_of_base(models[name]) == before[name] else "changed"
        print(
            f"{name:8}{values['prose']:10.5f}{values['stored_MB']:11.1f}"
            f"{values['step']['median']:9.3f}  {values['bytes']}"
        )
    return figures


def time_steps(
    models: dict[str, Any], tokenizer: Any, rows: list[Any], rounds: int
) -> dict[str, list[float]]:
    """Return the times of training steps of each model; the models take turns."""
    objective = SFT()
    examples = objective.encode(rows, tokenizer, 256)
    batch = objective.collate([examples[number] for number in range(min(4, len(examples)))])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {}
    for name, model in models.items():
        trainable = {path: p for path, p in model.named_parameters() if p.requires_grad}
        optimizers[name] = new_optimizer(model, trainable, ml.TrainConfig())
        model.train()
    for number in range(rounds + 2):  # two rounds to warm up
        for name, model in models.items():
            began = time.perf_counter()
            loss, _ = objective.loss(model, batch)
            (loss / objective.weight(batch)).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def hash_of_base(model: Any) -> str:
    """Return a hash of all frozen parameters."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            found.update(parameter.detach().view(torch.uint8).numpy())
    return found.hexdigest()


if __name__ == "__main__":
    main()
