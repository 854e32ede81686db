r"""Rows as training will see them, token by token: id, text, trained or not, document, position.

    row 0: 16 tokens, 2 trained
      not trained  '<|im_start|>user\n1 plus 1<|im_end|>\n<|im_start|>assistant\n'
      trained      '2<|im_end|>'
      position      id  trained  text
             0   49152           '<|im_start|>'

The rows go through what training uses (`encode_row`, `pack`), so what is shown is what is learned. Rows that training
leaves out can be shown too, and what would stop training is shown in place of the report.
A token's text is what it adds behind the one before it: decoded alone, SentencePiece would lose its space. Texts are
written as Python literals or escaped as HTML: no control character and no tag of a dataset reaches the screen.
"""

import html
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from minilora.data import IGNORE, AnyTokenizer, DataReport, Example, encode_row
from minilora.data.dataset_facts import Facts
from minilora.data.formats import iterate_dataset
from minilora.data.packing import pack

EDGE = 6  # tokens shown at each end of a run of tokens that are all trained, or all not
WIDTH = 160  # characters of a run
STYLE = """\
.minilora-preview span{display:inline-block;text-align:center;margin:0 2px 4px;white-space:pre;font-family:monospace;\
border-bottom:3px solid transparent}
.minilora-preview .trained{font-weight:bold;border-bottom-color:currentColor;background:#2e9e4a40}
.minilora-preview small{display:block;font-size:70%;font-weight:normal;opacity:.7}
.minilora-preview pre{white-space:pre-wrap}"""


class ShownToken(NamedTuple):
    """One token: its id, what it adds to the text, whether it is trained, its position in its document."""

    id: int
    text: str
    trained: bool
    position: int


@dataclass(frozen=True)
class Document:
    """One row of the dataset; `packed` is (number of the packed row, number in it) if rows are packed."""

    row: int
    packed: tuple[int, int] | None
    tokens: list[ShownToken]
    runs: list[tuple[bool, str]]  # (trained, text) of tokens that are trained, or not, together
    note: str

    def __str__(self) -> str:
        where = "" if self.packed is None else "packed row {}, document {}, which is ".format(*self.packed)
        trained = sum(token.trained for token in self.tokens)
        return f"{where}row {self.row}: {len(self.tokens)} tokens, {trained} trained{self.note}"


@dataclass(frozen=True, repr=False)
class Preview:
    """Some rows, and the report about all: `print` it, or let a notebook show it.

    report: a DataReport, or the message of the ValueError that training would raise. facts: what else was seen.
    """

    report: DataReport | str
    facts: str
    documents: list[Document]
    packing: str = ""  # how full the packed rows are

    def text(self, colour: bool = False, edge: int | None = EDGE) -> str:
        """As text; of a long run `edge` tokens at each end, None for all. What is trained shows without colour too."""
        lines = [self._head()]
        for document in self.documents:
            lines += ["", str(document)]
            shown = [(trained, f"  {_word(trained):<12} {_short(text)}") for trained, text in document.runs]
            shown += [(False, "  position      id  trained  text"), *_table(document.tokens, edge)]
            lines += [f"\x1b[1;32m{line}\x1b[0m" if colour and trained else line for trained, line in shown]
        return "\n".join(lines)

    def _head(self) -> str:
        return f"{self.report}\n{self.facts}" + (f"\npacking: {self.packing}" if self.packing else "")

    def __str__(self) -> str:
        return self.text(colour=on_terminal())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<style>{STYLE}</style><pre>{html.escape(self._head())}</pre>"]
        parts += [
            '<p>Below a token: its id, its position. <span class="trained">Bold and underlined</span>: trained.</p>'
        ]
        for document in self.documents:
            tokens = "".join(map(_html, document.tokens))
            parts.append(f"<p>{html.escape(str(document))}</p><div>{tokens}</div>")
        return f'<div class="minilora-preview">{"".join(parts)}</div>'


