"""Which kind of clause is this? Licences and terms of use, clause by clause. python examples/legal.py

One idea: a figure over all rows hides the rare classes, so every kind of clause has an F1 of its
own. A clause's label is its own heading ("7. Disclaimer of Warranty"), which neither the model nor
the table lookup gets to see.

Data: the licences and terms in PyPI's licensedcode-data (ScanCode, CC-BY-4.0). Lawyers copy:
clauses with eight words in a row in common are one group, trained on or held out. The last line
printed is one JSON document.
"""

import json
import os
import re
import time
import zipfile
from collections.abc import Iterator

import minilora as ml
from minilora.evaluation.samples.download import FilePin, Pin, fetch
from minilora.evaluation.samples.task import Row, chat_row, connected, split_by_group

SHA256 = "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
WHEEL = Pin(
    "licensedcode-data",
    "32.1.0",
    FilePin("licensedcode_data-32.1.0-py3-none-any.whl", 26671146, SHA256),
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
# "7. Disclaimer of Warranty. The software …", "b) TERMINATION\nThis licence …": the heading, and
# what follows it
HEADING = re.compile(
    r"\W*(?:\d+(?:\.\d+)*|[ivxIVX]+|[a-hA-H])[.):]* ([A-Z][\w'’,/ &-]{2,50}?)[.:\n] *(.+)", re.S
)


def clauses() -> Iterator[tuple[str, str]]:
    """(the clause's words, its kind) of every numbered clause whose heading names one kind and no other."""
    with zipfile.ZipFile(fetch(WHEEL)) as wheel:
        for name in filter(re.compile(r"/licenses/.*\.LICENSE$").search, sorted(wheel.namelist())):
            text = wheel.read(name).decode().split("\n---\n", 1)[-1]
            for paragraph in re.split(r"\n\s*\n|\n(?=\s*\d+(?:\.\d+)*[.)]?\s+[A-Z])", text):
                found = HEADING.match(re.sub(r"[ \t]+", " ", paragraph))
                heading, body = (found[1], " ".join(found[2].split())) if found else ("", "")
                kinds = [kind for kind, words in KINDS.items() if re.search(words, heading, re.I)]
                if len(kinds) == 1 and len(body) >= 80:
                    yield body[:200].rsplit(" ", 1)[0], kinds[0]


def grouped(pairs: dict[str, str], run: int = 8) -> list[list[Row]]:
    """Groups of at most three rows; clauses with `run` words in a row in common, also through a third, are one."""
    rows = [chat_row("Kind of clause?", text, kind) for text, kind in pairs.items()]
    first: dict[tuple[str, ...], int] = {}

    def shared() -> Iterator[tuple[int, int]]:
        for i, text in enumerate(pairs):
            words = re.findall(r"\w+", text.lower())
            for start in range(len(words) - run + 1):
                yield i, first.setdefault(tuple(words[start : start + run]), i)

    return [[rows[i] for i in group[:3]] for group in connected(len(rows), shared())]


def f1(scores: ml.Scores, kind: str) -> float:
    """2 · right / (chosen + there) of one kind, by the likeliest labels; 0 where nothing is either."""
    right = sum(a == b == kind for a, b in zip(scores.choices, scores.references, strict=True))
    return 2 * right / max(1, scores.choices.count(kind) + scores.references.count(kind))


def main() -> dict:
    """Run the example; returns the document it prints. MINILORA_SHORT=1 cuts steps and rows."""
    started, short = time.perf_counter(), bool(os.environ.get("MINILORA_SHORT"))
    source, groups = ml.samples.smollm2(), grouped(dict(clauses()))
    train, held_out = split_by_group(groups, 8 if short else 200, seed=0)
    model, tokenizer = ml.load_model(source, quantize="nf4"), ml.load_tokenizer(source)
    print(f"{len(train)} clauses to train on, {len(held_out)} held out, of {len(groups)} groups")

    def measure() -> ml.Scores:
        with ml.dequantized_weights(model):
            return ml.evaluate(
                model, tokenizer, held_out, labels=list(KINDS), max_new_tokens=6, batch_size=50
            )

    before = measure()
    ml.inject(model, ml.LoRAConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    config = ml.TrainConfig(max_steps=2 if short else 60, learning_rate=7e-4, warmup_ratio=0.1)
    result = ml.train(model, tokenizer, train, config)
    after = measure()

    figures = {f"f1 {kind}": [f1(scores, kind) for scores in (before, after)] for kind in KINDS}
    figures["macro f1"] = [
        sum(column) / len(KINDS) for column in zip(*figures.values(), strict=True)
    ]
    figures |= {
        name: [getattr(s, name) for s in (before, after)]
        for name in ("label_accuracy", "exact_match")
    }
    print(f"\n{'':<22}{'before':>8}{'after':>8}")
    for name, (old, new) in figures.items():
        rows = before.references.count(name.removeprefix("f1 ")) or len(held_out)
        print(f"{name:<22}{old:8.3f}{new:8.3f}   {rows} clauses")
    baselines = {
        f.__name__: f(train, held_out)
        for f in (ml.samples.majority_class, ml.samples.nearest_neighbour)
    }
    for name, value in baselines.items():
        print(f"{name:<22}{'':8}{value:8.3f}   exact match, no model")
    print(f"95 % interval of exact match: ± {after.interval(after.exact_match or 0):.3f}")
    assert short or figures["exact_match"][1] > baselines["majority_class"] + 0.2, (
        "no more than the commonest kind"
    )

    document = baselines | {
        name: dict(zip(("before", "after"), row, strict=True)) for name, row in figures.items()
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
