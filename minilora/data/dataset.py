"""A dataset → its examples and the report about its rows: in memory, or row by row into files (dataset_cache.py)."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.data.dataset_cache import StoredExamples, cached, load, store
from minilora.data.formats import Chat, Row, as_messages, check_file, extra_keys, iterate_dataset
from minilora.data.loss_mask import Example, encode_row
from minilora.data.report import DataReport, numbers
from minilora.data.tokenizer import AnyTokenizer

STREAM = 64 * 2**20  # bytes: the tokens of a larger file are kept in a temporary file, not in memory


@dataclass(frozen=True)
class EncodedDataset(Sequence[Example]):
    """The examples that train something, and the report about all rows."""

    examples: Sequence[Example]
    report: DataReport

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        examples = self.examples
        return examples.lengths if isinstance(examples, StoredExamples) else [len(example) for example in examples]


def encode_dataset(
    dataset: Any, tokenizer: AnyTokenizer, max_length: int | None = None, *, cache: str | Path | None = None
) -> EncodedDataset:
    """Encode every row of a dataset (anything `read_dataset` takes), longer ones cut at `max_length` tokens.

    cache: a folder where what comes out of a dataset file is kept, so that the next call finds it. With it, or beyond
    STREAM bytes, memory does not grow with the file (of .json all rows, of .parquet a row group is read at once).
    ValueError: a bad row (by number), an empty dataset, or one in which no row has a trained token.
    """
    path = Path(dataset) if isinstance(dataset, str | Path) else None
    if cache is not None and path is None:
        raise ValueError(
            f"dataset_cache: it keeps dataset files, and this dataset is a {type(dataset).__name__}. "
            "Pass a path, or leave dataset_cache None."
        )
    if path is not None:
        check_file(path)
    encoder = Encoder(dataset, tokenizer, max_length)
    if path is not None and cache is not None:
        return EncodedDataset(*load(cached(path, tokenizer, max_length, Path(cache), encoder)))
    if path is not None and path.stat().st_size > STREAM:
        folder = tempfile.TemporaryDirectory(prefix="minilora-")
        store(Path(folder.name), encoder)
        return EncodedDataset(*load(Path(folder.name), folder))
    examples = list(encoder)
    return EncodedDataset(examples, encoder.report())


class Encoder:
    """Iterating over it encodes row by row, and gives what trains something; then `report` knows about all rows."""

    def __init__(self, dataset: Any, tokenizer: AnyTokenizer, max_length: int | None):
        self.dataset, self.tokenizer, self.max_length = dataset, tokenizer, max_length
        self.rows = self.tokens = self.trained_tokens = self.longest = 0
        self.keys: set[str] = set()
        self.sources: dict[str, tuple[int, int]] = {}
        kinds = ("truncated", "untrained", "eos_missing", "double_bos", "dropped_turns", "empty")
        self.noted: dict[str, list[int]] = {kind: [] for kind in kinds}

    def __iter__(self) -> Iterator[Example]:
        for index, row in enumerate(iterate_dataset(self.dataset)):
            example = encode_row(row, self.tokenizer, self.max_length, index=index)
            self.note(row, example)
            if example.trained_tokens:
                yield example

    def note(self, row: Row, example: Example) -> None:
        eos, trained = self.tokenizer.eos_token_id, example.trained_tokens
        self.rows += 1
        self.keys |= extra_keys(row, example.row)
        if trained:
            self.tokens, self.trained_tokens = self.tokens + len(example), self.trained_tokens + trained
            self.longest = max(self.longest, len(example))
            if (source := getattr(row, "source", None)) is not None:  # a row of minilora.mix_datasets
                rows, tokens = self.sources.get(source, (0, 0))
                self.sources[source] = rows + 1, tokens + len(example)
        it = as_messages(row, example.row)
        answers = [it.messages[i] for i in it.trained_turns()] if isinstance(it, Chat) else [{"content": it.completion}]
        found = {
            "truncated": example.truncated,
            "untrained": not trained,
            "eos_missing": trained and not example.truncated and (eos is None or eos not in example.labels),
            "double_bos": example.double_bos,
            "dropped_turns": example.dropped_turns,
            "empty": any(not ((m.get("content") or "").strip() or m.get("tool_calls")) for m in answers),
        }
        for kind in (kind for kind, yes in found.items() if yes):
            self.noted[kind].append(example.row)

    def report(self) -> DataReport:
        """About all rows. ValueError if none of them trains anything, or each has an empty answer."""
        if not self.trained_tokens or len(self.noted["empty"]) == self.rows:
            raise ValueError(
                f"dataset: none of {self.rows} rows has an answer to learn ({numbers(range(self.rows))}): "
                f"{len(self.noted['empty'])} have an empty one, {len(self.noted['truncated'])} are cut at max_length "
                f"{self.max_length}. Raise max_length, or check that the rows have answers."
            )
        return DataReport(
            rows=self.rows,
            tokens=self.tokens,
            trained_tokens=self.trained_tokens,
            longest=self.longest,
            max_length=self.max_length,
            unused_keys=tuple(sorted(self.keys)),
            sources=self.sources,
            **{kind: tuple(rows) for kind, rows in self.noted.items()},
        )


class Encoded(list[Any]):
    """Examples, each with a `len` in tokens, and a printable `report`."""

    def __init__(self, examples: Iterable[Any], report: str):
        super().__init__(examples)
        self.report = report
