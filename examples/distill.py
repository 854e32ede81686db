"""Distillation: the model in bf16 teaches its own NF4 copy.

Run it with `python examples/distill.py`.

Idea: quantisation changes every next-token distribution a little. The divergence
KL(teacher || student) measures the change. An adapter that is trained on this divergence, with
plain text only, closes a part of the gap, also on topics that it was not trained on.

Text: paragraphs of Python's own help. Every second topic is held out. The last printed line is one
JSON document.
"""

import json
import os
import time

import minilora as ml


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print the divergence and the loss, a column for each name."""
    header = f"\n{'held-out prose':<16}"
    for name in columns:
        header += f"{name:>10}"
    print(header)
    for figure in ("kl", "loss"):
        line = f"{figure:<16}"
        for values in columns.values():
            line += f"{values[figure]:10.4f}"
        print(line)


def main() -> dict:
    """Run the example and return the printed document; MINILORA_SHORT=1 cuts steps and rows."""
    start_time = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))
    steps = 36
    if short:
        steps = 2

    # 1. Teacher and student: one checkpoint, in bf16 (or the dtype of the hardware) and in 4 bits.
    source = ml.samples.smollm2()
    tokenizer = ml.load_tokenizer(source)
    teacher = ml.load_model(source)
    student = ml.load_model(source, quantize="nf4")
    topics = ml.samples.prose(rows=44, characters=500)
    train = topics[::2]
    held_out = topics[1::2]
    if short:
        held_out = held_out[:4]

    # 2. The gap on held-out topics, as `train` will minimise it.
    objective = ml.Distill(teacher, temperature=1.0, kind="forward")
    examples = objective.encode(held_out, tokenizer, 256)

    def measure() -> dict[str, float]:
        figures, _ = ml.losses.means(student, examples, 4, objective)
        return {"kl": figures["kl"], "loss": figures["cross_entropy"]}

    teacher_figures, _ = ml.losses.means(teacher, examples, 4, ml.SFT())
    best = {"kl": 0.0, "loss": teacher_figures["loss"]}
    before = measure()

    # 3. An adapter that learns the distribution of the teacher.
    ml.inject(student, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=4e-4,
        warmup_ratio=0.1,
        max_length=256,
    )
    result = ml.train(student, tokenizer, train, config, objective=objective)
    after = measure()

    # 4. The closed share of both gaps: the divergence, and the loss that quantisation added.
    closed = {}
    for name in ("kl", "loss"):
        gap = before[name] - best[name]
        closed[name] = (before[name] - after[name]) / gap
    print_table({"before": before, "after": after, "teacher": best})
    print(f"closed: {closed['kl']:.0%} of the divergence, {closed['loss']:.0%} of the loss")
    if not short:
        assert after["kl"] < 0.9 * before["kl"], "the student did not move towards its teacher"

    document = {
        "kl_before": before["kl"],
        "loss_before": before["loss"],
        "kl_after": after["kl"],
        "loss_after": after["loss"],
        "loss_teacher": best["loss"],
        "kl_closed": closed["kl"],
        "loss_closed": closed["loss"],
        "rows_train": len(train),
        "rows_test": len(held_out),
        "steps": result.steps,
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - start_time,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
