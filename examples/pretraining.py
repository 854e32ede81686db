"""Continued pre-training on plain text of one kind, with packed rows.

Run it with `python examples/pretraining.py`.

Plain text teaches a style of writing. So the perplexity is measured on three sets: one where it
should fall (other files of the same kind), one where it may fall (code of another project) and one
where it may rise (English prose).

Text: functions and classes of Python's standard library, with every third module held out. The
code of another project is the source of minilora. The figures differ a little between Python
versions, because the library differs. The last printed line is one JSON document.
"""

import json
import os
import random
import re
import sysconfig
import time
from pathlib import Path

import minilora as ml

# Empty lines before a function, a class or a decorator without indentation.
DEFINITION = re.compile(r"\n\n+(?=(?:@|def |class ))")


def definitions(files: list[Path], limit: int) -> list[dict[str, str]]:
    """Return `limit` rows with one top-level function or class each, cut to 900 characters.

    The draw is the same on every call.
    """
    rows = []
    for file in files:
        parts = DEFINITION.split(file.read_text(encoding="utf-8"))
        for part in parts[1:]:  # the first part contains the module's docstring and imports
            if len(part) >= 200:
                rows.append({"text": part[:900].strip()})
    return random.Random(0).sample(rows, limit)


def main() -> dict:
    """Run the example and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    started = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))

    # 1. Split the modules of the standard library, and load a model in 4 bits.
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train_modules = [file for number, file in enumerate(modules) if number % 3 != 0]
    own_modules = sorted(Path(ml.__file__).parent.rglob("*.py"))
    train_rows = definitions(train_modules, 8 if short else 72)
    test_rows = 2 if short else 20
    texts = {
        "held-out modules": definitions(modules[::3], test_rows),
        "another project's code": definitions(own_modules, test_rows),
        "English prose": ml.samples.prose(test_rows, 600),
    }
    source = ml.samples.smollm2()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)

    def measure() -> dict[str, float]:
        perplexities = {}
        with ml.dequantized_weights(model):
            for name, rows in texts.items():
                perplexities[name] = ml.evaluate(model, tokenizer, rows).perplexity
        return perplexities

    # 2. Measure, train on packed rows, measure again.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=2 if short else 16,
        per_device_train_batch_size=1 if short else 4,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        max_length=256,
        packing=True,  # several texts in a row instead of padding; no text attends to another one
    )
    result = ml.train(model, tokenizer, train_rows, config)
    after = measure()

    # 3. Print the figures.
    print(f"\n{'perplexity':<22}{'before':>8}{'after':>8}{'change':>8}")
    for name in texts:
        change = after[name] / before[name] - 1
        print(f"{name:<22}{before[name]:8.2f}{after[name]:8.2f}{change:8.1%}")
    if not short:
        assert after["held-out modules"] < before["held-out modules"], (
            "The perplexity of the held-out modules did not fall."
        )

    document = {}
    for name in texts:
        document[name] = {"before": before[name], "after": after[name]}
    document |= {
        "rows_train": len(train_rows),
        "rows_test": test_rows,
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
