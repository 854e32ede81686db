"""Pre-training, continued: plain text, packed, of one kind. python examples/pretraining.py

One idea: what plain text teaches is a way of writing. So perplexity is measured where it should
fall (other files of the same kind), where it may (the same language by another hand) and where it
may rise (English prose).

Text: functions and classes of Python's own standard library, every third module held out whole; by
another hand is minilora's own source. Figures differ a little from one Python to the next, as its
library does. The last line printed is one JSON document.
"""

import json
import os
import random
import re
import sysconfig
import time
from pathlib import Path

import minilora as ml


def definitions(files: list[Path], limit: int) -> list[dict[str, str]]:
    """`limit` rows of one top-level function or class each, cut to 900 characters; the same on every call."""
    found = []
    for file in files:
        parts = re.split(r"\n\n+(?=(?:@|def |class ))", file.read_text(encoding="utf-8"))
        found += [{"text": part[:900].strip()} for part in parts[1:] if len(part) >= 200]
    return random.Random(0).sample(found, limit)


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))

    # 1. Modules of one file, and what is held out.
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = definitions([file for i, file in enumerate(modules) if i % 3], 8 if short else 72)
    few = 2 if short else 20
    texts = {
        "held-out modules": definitions(modules[::3], few),
        "another hand's code": definitions(sorted(Path(ml.__file__).parent.rglob("*.py")), few),
        "English prose": ml.samples.prose(few, 600),
    }
    source = ml.samples.smollm2()
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)

    def measure() -> dict[str, float]:
        with ml.dequantized_weights(model):
            return {
                name: ml.evaluate(model, tokenizer, rows, batch_size=8).perplexity
                for name, rows in texts.items()
            }

    # 2. Before, training on rows that are full, after.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=2 if short else 16,
        per_device_train_batch_size=1 if short else 4,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        max_length=256,
        packing=True,  # several texts a row, none of which sees another: no padding is computed
    )
    result = ml.train(model, tokenizer, train, config)
    after = measure()

    print(f"\n{'perplexity':<22}{'before':>8}{'after':>8}{'change':>8}")
    for name in texts:
        print(
            f"{name:<22}{before[name]:8.2f}{after[name]:8.2f}{after[name] / before[name] - 1:8.1%}"
        )
    assert short or after["held-out modules"] < before["held-out modules"], (
        "nothing was learned of the library"
    )

    document = {name: {"before": before[name], "after": after[name]} for name in texts}
    document |= {
        "rows_train": len(train),
        "rows_test": few,
        "steps": result.steps,
        "tokens": result.tokens,
    }
    document |= {
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
