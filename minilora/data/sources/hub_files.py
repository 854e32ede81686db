"""The files of a data set on the Hugging Face Hub.

    owner/name                      the files of the split "train", or the only file
    owner/name:test                 another split
    owner/name:main/test            a split among several configurations: the files in the folder main
    owner/name:data/rows.jsonl      one file

A file belongs to a split if the split's name is in its path, as is usual on the Hub:
data/train-00000-of-00002.parquet, test.jsonl. Several files must be numbered parts of one file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from minilora.data.read_rows import FILE_KINDS
from minilora.hub import download, list_dataset_files

SPLITS = ("train", "validation", "valid", "dev", "val", "test", "eval")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_dataset(name: str) -> bool:
    """Return True for `owner/name` or `owner/name:split` if no file here has this name.

    Args:
        name: what was given as the dataset.
    """
    repo, colon, _ = name.partition(":")
    if Path(name).exists() or not _HUB_ID.fullmatch(repo):
        return False
    if colon:
        return True
    suffix = Path(repo).suffix
    return suffix.lower() not in FILE_KINDS


def hub_files(name: str, revision: str | None = None, token: str | None = None) -> list[Path]:
    """Return the local files of a data set on the Hub, which are downloaded unless cached.

    Args:
        name: owner/name, owner/name:split or owner/name:file.
        revision: branch, tag or commit; None is the main branch.
        token: access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        ValueError: no file, or more than one, fits.
        OSError: the Hub does not provide it.
    """
    repo, _, part = name.partition(":")
    existing = []
    for file in list_dataset_files(repo, revision, token):
        path = Path(file)
        if path.suffix.lower() in FILE_KINDS and path.name not in DESCRIPTIONS:
            existing.append(file)
    chosen = _choose(existing, part)
    without_numbers = {re.sub(r"\d+", "#", file) for file in chosen}
    if len(without_numbers) != 1:
        found = "fits" if not chosen else "fits alone"
        shown = ", ".join(existing[:12]) or "none of .jsonl, .json, .csv or .parquet"
        raise ValueError(
            f"{name}: no file {found}. The data set has these files: {shown}. Name one as "
            f"{repo}:FILE, or a split as {repo}:SPLIT or {repo}:FOLDER/SPLIT."
        )
    folder = download(repo, chosen, revision, token, repo_type="dataset")
    return [folder / file for file in chosen]


def _choose(files: Sequence[str], part: str) -> list[str]:
    """Return the files that `part` names: a file, a split, or a folder and a split."""
    if part in files:
        return [part]
    folder, _, split = part.rpartition("/")
    if folder:
        files = [file for file in files if file.startswith(f"{folder}/")]
    if not part and not _have_splits(files):
        return list(files)
    wanted = split or "train"
    return [file for file in files if _has_split(file, wanted)]


def _have_splits(files: Sequence[str]) -> bool:
    """Return True if the name of a known split is in one of the paths."""
    for file in files:
        for split in SPLITS:
            if _has_split(file, split):
                return True
    return False


def _has_split(file: str, split: str) -> bool:
    """Return True if the name of a split is in a path, between marks such as / and -."""
    pattern = rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)"
    return re.search(pattern, file) is not None
