"""One adapter through every door, and what each door costs: bytes, logits, held-out loss. python examples/interop.py

One idea: an adapter is a small file that loses nothing; merged weights are for readers that know no
adapters, and what merging costs depends on how the result is stored. So measure each file as it
comes back, not as it went in. Everything computes in fp32, so that a difference is the file's. The
last line printed is one JSON document.
"""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import torch

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows, every check
FOLDER = Path("out/interop")
STEPS, HELD_OUT = (4, 4) if SHORT else (50, 40)


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """(1, T, V) of one held-out text; a transformers model wraps them."""
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


def in_peft(adapter: Path, base: Path):
    """The adapter where it is at home elsewhere: PEFT, on transformers' model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def main() -> dict:
    """Train, write, read back, measure; returns the document it prints."""
    started = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    rows = ml.samples.icd10(test_rows=HELD_OUT, train_rows=STEPS * 8)
    source = ml.samples.smollm2()
    tokenizer = ml.load_tokenizer(source)
    text = "\n".join(message["content"] for row in rows.test[:4] for message in row["messages"])
    tokens = torch.tensor([tokenizer.encode(text)])
    table: dict[
        str, tuple[int | None, float, float]
    ] = {}  # door -> bytes, largest logit difference, loss

    def load(path: str | Path, **options):
        return ml.load_model(path, dtype="float32", **options)

    def measure(door: str, model, path: Path | None = None) -> float:
        """A row of the table; returns the largest difference of a logit from the trained model's."""
        difference = (logits(model, tokens) - reference).abs().max().item()
        loss = ml.evaluate(model, tokenizer, rows.test, max_new_tokens=0).loss
        table[door] = (size(path) if path else None, difference, loss)
        return difference

    # 1. A base in 4 bits, as bitsandbytes keeps it, and an adapter trained on it (QLoRA).
    model = load(source, quantize="nf4")
    ml.save_model(model, FOLDER / "base", format="bnb-4bit", tokenizer=tokenizer)
    ml.save_model(model, FOLDER / "dense", merge=True)  # the same values in fp32, for PEFT below
    before = ml.evaluate(model, tokenizer, rows.test, max_new_tokens=0).loss
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    steps = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "save_steps": None,
    }
    ml.train(model, tokenizer, rows.train, ml.TrainConfig(**steps))
    reference = logits(model.eval(), tokens)
    with ml.disable_adapters(model):
        difference = (logits(model, tokens) - reference).abs().max().item()
    table["base, 4 bits"] = (size(FOLDER / "base"), difference, before)
    measure("trained, in memory", model)

    # 2. The adapter alone: 64 rows of each weight tell which base it belongs to.
    ml.save_adapter(model, FOLDER / "adapter")
    again = load(FOLDER / "base")
    ml.load_adapter(again, FOLDER / "adapter")
    assert measure("adapter", again, FOLDER / "adapter") == 0  # every bit
    if importlib.util.find_spec("peft"):
        moved = measure(
            "adapter, in PEFT", in_peft(FOLDER / "adapter", FOLDER / "dense"), FOLDER / "adapter"
        )
        assert moved < 1e-3  # fp32, the same products added in another order
    learned = ml.inspect(FOLDER / "adapter")
    print(f"\n{learned.kind}: {learned.facts['tensors']} tensors; first layers' updates:")
    print(
        "\n".join(
            f"  {layer}: rank {s['rank']}, norm {s['norm']:.2f}"
            for layer, s in [*learned.layers.items()][:3]
        )
    )

    # 3. Merged. What storing it will lose is known before anything is written.
    report = ml.merge_report(model)
    print(
        "\nlost by storing W + ΔW, relative to ΔW:",
        {t: f"{e:.2g}" for t, e in report.total.error.items()},
    )
    ml.save_model(model, FOLDER / "bf16", merge=True, dtype=torch.bfloat16)
    measure("merged, bf16", load(FOLDER / "bf16"), FOLDER / "bf16")
    try:
        ml.save_model(model, FOLDER / "4-bit", format="bnb-4bit", merge=True)
        raise AssertionError("merging into 4 bits was not refused")
    except ValueError as refusal:
        print(f"\nrefused: {refusal}")
    ml.save_model(model, FOLDER / "4-bit", format="bnb-4bit", merge=True, requantize=True)
    measure("merged, 4 bits again", load(FOLDER / "4-bit"), FOLDER / "4-bit")
    for kind in ("bfloat16", "q8_0"):
        path = FOLDER / f"{kind}.gguf"
        ml.save_model(model, path, format="gguf", merge=True, dtype=kind, tokenizer=tokenizer)
        measure(f"GGUF, {kind}", load(path), path)

    print(f"\n{'':<24}{'MB':>8}{'logits move':>14}{'held-out loss':>16}")
    for door, (size_, difference, loss) in table.items():
        print(
            f"{door:<24}{'-' if size_ is None else f'{size_ / 1e6:.1f}':>8}{difference:14.2g}{loss:16.3f}"
        )
    document = {
        "doors": {
            door: dict(zip(("bytes", "difference", "loss"), row, strict=True))
            for door, row in table.items()
        }
    }
    document |= {
        "rows_test": len(rows.test),
        "steps": STEPS,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
