"""Preferences instead of answers: DPO on pairs of a right and a wrong answer. python examples/dpo.py

One idea: a pair says which answer is better and never how to write one. So the model learns to tell
them apart, which the likeliest of the allowed answers shows (`label_accuracy`); what it writes
freely is another matter.

A row: a diagnosis, its chapter of ICD-10-CM (chosen), another chapter (rejected); held out by
disease category. The reference is the model with its adapter off. The last line printed is one JSON
document.
"""

import json
import os
import random
import time

import minilora as ml
from minilora.losses.dpo import answer_logprobs
from minilora.models.padded_batch import inference


def pairs(rows: list[dict], seed: int) -> list[dict]:
    """Preference rows. The wrong answer is another row's right one, so that common answers are as often wrong."""
    rng = random.Random(seed)
    answers = [row["messages"][-1] for row in rows]
    found = []
    for row in rows:
        *prompt, right = row["messages"]
        wrong = rng.choice([answer for answer in answers if answer["content"] != right["content"]])
        found.append({"prompt": prompt, "chosen": [right], "rejected": [wrong]})
    return found


def preferred(model, tokenizer, rows: list[dict], objective: ml.DPO) -> float:
    """Share of pairs whose chosen answer is the likelier one, outright and not against the reference."""
    examples, right = objective.encode(rows, tokenizer, None), 0
    with inference(model):
        for start in range(0, len(examples), 32):
            answers, _ = answer_logprobs(model, objective.collate(examples[start : start + 32]))
            chosen, rejected = answers.chunk(2)
            right += int((chosen > rejected).sum())
    return right / len(examples)


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    steps, batch = (2, 4) if short else (55, 8)

    # 1. A model in 4 bits and pairs.
    source = ml.samples.smollm2()
    task = ml.samples.icd10(test_rows=20 if short else 200, train_rows=steps * batch)
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)
    train, held_out = (pairs(rows, seed=0) for rows in (task.train, task.test))
    objective = ml.DPO(beta=0.1)

    def measure() -> dict[str, float]:
        scores = ml.evaluate(
            model, tokenizer, task.test, labels=task.labels, max_new_tokens=0, batch_size=32
        )
        return {
            "preferred": preferred(model, tokenizer, held_out, objective),
            "constrained": scores.label_accuracy or 0.0,
        }

    # 2. Before, training, after.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        logging_steps=5,
    )
    result = ml.train(model, tokenizer, train, config, objective=objective, eval_dataset=held_out)
    after = measure()

    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name in before:
        print(f"{name:<22}{before[name]:8.3f}{after[name]:8.3f}")
    for name in ("eval_accuracy", "eval_margin"):  # against the reference, where both are 0 before
        print(f"{name + ', held out':<30}{result.evals[-1][name]:8.3f}")
    majority = ml.samples.majority_class(task.train, task.test)
    print(f"{'majority class':<22}{'':8}{majority:8.3f}   the commonest training answer, no model")
    if not short:
        assert (
            after["preferred"] > before["preferred"] + 0.1
            and after["constrained"] > before["constrained"] + 0.1
        )

    document = {
        f"{name}_{when}": value
        for when, found in (("before", before), ("after", after))
        for name, value in found.items()
    }
    document |= {"majority": majority, **result.evals[-1]}
    document |= {"pairs_train": len(train), "pairs_test": len(held_out), "steps": result.steps}
    document |= {
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
