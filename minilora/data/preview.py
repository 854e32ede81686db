r"""Preview of rows as training reads them, token by token: id, text, supervised or not, position.

    row 0: 16 tokens, 2 trained
      not trained  '<|im_start|>user\n1 plus 1<|im_end|>\n<|im_start|>assistant\n'
      trained      '2<|im_end|>'
      position      id  trained  text
             0   49152           '<|im_start|>'

The rows go through the functions of training (`encode_row`, `pack`), so the preview is exact. Rows
that training leaves out can be shown too, and an error that would stop training takes the place of
the report.

A token's text is the text that it adds after the token before it: decoded alone, a SentencePiece
token would lose its space. Texts are written as Python literals or escaped as HTML: no control
character and no tag of a dataset reaches the screen.
"""

import html
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from minilora.data import IGNORE, AnyTokenizer, DataReport, Example, encode_row
from minilora.data.chat_template import with_template_kwargs
from minilora.data.dataset_facts import Facts
from minilora.data.packing import pack
from minilora.data.read_rows import iterate_dataset

EDGE = 6  # tokens shown at each end of a run: tokens that are all trained, or all not
WIDTH = 160  # most characters of a run
STYLE = """\
.minilora-preview span{display:inline-block;text-align:center;margin:0 2px 4px;white-space:pre;\
font-family:monospace;border-bottom:3px solid transparent}
.minilora-preview .trained{font-weight:bold;border-bottom-color:currentColor;background:#2e9e4a40}
.minilora-preview small{display:block;font-size:70%;font-weight:normal;opacity:.7}
.minilora-preview pre{white-space:pre-wrap}"""


class ShownToken(NamedTuple):
    """One token.

    Attributes:
        id: the token id.
        text: the text that it adds.
        trained: True if it is supervised.
        position: its position in its document.
    """

    id: int
    text: str
    trained: bool
    position: int


@dataclass(frozen=True)
class Document:
    """One row of the dataset.

    Attributes:
        row: its number.
        packed: (number of the packed row, number in it) if rows are packed, else None.
        tokens: its tokens.
        runs: (trained, text) of neighbouring tokens that are all trained or all not.
        note: remarks.
    """

    row: int
    packed: tuple[int, int] | None
    tokens: list[ShownToken]
    runs: list[tuple[bool, str]]
    note: str

    def __str__(self) -> str:
        place = ""
        if self.packed is not None:
            place = "packed row {}, document {}, which is ".format(*self.packed)
        trained = sum(token.trained for token in self.tokens)
        return f"{place}row {self.row}: {len(self.tokens)} tokens, {trained} trained{self.note}"


@dataclass(frozen=True, repr=False)
class Preview:
    """Some rows, and the report on all: print it, or let a notebook show it.

    Attributes:
        report: a DataReport, or the message of the error that would stop training.
        facts: further facts about the dataset.
        documents: the shown rows.
        packing: how full the packed rows are.
    """

    report: DataReport | str
    facts: str
    documents: list[Document]
    packing: str = ""

    def text(self, colour: bool = False, edge: int | None = EDGE) -> str:
        """Return the preview as text; trained tokens are marked without colour too.

        Args:
            colour: use terminal colours.
            edge: tokens shown at each end of a long run; None shows all.
        """
        lines = [self._head()]
        for document in self.documents:
            lines += ["", str(document)]
            for trained, line in _lines(document, edge):
                lines.append(f"\x1b[1;32m{line}\x1b[0m" if colour and trained else line)
        return "\n".join(lines)

    def _head(self) -> str:
        head = f"{self.report}\n{self.facts}"
        if self.packing:
            head += f"\npacking: {self.packing}"
        return head

    def __str__(self) -> str:
        return self.text(colour=on_terminal())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [
            f"<style>{STYLE}</style><pre>{html.escape(self._head())}</pre>",
            "<p>Below a token: its id, its position. "
            '<span class="trained">Bold and underlined</span>: trained.</p>',
        ]
        for document in self.documents:
            tokens = "".join(map(_html, document.tokens))
            parts.append(f"<p>{html.escape(str(document))}</p><div>{tokens}</div>")
        return f'<div class="minilora-preview">{"".join(parts)}</div>'


def on_terminal() -> bool:
    """Return True if printed text may be coloured (https://no-color.org)."""
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return sys.stdout.isatty() and not plain