def on_terminal() -> bool:
    """Whether what is printed may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def preview(
    dataset: Any, tokenizer: AnyTokenizer, *, rows: int | Sequence[int] = 3, max_length: int | None = None,
    packing: bool = False,
) -> Preview:  # fmt: skip
    """What training on `dataset` (anything `ml.train` takes) will read and learn. Nothing is trained.

    rows: how many of the first rows to show, or which, by the numbers that the report names; with packing, how many
    packed rows, or those which hold these rows. max_length, packing: as in TrainConfig, where max_length is 1024.
    ValueError: a row that cannot be encoded, a number beyond the dataset, packing without max_length.
    """
    if packing and max_length is None:
        raise ValueError("packing: it fills rows of max_length tokens, and there is none. Give it as in TrainConfig.")
    dataset = list(dataset) if isinstance(dataset, Iterator) else dataset  # it is read twice
    encoder = Facts(dataset, tokenizer, max_length)
    kept = list(deque(encoder, maxlen=None if packing else 0))
    try:
        report = encoder.report()
    except ValueError as error:
        report = f"training would stop here: {error}"
    wanted = range(min(rows, encoder.rows)) if isinstance(rows, int) else sorted(set(rows))
    if beyond := [number for number in wanted if not 0 <= number < encoder.rows]:
        raise ValueError(f"rows: expected numbers from 0 to {encoder.rows - 1}, got {beyond[0]}.")
    if kept:
        filled = pack(kept, [len(example) for example in kept], max_length or 0)
        held = [{kept[i].row for i in bin} for bin in filled.bins]
        chosen = wanted if isinstance(rows, int) else [i for i, found in enumerate(held) if found & set(wanted)]
        shown = [document for i in chosen if i < len(filled) for document in _documents(filled[i], tokenizer, i)]
        return Preview(report, str(encoder), shown, str(filled))
    last = max(wanted, default=-1)
    picked = ((i, row) for i, row in zip(range(last + 1), iterate_dataset(dataset), strict=False) if i in wanted)
    examples = (encode_row(row, tokenizer, max_length, index=i) for i, row in picked)
    shown = [document for example in examples for document in _documents(example, tokenizer)]
    return Preview(report, str(encoder), shown)


def _documents(example: Example, tokenizer: AnyTokenizer, packed: int | None = None) -> Iterator[Document]:
    start = 0
    for number, (row, length) in enumerate(example.documents or ((example.row, len(example)),)):
        ids, labels = (part[start : start + length] for part in (example.input_ids, example.labels))
        start += length
        trained = [label != IGNORE for label in labels]
        tokens = [ShownToken(*token) for token in zip(ids, _spell(ids, tokenizer), trained, range(length), strict=True)]
        runs = [(kind, [token.id for token in run]) for kind, run in groupby(tokens, key=lambda token: token.trained)]
        note = "" if any(trained) else ": left out of training"
        note = ", cut at max_length" * example.truncated + ", a second BOS removed" * example.double_bos + note
        place = None if packed is None else (packed, number)
        yield Document(row, place, tokens, [(kind, _decode(run, tokenizer)) for kind, run in runs], note)


def _decode(ids: list[int], tokenizer: AnyTokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _spell(ids: list[int], tokenizer: AnyTokenizer) -> list[str]:
    """What each token adds to the text; a part of a character, which is no text yet, is shown as U+FFFD."""
    alone = [_decode([token], tokenizer) for token in ids]
    pairs = [_decode([*pair], tokenizer) for pair in zip(ids, ids[1:], strict=False)]
    behind = (
        (pair[len(before) :] if pair.startswith(before) else "") or text
        for before, pair, text in zip(alone, pairs, alone[1:], strict=False)
    )
    return [*alone[:1], *behind]


def _table(tokens: list[ShownToken], edge: int | None) -> Iterator[tuple[bool, str]]:
    """(trained, line) of each token, or of the middle of a run."""
    for trained, found in groupby(tokens, key=lambda token: token.trained):
        run = list(found)
        first, last = (len(run), 0) if edge is None or len(run) < 2 * edge + 2 else (edge, len(run) - edge)
        for i, token in enumerate(run):
            if i < first or i >= last:
                mark = "yes" if trained else ""
                yield trained, f"  {token.position:8} {token.id:7}  {mark:7}  {token.text!r}"
            elif i == first:
                yield trained, f"         …  {last - first} more, {_word(trained)}"


def _word(trained: bool) -> str:
    return "trained" if trained else "not trained"


def _short(text: str) -> str:
    """A literal of a text, its middle left out if it is long."""
    half = WIDTH // 2
    return repr(text) if len(text) <= WIDTH else f"{text[:half]!r} … {text[-half:]!r}"


def _html(token: ShownToken) -> str:
    kind = ' class="trained"' if token.trained else ""
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else repr(c)[1:-1] for c in token.text)
    return f"<span{kind}>{html.escape(text) or '∅'}<small>{token.id}<br>{token.position}</small></span>"
