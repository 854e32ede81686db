"""Give back what 4 bits took: the model in bf16 teaches its own NF4 copy. python examples/distill.py

One idea: quantising moves every next-token distribution a little, and how far is a number,
KL(teacher || student). An adapter trained on that number, with nothing but plain text, closes part
of the gap; on topics it never saw.

Text: paragraphs of Python's own help, every second topic to train on, the others held out. The last
line printed is one JSON document.
"""

import json
import os
import time

import minilora as ml
from minilora.losses.sft import means


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))

    # 1. Teacher and student: one file, in bf16 (or what the hardware has) and in 4 bits.
    source = ml.samples.smollm2()
    tokenizer = ml.load_tokenizer(source)
    teacher, student = ml.load_model(source), ml.load_model(source, quantize="nf4")
    topics = ml.samples.prose(rows=44, characters=500)
    train, held_out = topics[::2], topics[1::2][: 4 if short else None]

    # 2. The gap, on held-out topics: what `train` will minimise, measured without training.
    objective = ml.Distill(teacher, temperature=1.0, kind="forward")
    examples = objective.encode(held_out, tokenizer, 256)

    def measure() -> dict[str, float]:
        found, _ = means(student, examples, 4, objective)
        return {"kl": found["kl"], "loss": found["cross_entropy"]}

    best, _ = means(teacher, examples, 4, ml.SFT())
    before = measure()

    # 3. An adapter that learns the teacher's distribution.
    ml.inject(student, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=2 if short else 36,
        per_device_train_batch_size=4,
        learning_rate=4e-4,
        warmup_ratio=0.1,
        max_length=256,
    )
    result = ml.train(student, tokenizer, train, config, objective=objective)
    after = measure()

    # 4. How much of the gap is closed: of the divergence, and of what quantising added to the loss.
    closed = {"kl": 1 - after["kl"] / before["kl"]}
    closed["loss"] = (before["loss"] - after["loss"]) / (before["loss"] - best["loss"])
    print(f"\n{'held-out prose':<22}{'before':>8}{'after':>8}{'teacher':>9}{'closed':>8}")
    for name, target in (("kl", 0.0), ("loss", best["loss"])):
        print(f"{name:<22}{before[name]:8.4f}{after[name]:8.4f}{target:9.4f}{closed[name]:8.0%}")
    if not short:
        assert after["kl"] < 0.9 * before["kl"], "the student did not come closer to its teacher"

    document = {
        f"{name}_{when}": values[name]
        for when, values in (("before", before), ("after", after))
        for name in values
    }
    document |= {
        "loss_teacher": best["loss"],
        "kl_closed": closed["kl"],
        "loss_closed": closed["loss"],
    }
    document |= {"rows_train": len(train), "rows_test": len(held_out), "steps": result.steps}
    document |= {
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
