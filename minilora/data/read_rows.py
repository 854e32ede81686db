"""Rows of a dataset: from a list, an iterable, a DataFrame, or a file.

Files are .jsonl, .json, .csv and .parquet. pandas is not imported: a DataFrame is recognised by its
methods. NaN, with which pandas fills empty cells, becomes None.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from minilora.common.extras import require
from minilora.data.chat.values import is_absent

Row = Mapping[str, Any]
SEPARATORS = (",", ";", "\t")  # between two cells of a .csv file
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")


def read_dataset(dataset: Any, separator: str | None = None) -> list[Row]:
    """Return the rows of a dataset.

    Args:
        dataset: rows, or a path to a file of rows.
        separator: character between two cells of a .csv file; None reads it from the header.

    Raises:
        ValueError: there are no rows, a row is not a dict, or the file is of an unknown kind.
    """
    return list(iterate_dataset(dataset, separator))


def iterate_dataset(dataset: Any, separator: str | None = None) -> Iterator[Row]:
    """Yield the rows of a dataset one by one.

    Memory holds a few rows of a .jsonl or .csv, a row group of a .parquet, all rows of a .json
    file.

    Args:
        dataset: rows, or a path to a file of rows.
        separator: character between two cells of a .csv file; None reads it from the header.

    Yields:
        The rows.

    Raises:
        ValueError: there are no rows, a row is not a dict, or the file is of an unknown kind.
    """
    empty = True
    for index, row in enumerate(_rows_of(dataset, separator)):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {index}: expected a dict, got {type(row).__name__}: {str(row)[:60]!r}."
            )
        empty = False
        yield _without_nan(row)
    if empty:
        name = dataset if isinstance(dataset, str | Path) else type(dataset).__name__
        raise ValueError(f"dataset: {name} is empty. Expected at least one row.")


def _without_nan(row: Row) -> Row:
    """Return a row whose NaN and NA values are None; the row itself if it has no such value."""
    filled = [key for key, value in row.items() if value is not None and is_absent(value)]
    return {**row, **dict.fromkeys(filled)} if filled else row


def _rows_of(dataset: Any, separator: str | None) -> Iterable[Any]:
    is_csv = isinstance(dataset, str | Path) and Path(dataset).suffix.lower() == ".csv"
    if separator is not None and not is_csv:
        raise ValueError(f"separator: it is for .csv files, and the dataset is {dataset!r:.60}.")
    if hasattr(dataset, "iloc") and hasattr(dataset, "columns"):
        return _frame_rows(dataset)
    if isinstance(dataset, str | Path):
        return _read_file(Path(dataset), separator)
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"dataset: expected rows, got a {type(dataset).__name__} with keys "
            f"{list(dataset)[:8]}. "
            'Pass one split, such as dataset["train"], or a list of dicts.'
        )
    if isinstance(dataset, Iterable):
        return dataset
    raise ValueError(
        f"dataset: expected a list, an iterable or a path, got {type(dataset).__name__}."
    )


def _frame_rows(frame: Any) -> Iterator[Any]:
    """Yield the rows of a pandas DataFrame; its index is not read."""
    if not frame.columns.is_unique:
        repeated = sorted(set(map(str, frame.columns[frame.columns.duplicated()])))
        raise ValueError(f"dataset: the DataFrame has several columns {repeated}: rename them.")
    for start in range(0, len(frame), 256):
        yield from frame.iloc[start : start + 256].to_dict("records")


def check_file(path: str | Path) -> str:
    """Return the ending of a dataset file, in lower case.

    Args:
        path: the file.

    Raises:
        ValueError: the ending is unknown.
        FileNotFoundError: the file does not exist.
        ImportError: the file is parquet, and pyarrow is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FILE_KINDS:
        raise ValueError(
            f"dataset: expected a path to .jsonl, .json, .csv or .parquet, got {str(path)!r}. "
            'Write plain text as rows such as {"text": …} in a .jsonl file. For a data set of the '
            'Hub, pass the rows of `ml.load_dataset("owner/name")`.'
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"dataset: {path} does not exist. Expected a file of rows; paths begin at {Path.cwd()}."
        )
    if suffix == ".parquet":
        require(f"dataset: reading {path}", "pyarrow")
    return suffix


def _read_file(path: Path, separator: str | None) -> Iterator[Any]:
    suffix = check_file(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            yield from _read_text(path, suffix, separator)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}. Save it as UTF-8.") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile  # check_file has looked for it

    with ParquetFile(path) as file:
        # One row group at a time: asked for all groups, pyarrow would read ahead without a limit.
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(256, row_groups=[group]):
                yield from batch.to_pylist()


def _read_text(path: Path, suffix: str, separator: str | None) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".csv":
            yield from _read_csv(path, file, separator)
        elif suffix == ".jsonl":
            several = "A .jsonl file has one object a line: write each object on its own line."
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json(line, f"{path}, line {number}", several)
        else:
            several = "One object a line is .jsonl: rename the file."
            rows = _json(file.read(), str(path), several)
            if not isinstance(rows, list):
                raise ValueError(
                    f"{path}: expected a JSON list of rows, got {type(rows).__name__}. Write "
                    "[ROW, ROW, …], or one row a line in a .jsonl file."
                )
            yield from rows


def _read_csv(path: Path, file: TextIO, separator: str | None) -> Iterator[Any]:
    try:
        separator = separator or _separator(path, file)
        for index, row in enumerate(csv.DictReader(file, delimiter=separator)):
            # DictReader puts surplus cells under the key None, and None into missing cells.
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}: the number of cells of row {index} differs from the header's, with "
                    f"{separator!r} between two cells. Another separator is set by --separator, or "
                    "by ml.load_dataset(…, separator=…)."
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}: Python cannot read this CSV: {error}. .jsonl has no such limits."
        ) from error


def _separator(path: Path, file: TextIO) -> str:
    """Return the character that separates the cells of a CSV file's header, and read from there."""
    counts = dict.fromkeys(SEPARATORS, 1)
    for separator in SEPARATORS:
        counts[separator] = len(next(csv.reader(file, delimiter=separator), []))
        file.seek(0)
    most = max(counts.values())
    if most <= 1:
        return SEPARATORS[0]  # one column: nothing separates
    best = [separator for separator, count in counts.items() if count == most]
    if len(best) > 1:
        raise ValueError(
            f"{path}: the header has as many columns with {best[0]!r} as with {best[1]!r} between "
            "two cells. Name the right one with --separator, or with "
            "ml.load_dataset(…, separator=…)."
        )
    return best[0]


def _json(text: str, where: str, several: str) -> Any:
    """Return the value of a JSON text; `several` is the remedy where it has more than one value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "Correct this place, or write the file with a JSON library."
        if error.msg == "Extra data":
            remedy = several
        place = f"line {error.lineno} column {error.colno}"
        if "\n" not in text.strip():
            place = f"character {error.pos + 1}"
        raise ValueError(f"{where}: not JSON: {error.msg} at {place}. {remedy}") from error
