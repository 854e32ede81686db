"""Direct preference optimisation (DPO) on pairs of a right and a wrong answer.

Run it with `python examples/dpo.py`.

Idea: a preference pair states which answer is better, but does not teach the model to write one. So
the model learns to distinguish answers: it finds the right one of the allowed answers more often
(`label_accuracy`). The example does not measure the answers that it writes freely.

A row has a diagnosis, its chapter of ICD-10-CM (chosen) and another chapter (rejected). Whole
disease categories are held out. The reference is the model with its adapter disabled. The last
printed line is one JSON document.
"""

import json
import os
import random
import time

import minilora as ml


def preference_pairs(rows: list[dict], seed: int) -> list[dict]:
    """Return preference rows; the rejected answer is the right answer of another row.

    So frequent answers are also rejected frequently.
    """
    rng = random.Random(seed)
    answers = [row["messages"][-1] for row in rows]
    pairs = []
    for row in rows:
        prompt = row["messages"][:-1]
        right = row["messages"][-1]
        others = [answer for answer in answers if answer["content"] != right["content"]]
        wrong = rng.choice(others)
        pairs.append({"prompt": prompt, "chosen": [right], "rejected": [wrong]})
    return pairs


def preferred(model, tokenizer, pairs: list[dict], objective: ml.DPO) -> float:
    """Return the share of pairs whose chosen answer is the more likely one.

    The likelihoods are those of the model itself, not relative to the reference.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        pairs: Preference rows.
        objective: The objective that encodes them.
    """
    examples = objective.encode(pairs, tokenizer, None)
    correct = 0
    with ml.inference(model):
        for start in range(0, len(examples), 32):
            batch = objective.collate(examples[start : start + 32])
            logprobs, _ = ml.losses.answer_logprobs(model, batch)  # (2B,)
            chosen, rejected = logprobs.chunk(2)  # (B,) each
            correct += (chosen > rejected).sum().item()
    return correct / len(examples)


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    """Print the scores before and after training."""
    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name, score in before.items():
        print(f"{name:<22}{score:8.3f}{after[name]:8.3f}")


def flat_scores(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the scores before and after training in one flat dict."""
    flat = {}
    for when, scores in (("before", before), ("after", after)):
        for name, score in scores.items():
            flat[f"{name}_{when}"] = score
    return flat


def main() -> dict:
    """Run the example and return the printed document; MINILORA_SHORT=1 cuts steps and rows."""
    start_time = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))
    steps = 55
    batch_size = 8
    test_rows = 200
    if short:
        steps = 2
        batch_size = 4
        test_rows = 20

    # 1. A model in 4 bits, and preference pairs.
    source = ml.samples.smollm2()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    task = ml.samples.icd10(test_rows=test_rows, train_rows=steps * batch_size)
    train = preference_pairs(task.train, seed=0)
    held_out = preference_pairs(task.test, seed=0)
    objective = ml.DPO(beta=0.1)

    def measure() -> dict[str, float]:
        scores = ml.evaluate(
            model, tokenizer, task.test, labels=task.labels, max_new_tokens=0, batch_size=32
        )
        assert scores.label_accuracy is not None  # because labels are given
        return {
            "preferred": preferred(model, tokenizer, held_out, objective),
            "label_accuracy": scores.label_accuracy,
        }

    # 2. Before, training, after.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=5e-4,
        warmup_ratio=0.1,
        logging_steps=5,
    )
    result = ml.train(model, tokenizer, train, config, objective=objective, eval_dataset=held_out)
    after = measure()

    # 3. The results. The two eval figures compare with the reference: both are 0 before training.
    majority = ml.samples.majority_class(task.train, task.test)
    last_eval = result.evals[-1]
    print_table(before, after)
    for name in ("eval_accuracy", "eval_margin"):
        print(f"{name + ', held out':<30}{last_eval[name]:8.3f}")
    print(f"{'majority class':<22}{'':8}{majority:8.3f}   the most frequent answer, no model")
    if not short:
        assert after["preferred"] > before["preferred"] + 0.1
        assert after["label_accuracy"] > before["label_accuracy"] + 0.1

    document = flat_scores(before, after)
    document["majority"] = majority
    document.update(last_eval)
    document["pairs_train"] = len(train)
    document["pairs_test"] = len(held_out)
    document["steps"] = result.steps
    document["tokens_per_second"] = result.tokens_per_second
    document["seconds"] = time.perf_counter() - start_time
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
