"""A whole dataset as examples, with a report on its rows.

The examples are in memory, or in files that are written row by row (dataset_cache.py).
"""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from minilora.data.dataset_cache import StoredExamples, cached, load, store, stored_tokens
from minilora.data.formats import Chat, Text, as_messages, extra_keys
from minilora.data.loss_mask import Example, encode_row
from minilora.data.prompt import is_special
from minilora.data.read_rows import Row, check_file, iterate_dataset
from minilora.data.report import DataReport, numbers
from minilora.data.tokenizer import AnyTokenizer

STREAM = 64 * 2**20  # bytes: the tokens of a larger file go to a temporary file, not to memory


@dataclass(frozen=True)
class EncodedDataset(Sequence[Example]):
    """The examples with supervised tokens, and the report on all rows.

    Attributes:
        examples: the examples.
        report: figures of all rows.
    """

    examples: Sequence[Example]
    report: DataReport

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.lengths
        return [len(example) for example in self.examples]


def content_hash(examples: Sequence[Any]) -> str:
    """Return a hash of the tokens and labels of examples, and of their order.

    Examples in files and in memory have the same hash.

    Args:
        examples: examples of any objective. Of a dataclass, the fields are hashed that are examples,
            numbers or texts; of other types, the lengths alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(examples, EncodedDataset):
        lengths = examples.lengths
        examples = examples.examples
    else:
        lengths = [len(example) for example in examples]
    if isinstance(examples, StoredExamples):
        for part in examples.token_parts():
            digest.update(part)
    else:
        for example in examples:
            _hash_example(digest, example)
    digest.update(repr(lengths).encode())
    return digest.hexdigest()


def _hash_example(digest: Any, example: Any) -> None:
    """Add an example to a hash: its tokens and labels, and the fields that an objective added."""
    known: set[str] = set()
    if isinstance(example, Example):
        digest.update(stored_tokens(example))
        known = {field.name for field in fields(Example)}
    if not is_dataclass(example):
        return
    for field in fields(example):
        value = getattr(example, field.name)
        if isinstance(value, Example):
            _hash_example(digest, value)
        elif field.name not in known and isinstance(value, int | float | str):
            digest.update(repr(value).encode())


def encode_dataset(
    dataset: Any,
    tokenizer: AnyTokenizer,
    max_length: int | None = None,
    *,
    cache: str | Path | None = None,
) -> EncodedDataset:
    """Encode every row of a dataset.

    With a cache, or for a file above STREAM bytes, memory does not grow with the file (all rows of
    a .json file and a row group of a .parquet file are read at once).

    Args:
        dataset: anything that `read_dataset` takes.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens; longer rows are cut. None does not cut.
        cache: folder that keeps the examples of a dataset file for the next call; None keeps
        nothing.

    Raises:
        ValueError: a row is invalid, the dataset is empty, or no row has a supervised token.
    """
    path = Path(dataset) if isinstance(dataset, str | Path) else None
    if cache is not None and path is None:
        raise ValueError(
            "dataset_cache: it keeps dataset files, and this dataset is a "
            f"{type(dataset).__name__}. Pass a path, or leave dataset_cache None."
        )
    encoder = Encoder(dataset, tokenizer, max_length)
    if path is not None:
        check_file(path)
        if cache is not None:
            entry = cached(path, tokenizer, max_length, Path(cache), encoder)
            return EncodedDataset(*load(entry))
        if path.stat().st_size > STREAM:
            folder = tempfile.TemporaryDirectory(prefix="minilora-")
            store(Path(folder.name), encoder)
            return EncodedDataset(*load(Path(folder.name), folder))
    examples = list(encoder)
    return EncodedDataset(examples, encoder.report())


class Encoder:
    """Encode a dataset row by row: iterate over it, then call `report`.

    Args:
        dataset: anything that `read_dataset` takes.
        tokenizer: the model's tokenizer.
        max_length: longest example in tokens; None does not cut.

    Attributes:
        rows: number of rows.
        tokens: tokens of the examples.
        trained_tokens: supervised tokens.
        longest: tokens of the longest example.
        keys: keys of rows that are not read.
        sources: of a mixture: (rows, tokens) of each dataset.
        noted: row numbers for each remark of the report.
        special_tokens: special tokens whose text is in the content of a row.
    """

    def __init__(self, dataset: Any, tokenizer: AnyTokenizer, max_length: int | None):
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rows = 0
        self.tokens = 0
        self.trained_tokens = 0
        self.longest = 0
        self.keys: set[str] = set()
        self.sources: dict[str, tuple[int, int]] = {}
        remarks = (
            "truncated",
            "untrained",
            "eos_missing",
            "double_bos",
            "dropped_turns",
            "special_text",
            "empty",
            "untemplated",
        )
        self.noted: dict[str, list[int]] = {remark: [] for remark in remarks}
        self.special_tokens: set[str] = set()
        self._special = SpecialTokens(tokenizer)

    def __iter__(self) -> Iterator[Example]:
        for index, row in enumerate(iterate_dataset(self.dataset)):
            example = encode_row(row, self.tokenizer, self.max_length, index=index)
            self.note(row, example)
            if example.trained_tokens:
                yield example

    def note(self, row: Row, example: Example) -> None:
        """Count a row for the report.

        Args:
            row: the row.
            example: the row as tokens.
        """
        self.rows += 1
        self.keys |= extra_keys(row, example.row)
        if example.trained_tokens:
            self._count(row, example)
        sample = as_messages(row, example.row)
        special = self._special.in_content(sample, example)
        self.special_tokens |= special
        has_template = bool(self.tokenizer.chat_template)
        remarks = {
            "truncated": example.truncated,
            "untrained": not example.trained_tokens,
            "eos_missing": self._lacks_eos(example),
            "double_bos": example.double_bos,
            "dropped_turns": example.dropped_turns > 0,
            "special_text": bool(special),
            "empty": _has_empty_answer(sample),
            "untemplated": isinstance(sample, Text) and sample.prompt and has_template,
        }
        for remark, applies in remarks.items():
            if applies:
                self.noted[remark].append(example.row)

    def _count(self, row: Row, example: Example) -> None:
        self.tokens += len(example)
        self.trained_tokens += example.trained_tokens
        self.longest = max(self.longest, len(example))
        source = getattr(row, "source", None)  # a row of minilora.mix_datasets has one
        if source is not None:
            rows, tokens = self.sources.get(source, (0, 0))
            self.sources[source] = (rows + 1, tokens + len(example))

    def _lacks_eos(self, example: Example) -> bool:
        if not example.trained_tokens or example.truncated:
            return False
        eos = self.tokenizer.eos_token_id
        return eos is None or eos not in example.labels

    def report(self) -> DataReport:
        """Return the report on all rows.

        Raises:
            ValueError: no row has a supervised token, or every answer is empty.
        """
        empty = len(self.noted["empty"])
        if not self.trained_tokens or empty == self.rows:
            raise ValueError(
                f"dataset: none of {self.rows} rows has an answer to learn "
                f"({numbers(range(self.rows))}): {empty} have an empty one, "
                f"{len(self.noted['truncated'])} are cut at max_length {self.max_length}. "
                "Raise max_length, or check that the rows have answers."
            )
        return DataReport(
            rows=self.rows,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            longest=self.longest,
            max_length=self.max_length,
            unused_keys=tuple(sorted(self.keys)),
            special_tokens=tuple(sorted(self.special_tokens)),
            sources=self.sources,
            **{remark: tuple(rows) for remark, rows in self.noted.items()},
        )


def _has_empty_answer(sample: Chat | Text) -> bool:
    """Return True if a supervised answer has neither content nor tool calls."""
    if not isinstance(sample, Chat):
        return not sample.completion.strip()
    for turn in sample.trained_turns():
        message = sample.messages[turn]
        content = message.get("content") or ""
        if not content.strip() and not message.get("tool_calls"):
            return True
    return False


class SpecialTokens:
    """The special tokens of a tokenizer that stand as text in the content of rows.

    A content "a<|im_end|>b" ends its turn in the middle, because the tokenizer reads the text as the
    token. Only tokens of the encoded row can be meant, so only these are looked for.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}  # token id -> its text, or "" if it is not special

    def in_content(self, sample: Chat | Text, example: Example) -> set[str]:
        """Return the special tokens whose text is in the content of a row.

        Args:
            sample: the row as a conversation or text. A plain text may begin with BOS and end with
                EOS, which mean the tokens.
            example: the row as tokens.
        """
        special = {self._text(token) for token in set(example.input_ids)} - {""}
        if not special:
            return set()
        content = self._content(sample)
        return {token for token in special if token in content}

    def _text(self, token: int) -> str:
        if token not in self.texts:
            text = ""
            if is_special(self.tokenizer, token):
                text = self.tokenizer.decode([token], skip_special_tokens=False)
            self.texts[token] = text
        return self.texts[token]

    def _content(self, sample: Chat | Text) -> str:
        if isinstance(sample, Chat):
            texts = [str(sample.tools)]
            for message in sample.messages:
                texts += [
                    str(message.get(key)) for key in ("content", "reasoning_content", "tool_calls")
                ]
            return "\n".join(texts)
        text = (sample.prompt + sample.completion).strip()
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                text = text.removeprefix(self._text(token)).removesuffix(self._text(token))
        return text


class Encoded(list[Any]):
    """Examples, each with a length in tokens, and a report to print.

    Args:
        examples: the examples.
        report: the report as text.
    """

    def __init__(self, examples: Iterable[Any], report: str):
        super().__init__(examples)
        self.report = report
