"""Rows of a file or of a data set on the Hub, with columns of any name, as texts or conversations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.data.read_rows import Row, read_dataset
from minilora.data.sources.columns import map_columns
from minilora.data.sources.conversation import as_conversation, with_system
from minilora.data.sources.hub_files import hub_files, is_hub_dataset


def load_dataset(
    dataset: Any,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    chat: bool = False,
    separator: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> list[Row]:
    """Return the rows of a data set in a form that `train`, `evaluate` and `preview` take.

    Args:
        dataset: a path to a .jsonl, .json, .csv or .parquet file; a data set on the Hub, as
            "owner/name", "owner/name:split" or "owner/name:file"; or rows.
        columns: key of a known shape → column of the rows, such as
            {"prompt": "ticket", "completion": "answer"}. None: the columns have those names.
        system: system message for each conversation that has none; None adds none.
        chat: make a conversation of prompt and completion, so that the chat template is used in
            training as in `generate`. False leaves them plain texts.
        separator: character between two cells of a .csv file; None reads it from the header.
        revision: branch, tag or commit on the Hub; None is the main branch.
        token: access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        ValueError: a column does not exist, a row has no known shape, or an option does not fit
            the rows.
        OSError: the file does not exist, or the Hub does not provide it.
    """
    parts = [dataset]
    if isinstance(dataset, str) and is_hub_dataset(dataset):
        parts = hub_files(dataset, revision, token)
    elif revision is not None or token is not None:
        raise ValueError(
            f"load_dataset: revision and token are for the Hub, and {dataset!r:.60} is not there."
        )
    rows: list[Row] = []
    for part in parts:
        rows += read_dataset(part, separator)
    if columns:
        rows = map_columns(rows, columns)
    if chat:
        rows = [as_conversation(row, index) for index, row in enumerate(rows)]
    if system:
        rows = [with_system(row, system, index) for index, row in enumerate(rows)]
    return rows


def file_of(dataset: str) -> Path | None:
    """Return the local file of a data set, downloaded from the Hub if it is there.

    Args:
        dataset: a path, or a data set on the Hub.

    Returns:
        The file, or None if the data set on the Hub has several.
    """
    if not is_hub_dataset(dataset):
        return Path(dataset)
    files = hub_files(dataset)
    return files[0] if len(files) == 1 else None
