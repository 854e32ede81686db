"""Classification of the clauses of licences and terms of use.

Run it with `python examples/legal.py`.

A figure over all rows hides rare classes, so this example reports one F1 for each kind of clause.
The label of a clause is its own heading ("7. Disclaimer of Warranty"). Neither the model nor the
table lookup gets the heading.

Data: the licences and terms in PyPI's licensedcode-data (ScanCode, CC-BY-4.0). Lawyers copy from
each other, so clauses that share eight words in a row form one group, and a whole group is either
trained on or held out. The last printed line is one JSON document.
"""

import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import minilora as ml

SHA256 = "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
WHEEL = ml.samples.Pin(
    "licensedcode-data",
    "32.1.0",
    ml.samples.FilePin("licensedcode_data-32.1.0-py3-none-any.whl", 26671146, SHA256),
)
KINDS = {
    "warranty": r"warrant|as is",
    "liability": r"liabilit|damages",
    "termination": r"terminat|^term$",
    "definitions": r"definition",
    "grant": r"grant|copyright licen",
    "distribution": r"distribut|conveying",
    "modification": r"modif|derivative",
    "law": r"governing law|jurisdiction|choice of law|applicable law|disputes",
    "trademark": r"trademark|trade name|use of name|endorse",
    "export": r"export",
    "assignment": r"assign|transfer",
    "indemnity": r"indemni",
    "agreement": r"entire agreement|integration",
}
LICENCE_FILE = re.compile(r"/licenses/.*\.LICENSE$")
# A clause starts after an empty line, or at a line with a number and a capital letter.
CLAUSE_START = re.compile(r"\n\s*\n|\n(?=\s*\d+(?:\.\d+)*[.)]?\s+[A-Z])")
# The heading and the text after it, as in "7. Disclaimer of Warranty. The software is provided" or
# "b) TERMINATION\nThis licence ends".
HEADING = re.compile(
    r"\W*(?:\d+(?:\.\d+)*|[ivxIVX]+|[a-hA-H])[.):]* ([A-Z][\w'’,/ &-]{2,50}?)[.:\n] *(.+)", re.S
)
SHARED_WORDS = 8  # clauses with so many words in a row in common belong to one group


def clauses() -> Iterator[tuple[str, str]]:
    """Yield the text and the kind of each numbered clause whose heading names exactly one kind."""
    with zipfile.ZipFile(ml.samples.fetch(WHEEL)) as wheel:
        for name in sorted(wheel.namelist()):
            if not LICENCE_FILE.search(name):
                continue
            text = wheel.read(name).decode().split("\n---\n", 1)[-1]
            for paragraph in CLAUSE_START.split(text):
                match = HEADING.match(re.sub(r"[ \t]+", " ", paragraph))
                if match is None:
                    continue
                heading = match[1]
                body = " ".join(match[2].split())
                kinds = kinds_of(heading)
                if len(kinds) == 1 and len(body) >= 80:
                    yield body[:200].rsplit(" ", 1)[0], kinds[0]


def kinds_of(heading: str) -> list[str]:
    """Return the kinds of clause that a heading names."""
    return [kind for kind, pattern in KINDS.items() if re.search(pattern, heading, re.I)]


def shared_runs(texts: list[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts that contain the same run of words.

    The second text of a pair is the first one that contains the run. It can be the same text.
    """
    first: dict[tuple[str, ...], int] = {}
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        for start in range(len(words) - SHARED_WORDS + 1):
            run = tuple(words[start : start + SHARED_WORDS])
            yield i, first.setdefault(run, i)


def group_rows(kinds: dict[str, str]) -> list[list[ml.samples.Row]]:
    """Return chat rows in groups of at most three.

    Two clauses are in one group if they share a run of words, directly or through other clauses.

    Args:
        kinds: maps the text of each clause to its kind.
    """
    rows = []
    for text, kind in kinds.items():
        rows.append(ml.samples.chat_row("Kind of clause?", text, kind))
    groups = []
    for numbers in ml.samples.connected(len(rows), shared_runs(list(kinds))):
        groups.append([rows[number] for number in numbers[:3]])
    return groups


def f1(scores: ml.Scores, kind: str) -> float:
    """Return 2 · right / (chosen + expected) of one kind, by the likeliest labels.

    The result is 0 if no row has the kind as its choice or its reference.
    """
    right = 0
    for choice, reference in zip(scores.choices, scores.references, strict=True):
        if choice == reference == kind:
            right += 1
    chosen = scores.choices.count(kind)
    expected = scores.references.count(kind)
    return 2 * right / max(1, chosen + expected)


def summarise(scores: ml.Scores) -> dict[str, float]:
    """Return F1 of each kind, their mean, label accuracy and exact match."""
    figures = {f"f1 {kind}": f1(scores, kind) for kind in KINDS}
    figures["macro f1"] = sum(figures.values()) / len(KINDS)
    figures["label_accuracy"] = scores.label_accuracy or 0.0
    figures["exact_match"] = scores.exact_match or 0.0
    return figures


def main() -> dict:
    """Run the example and return the printed document. MINILORA_SHORT=1 reduces steps and rows."""
    started = time.perf_counter()
    short = bool(os.environ.get("MINILORA_SHORT"))

    # 1. Load the clauses and a model in 4 bits.
    source = ml.samples.smollm2()
    groups = group_rows(dict(clauses()))
    train, held_out = ml.samples.split_by_group(groups, 8 if short else 200, seed=0)
    model = ml.load_model(source, quantize="nf4")
    tokenizer = ml.load_tokenizer(source)
    print(f"{len(groups)} groups: {len(train)} training clauses, {len(held_out)} held-out clauses")

    def measure() -> ml.Scores:
        with ml.dequantized_weights(model):
            return ml.evaluate(
                model, tokenizer, held_out, labels=list(KINDS), max_new_tokens=6, batch_size=50
            )

    # 2. Measure, train, measure again.
    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(max_steps=2 if short else 60, learning_rate=7e-4, warmup_ratio=0.1)
    result = ml.train(model, tokenizer, train, config)
    after = measure()

    # 3. Print each figure with the number of held-out clauses behind it.
    old = summarise(before)
    new = summarise(after)
    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name, value in new.items():
        kind = name.removeprefix("f1 ")
        number = before.references.count(kind) if kind in KINDS else len(held_out)
        print(f"{name:<22}{old[name]:8.3f}{value:8.3f}   {number} clauses")
    baselines = {
        "majority_class": ml.samples.majority_class(train, held_out),
        "nearest_neighbour": ml.samples.nearest_neighbour(train, held_out),
    }
    for name, value in baselines.items():
        print(f"{name:<22}{value:16.3f}   exact match, no model")
    interval = after.interval(new["exact_match"])
    print(f"95 % interval of exact match: ± {interval:.3f}")
    if not short:
        assert new["exact_match"] > baselines["majority_class"] + 0.2, (
            "The model is not better than the most common kind."
        )

    document: dict[str, Any] = dict(baselines)
    for name, value in new.items():
        document[name] = {"before": old[name], "after": value}
    document |= {
        "rows_train": len(train),
        "rows_test": len(held_out),
        "steps": result.steps,
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