def preview(
    dataset: Any,
    tokenizer: AnyTokenizer,
    *,
    rows: int | Sequence[int] = 3,
    max_length: int | None = None,
    packing: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Preview:
    """Show the tokens that training reads and the tokens that it supervises; train nothing.

    Args:
        dataset: anything that `ml.train` takes.
        tokenizer: the model's tokenizer.
        rows: how many of the first rows to show, or the numbers of rows as the report names them.
            With packing: how many packed rows, or the packed rows that contain these rows.
        max_length: longest row in tokens; None does not cut. TrainConfig's default is 1024.
        packing: show packed rows; needs max_length.
        chat_template_kwargs: variables of the chat template, as in TrainConfig.

    Raises:
        ValueError: a row cannot be encoded, a number is beyond the dataset, or packing has no
            max_length.
    """
    if packing and max_length is None:
        raise ValueError(
            "packing: it fills rows of max_length tokens, and max_length is missing. Give it as in "
            "TrainConfig."
        )
    tokenizer = with_template_kwargs(tokenizer, chat_template_kwargs)
    if isinstance(dataset, Iterator):
        dataset = list(dataset)  # it is read twice
    facts = Facts(dataset, tokenizer, max_length)
    examples = list(deque(facts, maxlen=None if packing else 0))
    try:
        report = facts.report()
    except ValueError as error:
        report = f"training would stop here: {error}"
    if isinstance(rows, int):
        wanted = list(range(min(rows, facts.rows)))
    else:
        wanted = sorted(set(rows))
    beyond = [number for number in wanted if not 0 <= number < facts.rows]
    if beyond:
        raise ValueError(f"rows: expected numbers from 0 to {facts.rows - 1}, got {beyond[0]}.")
    if examples:
        by_row = not isinstance(rows, int)
        shown, packed = _packed_documents(examples, tokenizer, max_length or 0, wanted, by_row)
        return Preview(report, str(facts), shown, packed)
    shown = []
    last = max(wanted, default=-1)
    for number, row in zip(range(last + 1), iterate_dataset(dataset), strict=False):
        if number in wanted:
            shown += _documents(encode_row(row, tokenizer, max_length, index=number), tokenizer)
    return Preview(report, str(facts), shown)


def _packed_documents(
    examples: list[Example],
    tokenizer: AnyTokenizer,
    max_length: int,
    wanted: Sequence[int],
    by_row: bool,
) -> tuple[list[Document], str]:
    """Return documents of packed rows, and how full the rows are.

    `wanted` are numbers of packed rows or, with `by_row`, of rows of the dataset.
    """
    packed = pack(examples, [len(example) for example in examples], max_length)
    shown = []
    for number, indices in enumerate(packed.bins):
        members = {examples[i].row for i in indices}
        chosen = bool(members & set(wanted)) if by_row else number in wanted
        if chosen:
            shown += _documents(packed[number], tokenizer, number)
    return shown, str(packed)


def _documents(
    example: Example, tokenizer: AnyTokenizer, packed: int | None = None
) -> Iterator[Document]:
    """Yield the documents of an example; `packed` is the number of a packed row."""
    start = 0
    for number, (row, length) in enumerate(example.documents or ((example.row, len(example)),)):
        ids = example.input_ids[start : start + length]
        labels = example.labels[start : start + length]
        start += length
        trained = [label != IGNORE for label in labels]
        spelled = zip(ids, _spell(ids, tokenizer), trained, range(length), strict=True)
        tokens = [ShownToken(*token) for token in spelled]
        runs = []
        for kind, run in groupby(tokens, key=lambda token: token.trained):
            runs.append((kind, _decode([token.id for token in run], tokenizer)))
        place = None if packed is None else (packed, number)
        yield Document(row, place, tokens, runs, _note(example, any(trained)))


def _note(example: Example, trained: bool) -> str:
    note = ""
    if example.truncated:
        note += ", cut at max_length"
    if example.double_bos:
        note += ", a second BOS removed"
    if not trained:
        note += ": left out of training"
    return note


def _decode(ids: list[int], tokenizer: AnyTokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def _spell(ids: list[int], tokenizer: AnyTokenizer) -> list[str]:
    """Return the text that each token adds; an incomplete character is shown as U+FFFD."""
    texts = []
    for number, token in enumerate(ids):
        alone = _decode([token], tokenizer)
        added = ""
        if number > 0:
            before = _decode([ids[number - 1]], tokenizer)
            pair = _decode([ids[number - 1], token], tokenizer)
            if pair.startswith(before):
                added = pair[len(before) :]
        texts.append(added or alone)
    return texts


def _lines(document: Document, edge: int | None) -> Iterator[tuple[bool, str]]:
    """Yield (trained, line) for the runs and the tokens of a document."""
    for trained, text in document.runs:
        yield trained, f"  {_word(trained):<12} {_short(text)}"
    yield False, "  position      id  trained  text"
    yield from _table(document.tokens, edge)


def _table(tokens: list[ShownToken], edge: int | None) -> Iterator[tuple[bool, str]]:
    """Yield (trained, line) for each token, or for the middle of a long run."""
    for trained, group in groupby(tokens, key=lambda token: token.trained):
        run = list(group)
        first = len(run)
        last = 0
        if edge is not None and len(run) >= 2 * edge + 2:
            first = edge
            last = len(run) - edge
        for i, token in enumerate(run):
            if i < first or i >= last:
                mark = "yes" if trained else ""
                yield trained, f"  {token.position:8} {token.id:7}  {mark:7}  {token.text!r}"
            elif i == first:
                yield trained, f"         …  {last - first} more, {_word(trained)}"


def _word(trained: bool) -> str:
    return "trained" if trained else "not trained"


def _short(text: str) -> str:
    """Return a text as a literal, without its middle if it is long."""
    if len(text) <= WIDTH:
        return repr(text)
    half = WIDTH // 2
    return f"{text[:half]!r} … {text[-half:]!r}"


def _html(token: ShownToken) -> str:
    attribute = ' class="trained"' if token.trained else ""
    text = html.escape("".join(map(_visible, token.text))) or "∅"
    return f"<span{attribute}>{text}<small>{token.id}<br>{token.position}</small></span>"


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    return character if character.isprintable() else repr(character)[1:-1]
