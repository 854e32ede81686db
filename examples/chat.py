"""Instruction tuning with a chat template: conversations in which every answer is learned. python examples/chat.py

One idea: of a conversation the assistant's words are trained and nothing else, in each of its
turns. What is learned shows twice: with three turns to imitate, and without any, where an untrained
model has nothing to go by.

Task: a misspelt word, answered in one fixed sentence. Data: the dictionary of PyPI's codespell (its
words CC-BY-SA-3.0, from Wikipedia), held out by the first five letters of the right word. The last
line printed is one JSON document.
"""

import difflib
import json
import os
import random
import re
import time

import minilora as ml
from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.task import Row, question_of

SHA256 = "af2505b335e8573dbd2d384d1c4ef498f4006f4ba2d6fceca01e55b91f52628a"
WORDS = FilePin(
    "codespell_lib/data/dictionary.txt",
    1496821,
    "a457564a466120c728361e9c759b6a6ef05c2acc05c7e12d1ba0eb251036f42d",
)
WHEEL = Pin(
    "codespell", "2.4.3", FilePin("codespell-2.4.3-py3-none-any.whl", 340736, SHA256), WORDS
)
ANSWER = "I would write **{}**."
TURNS = 4


def read_words() -> dict[str, list[tuple[str, str]]]:
    """Five letters → one (wrong, right) of the words that begin so; lines with several corrections are left out."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for line in fetch(WHEEL).read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"([a-z]{5,})->([a-z]{5,})", line):
            groups.setdefault(found[2][:5], []).append((found[1], found[2]))
    return groups


def conversations(pairs: list[tuple[str, str]], turns: int) -> list[Row]:
    """`turns` pairs a conversation; the first message says what the task is."""
    rows = []
    for start in range(0, len(pairs) - turns + 1, turns):
        messages = [{"role": "system", "content": "Correct the word."}]
        for wrong, right in pairs[start : start + turns]:
            messages.append({"role": "user", "content": wrong})
            messages.append({"role": "assistant", "content": ANSWER.format(right)})
        rows.append({"messages": messages})
    return rows


def in_style(prediction: str, reference: str) -> float:
    """Is it the sentence, whatever the word?"""
    return float(re.fullmatch(r"I would write \*\*\w+\*\*\.", prediction.strip()) is not None)


def word_right(prediction: str, reference: str) -> float:
    """Is the right word among those of the answer, whatever the sentence?"""
    return float(reference.split("**")[1] in re.findall(r"\w+", prediction.lower()))


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    rng, groups = random.Random(0), read_words()
    pairs = [rng.choice(groups[letters]) for letters in rng.sample(sorted(groups), len(groups))]
    count = TURNS * (4 if short else 100)
    held_out, train = conversations(pairs[:count], TURNS), conversations(pairs[count:], TURNS)
    alone = [{"messages": [row["messages"][0], *row["messages"][-2:]]} for row in held_out]
    source = ml.samples.smollm2()
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)
    print(ml.preview(train[:1], tokenizer))

    def measure() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, rows in (("alone", alone), ("after three turns", held_out)):
            metrics, room = {"in style": in_style, "word right": word_right}, 2 if short else 20
            with ml.dequantized_weights(model):
                scores = ml.evaluate(
                    model, tokenizer, rows, metrics=metrics, max_new_tokens=room, batch_size=50
                )
            found |= {f"{metric}, {name}": value for metric, value in scores.metrics.items()}
        return found

    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(max_steps=2 if short else 20, learning_rate=1e-3, warmup_ratio=0.1)
    result = ml.train(model, tokenizer, train, config)
    after = measure()

    vocabulary, right = sorted({right for group in groups.values() for _, right in group}), 0
    for row in alone:  # among words of the same first letter and about the same length
        wrong, expected = question_of(row), row["messages"][-1]["content"].split("**")[1]
        near = [
            word for word in vocabulary if word[0] == wrong[0] and abs(len(word) - len(wrong)) < 2
        ]
        right += difflib.get_close_matches(wrong, near, 1, 0)[:1] == [expected]
    print(f"\n{'':<32}{'before':>8}{'after':>8}")
    for name in before:
        print(f"{name:<32}{before[name]:8.3f}{after[name]:8.3f}")
    print(
        f"{'nearest in the dictionary':<32}{'':8}{right / len(alone):8.3f}   a list that holds the answer, no model"
    )
    assert short or after["in style, alone"] > 0.9 > before["in style, alone"], (
        "the style was not learned"
    )

    document = {
        f"{k}, {when}": v
        for when, found in (("before", before), ("after", after))
        for k, v in found.items()
    }
    document |= {"dictionary": right / len(alone), "rows_test": len(alone), "steps": result.steps}
    document |= {
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
