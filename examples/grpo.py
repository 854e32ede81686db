"""Learning from rewards: a short supervised start on address → JSON, then GRPO on the score.

Run it with `python examples/grpo.py`.

Idea: supervised fine-tuning raises the probability of given answers, token by token. GRPO raises
what is measured. The model writes several answers to each address, a function scores their JSON,
and answers above the mean of their group become more likely. No answer is shown to it in this part.
It can only choose better among answers that it already gives, so a supervised start comes first.

The reward is the F1 of the fields. Whole groups of similar addresses are held out. The perplexity
of prose shows what the training costs elsewhere. The last printed line is one JSON document.
"""

import json
import os
import time

import minilora as ml

SHORT = bool(os.environ.get("MINILORA_SHORT"))  # fewer steps and rows
SFT_STEPS = 2 if SHORT else 25
GRPO_STEPS = 2 if SHORT else 30
BATCH_SIZE = 8
GROUP = 4 if SHORT else 8
ANSWER_TOKENS = 8 if SHORT else 64


def reward(prompt, answer: str, row: dict) -> float:
    """Return the F1 of the answer's fields; an answer that is not JSON has 0."""
    return ml.samples.field_f1(answer, ml.samples.answer_of(row))


def measure(model, tokenizer, rows: list[dict], prose: list[dict]) -> dict[str, float]:
    """Return validity and field F1 of greedy answers, and the perplexity of prose.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: Held-out rows.
        prose: Texts of another kind.
    """
    metrics = {"json_valid": ml.samples.json_valid, "field_f1": ml.samples.field_f1}
    scores = ml.evaluate(
        model, tokenizer, rows, metrics=metrics, max_new_tokens=ANSWER_TOKENS, batch_size=32
    ).as_dict()
    figures = {name: scores[name] for name in metrics}
    figures["prose_perplexity"] = ml.evaluate(model, tokenizer, prose, max_new_tokens=0).as_dict()[
        "perplexity"
    ]
    return figures


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print the figures, a column for each name."""
    print(f"\n{'held out':<18}" + "".join(f"{name:>10}" for name in columns))
    for figure in next(iter(columns.values())):
        values = [figures[figure] for figures in columns.values()]
        print(f"{figure:<18}" + "".join(f"{value:10.3f}" for value in values))


def main() -> dict:
    """Run the example and return the printed document; MINILORA_SHORT=1 cuts steps and rows."""
    start_time = time.perf_counter()
    source = ml.samples.smollm2()
    model = ml.load_model(source)
    tokenizer = ml.load_tokenizer(source)
    task = ml.samples.address(test_rows=4 if SHORT else 60)
    prose = ml.samples.prose(rows=2 if SHORT else 12, characters=500)
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))

    # 1. The supervised start: the form of the answer.
    rows = task.train[: SFT_STEPS * BATCH_SIZE]
    config = ml.TrainConfig(
        max_steps=SFT_STEPS, per_device_train_batch_size=BATCH_SIZE, learning_rate=5e-4
    )
    ml.train(model, tokenizer, rows, config)
    figures = {"after SFT": measure(model, tokenizer, task.test, prose)}

    # 2. GRPO on other addresses. Their answers are read by the reward alone.
    objective = ml.GRPO(
        reward=reward,
        num_generations=GROUP,
        max_completion_length=ANSWER_TOKENS,
        loss_type="dr_grpo",
        scale_rewards="none",
    )
    config = ml.TrainConfig(
        max_steps=GRPO_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
    )
    result = ml.train(model, tokenizer, task.train[len(rows) :], config, objective=objective)
    figures["after GRPO"] = measure(model, tokenizer, task.test, prose)
    print_table(figures)

    document: dict = {"steps": result.steps, "rows_test": len(task.test)}
    for name, values in figures.items():
        for figure, value in values.items():
            document[f"{figure}_{name.replace(' ', '_').lower()}"] = value
    document["reward_first"] = result.metrics["reward"][0]
    document["reward_last"] = result.metrics["reward"][-1]
    document["seconds"] = time.perf_counter() - start_time
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
