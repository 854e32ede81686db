"""Instruction tuning with a chat template: every answer of a conversation is supervised.

Run it with `python examples/chat.py`.

Idea: training supervises the assistant's messages and no others, in every turn. The example tests
the model in two ways: after three turns that it can imitate, and without them, where an untrained
model has no pattern to follow.

Task: answer a misspelt word with one fixed sentence that contains the right word. Data: the
dictionary of codespell from PyPI (CC-BY-SA-3.0, from Wikipedia). No held-out word begins with the
same five letters as a training word. The last printed line is one JSON document.
"""

import difflib
import json
import os
import random
import re
import time

import minilora as ml

DICTIONARY = ml.samples.FilePin(
    name="codespell_lib/data/dictionary.txt",
    size=1496821,
    sha256="a457564a466120c728361e9c759b6a6ef05c2acc05c7e12d1ba0eb251036f42d",
)
WHEEL = ml.samples.FilePin(
    name="codespell-2.4.3-py3-none-any.whl",
    size=340736,
    sha256="af2505b335e8573dbd2d384d1c4ef498f4006f4ba2d6fceca01e55b91f52628a",
)
CODESPELL = ml.samples.Pin("codespell", "2.4.3", archive=WHEEL, member=DICTIONARY)
ANSWER = "I would write **{}**."
TURNS = 4  # turns of a conversation


def read_words() -> dict[str, list[tuple[str, str]]]:
    """Return (wrong, right) words, grouped by the first five letters of the right word.

    Lines with several corrections are left out.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for line in ml.samples.fetch(CODESPELL).read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([a-z]{5,})->([a-z]{5,})", line)
        if match:
            wrong, right = match.groups()
            groups.setdefault(right[:5], []).append((wrong, right))
    return groups


def draw_pairs(groups: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return one pair of each group, in random order."""
    rng = random.Random(0)
    pairs = []
    for letters in rng.sample(sorted(groups), len(groups)):
        pairs.append(rng.choice(groups[letters]))
    return pairs


def conversations(pairs: list[tuple[str, str]]) -> list[ml.samples.Row]:
    """Return conversations of TURNS pairs each; the system message states the task."""
    rows = []
    for start in range(0, len(pairs) - TURNS + 1, TURNS):
        messages = [{"role": "system", "content": "Correct the word."}]
        for wrong, right in pairs[start : start + TURNS]:
            messages.append({"role": "user", "content": wrong})
            messages.append({"role": "assistant", "content": ANSWER.format(right)})
        rows.append({"messages": messages})
    return rows


def last_turns(rows: list[ml.samples.Row]) -> list[ml.samples.Row]:
    """Return the system message and the last turn of each conversation."""
    shortened = []
    for row in rows:
        system = row["messages"][0]
        shortened.append({"messages": [system, *row["messages"][-2:]]})
    return shortened


def in_style(prediction: str, reference: str) -> float:
    """Return 1 if the answer is the fixed sentence with any word."""
    match = re.fullmatch(r"I would write \*\*\w+\*\*\.", prediction.strip())
    return float(match is not None)


def word_right(prediction: str, reference: str) -> float:
    """Return 1 if the right word is in the answer, in any sentence."""
    words = re.findall(r"\w+", prediction.lower())
    return float(right_word(reference) in words)


def right_word(answer: str) -> str:
    """Return the word of an answer in the fixed sentence."""
    return answer.split("**")[1]


def dictionary_score(rows: list[ml.samples.Row], words: list[str]) -> float:
    """Return the share of rows whose right word is the most similar word of a dictionary.

    Only dictionary words with the same first letter and about the same length are compared.
    """
    correct = 0
    for row in rows:
        wrong = ml.samples.question_of(row)
        right = right_word(ml.samples.answer_of(row))
        candidates = [word for word in words if word[0] == wrong[0]]
        candidates = [word for word in candidates if abs(len(word) - len(wrong)) < 2]
        nearest = difflib.get_close_matches(wrong, candidates, n=1, cutoff=0)
        if nearest == [right]:
            correct += 1
    return correct / len(rows)


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    """Print the scores before and after training."""
    print(f"\n{'':<32}{'before':>8}{'after':>8}")
    for name, score in before.items():
        print(f"{name:<32}{score:8.3f}{after[name]:8.3f}")


def flat_scores(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return the scores before and after training in one flat dict."""
    flat = {}
    for when, scores in (("before", before), ("after", after)):
        for name, score in scores.items():
            flat[f"{name}, {when}"] = score
    return flat


def main() -> dict:
    """Run the example and return the printed document; MINILORA_SHORT=1 cuts steps and rows."""
    start_time = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))
    held_out_conversations = 100
    steps = 20
    max_new_tokens = 20
    if short:
        held_out_conversations = 4
        steps = 2
        max_new_tokens = 2

    # 1. Conversations of four turns, and the held-out ones without their first three turns.
    groups = read_words()
    pairs = draw_pairs(groups)
    held_out_pairs = TURNS * held_out_conversations
    held_out = conversations(pairs[:held_out_pairs])
    train = conversations(pairs[held_out_pairs:])
    alone = last_turns(held_out)

    # 2. A model in 4 bits. The preview shows which tokens are supervised.
    source = ml.samples.smollm2()
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    print(ml.preview(train[:1], tokenizer))

    def measure() -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, rows in (("alone", alone), ("after three turns", held_out)):
            with ml.dequantized_weights(model):
                scores = ml.evaluate(
                    model,
                    tokenizer,
                    rows,
                    metrics={"in style": in_style, "word right": word_right},
                    max_new_tokens=max_new_tokens,
                    batch_size=50,
                )
            for metric, value in scores.metrics.items():
                figures[f"{metric}, {name}"] = value
        return figures

    # 3. Before, training, after.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(max_steps=steps, learning_rate=1e-3, warmup_ratio=0.1)
    result = ml.train(model, tokenizer, train, config)
    after = measure()

    # 4. A baseline without a model: the nearest word of a dictionary that contains the right word.
    words = set()
    for group in groups.values():
        for _, right in group:
            words.add(right)
    dictionary = dictionary_score(alone, sorted(words))

    print_table(before, after)
    print(f"{'nearest in the dictionary':<32}{'':8}{dictionary:8.3f}   no model")
    if not short:
        assert before["in style, alone"] < 0.9
        assert after["in style, alone"] > 0.9, "the model did not learn the style"

    document = flat_scores(before, after)
    document["dictionary"] = dictionary
    document["rows_test"] = len(alone)
    document["steps"] = result.steps
    document["tokens_per_second"] = result.tokens_per_second
    document["seconds"] = time.perf_counter() - start_time
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
