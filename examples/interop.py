"""One adapter in every storage format, and the cost of each: bytes, logits, held-out loss.

Run it with `python examples/interop.py`.

An adapter file is small and loses nothing. Merged weights are for programs that cannot read
adapters, and the cost of merging depends on the storage format of the result. So this example
measures each file after loading it again. Everything computes in fp32, so that every difference
comes from the file. The last printed line is one JSON document.
"""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import torch

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, but every check
FOLDER = Path("out/interop")
STEPS = 4 if SHORT else 50
HELD_OUT = 4 if SHORT else 40


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits (1, T, V) of one text; a transformers model wraps them in an object."""
    with torch.no_grad():
        output = model(tokens)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits


def stored_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir())


def load(path: str | Path, **options):
    """Load a model that computes in fp32."""
    return ml.load_model(path, dtype="float32", **options)


def load_in_peft(adapter: Path, base: Path):
    """Load the adapter with PEFT into the transformers model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def train_adapter(model, tokenizer, rows: list) -> None:
    """Inject an adapter on every linear layer and train it.

    Args:
        model: the base model; it receives the adapter.
        tokenizer: its tokenizer.
        rows: training rows.
    """
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        save_steps=None,
    )
    ml.train(model, tokenizer, rows, config)
    model.eval()


def print_inspection(adapter: Path) -> None:
    """Print the number of tensors of an adapter and the size of its first three updates."""
    inspection = ml.inspect(adapter)
    print(f"\n{inspection.kind}: {inspection.facts['tensors']} tensors; updates of 3 layers:")
    for layer in list(inspection.layers)[:3]:
        spectrum = inspection.layers[layer]
        print(f"  {layer}: rank {spectrum['rank']}, norm {spectrum['norm']:.2f}")


def print_merge_errors(model) -> None:
    """Print what each storage format keeps of the update, before any file is written."""
    total = ml.merge_report(model).total
    print("\nprojection of the stored change on ΔW, and error relative to ΔW:")
    for target, error in total.error.items():
        print(f"  {target}: {total.projection[target]:.3f}, {error:.2g}")


def print_table(table: dict[str, dict]) -> None:
    """Print bytes, largest change of a logit and loss of each storage format."""
    print(f"\n{'':<24}{'MB':>8}{'logit change':>14}{'held-out loss':>16}")
    for name, row in table.items():
        megabytes = "-"
        if row["bytes"] is not None:
            megabytes = f"{row['bytes'] / 1e6:.1f}"
        print(f"{name:<24}{megabytes:>8}{row['difference']:14.2g}{row['loss']:16.3f}")


def main() -> dict:
    """Train, write, load again, measure; return the printed document."""
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    rows = ml.samples.icd10(test_rows=HELD_OUT, train_rows=STEPS * 8)
    source = ml.samples.smollm2()
    tokenizer = ml.load_tokenizer(source)
    contents = []
    for row in rows.test[:4]:
        contents += [message["content"] for message in row["messages"]]
    tokens = torch.tensor([tokenizer.encode("\n".join(contents))])  # (1, T)
    table: dict[str, dict] = {}

    def measure(name: str, model, path: Path | None = None) -> float:
        """Add a row to the table; return the largest difference from the trained logits."""
        difference = (logits(model, tokens) - reference).abs().max().item()
        loss = ml.evaluate(model, tokenizer, rows.test, max_new_tokens=0).loss
        size = None if path is None else stored_bytes(path)
        table[name] = {"bytes": size, "difference": difference, "loss": loss}
        return difference

    # 1. Write a 4-bit base in the format of bitsandbytes, and train an adapter on it (QLoRA).
    model = load(source, quantize="nf4")
    ml.save_model(model, FOLDER / "base", format="bnb-4bit", tokenizer=tokenizer)
    ml.save_model(model, FOLDER / "dense", merge=True)  # the same values in fp32, for PEFT below
    train_adapter(model, tokenizer, rows.train)
    reference = logits(model, tokens)  # (1, T, V)
    with ml.disable_adapters(model):
        measure("base, 4 bits", model, FOLDER / "base")
    measure("trained, in memory", model)

    # 2. Write the adapter alone. Its file stores fingerprints of the base: 64 rows of each weight.
    adapter = FOLDER / "adapter"
    ml.save_adapter(model, adapter)
    loaded = load(FOLDER / "base")
    ml.load_adapter(loaded, adapter)
    assert measure("adapter", loaded, adapter) == 0  # every bit is equal
    if importlib.util.find_spec("peft"):
        peft_model = load_in_peft(adapter, FOLDER / "dense")
        # PEFT adds the same fp32 products in another order.
        assert measure("adapter, in PEFT", peft_model, adapter) < 1e-3
    print_inspection(adapter)

    # 3. Merge into the weights and write them. The report gives the error in advance.
    print_merge_errors(model)
    ml.save_model(model, FOLDER / "bf16", merge=True, dtype=torch.bfloat16)
    measure("merged, bf16", load(FOLDER / "bf16"), FOLDER / "bf16")
    try:
        ml.save_model(model, FOLDER / "4-bit", format="bnb-4bit", merge=True)
        raise AssertionError("Merging into 4 bits was not refused.")
    except ValueError as refusal:
        print(f"\nrefused: {refusal}")
    ml.save_model(model, FOLDER / "4-bit", format="bnb-4bit", merge=True, requantize=True)
    measure("merged, 4 bits again", load(FOLDER / "4-bit"), FOLDER / "4-bit")
    for dtype in ("bfloat16", "q8_0"):
        path = FOLDER / f"{dtype}.gguf"
        ml.save_model(model, path, format="gguf", merge=True, dtype=dtype, tokenizer=tokenizer)
        measure(f"GGUF, {dtype}", load(path), path)

    print_table(table)
    document = {
        "formats": table,
        "rows_test": len(rows.test),
        "steps": STEPS,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
