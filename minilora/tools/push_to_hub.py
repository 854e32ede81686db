"""Upload of an adapter or a model to the Hugging Face Hub, in one commit.

Only files that belong to an adapter or a model are uploaded. FILES lists their names; they are
taken from the top level of the folder. All other files (checkpoints, optimiser states, logs,
pickles, tokens, hidden files) are not uploaded, and their names are printed.
"""

import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from minilora.common.notebook import note
from minilora.hub import LOG_IN, TOKENIZER, explained
from minilora.lora.active import list_adapters
from minilora.lora.files.find import CONFIG_FILE, WEIGHTS_FILE, result_folder
from minilora.lora.files.save_load import save_adapter
from minilora.tools.model_card import CARD, addressed, render

_WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors", "[!.]*.gguf"]
FILES = [
    CONFIG_FILE,
    WEIGHTS_FILE,
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    *_WEIGHTS,
    *TOKENIZER,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    CARD,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
]


def push_to_hub(
    folder_or_model: str | Path | nn.Module,
    repo_id: str,
    *,
    name: str = "default",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an adapter or a model to the Hub in one commit.

    If the folder has no README.md, a card (`write_model_card`) is uploaded with it, unless the
    repository already has one. If anything fails, no commit is made.

    Args:
        folder_or_model: A folder written by `save_adapter` or `save_model`, a run folder that holds
            one, or a model with an adapter.
        repo_id: Name of the repository: "owner/name", or "name" for the owner of the token.
        name: The adapter to upload, if a model is given.
        private: True or False creates the repository as private or public, and requires this of
            an existing one. None follows the settings of the Hub.
        token: Access token. None uses HF_TOKEN or the token of `hf auth login`.
        revision: Branch to commit to; the repository and the branch must exist. None commits to
            the main branch and creates a missing repository.
        commit_message: None writes one with the number of files.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The token is missing, the folder or model contains nothing to upload, or the
            repository's visibility is not the one that `private` requires.
        OSError: The Hub refuses the upload or does not answer.
    """
    from huggingface_hub.utils import validate_repo_id  # here: `import minilora` stays light

    validate_repo_id(repo_id)
    options = {
        "private": private,
        "token": token,
        "revision": revision,
        "commit_message": commit_message,
    }
    if not isinstance(folder_or_model, nn.Module):
        return _push_folder(result_folder(folder_or_model), repo_id, **options)
    if not list_adapters(folder_or_model):
        raise ValueError(
            "the model has no adapter: write the model with save_model, then push that folder."
        )
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(folder_or_model, folder, name)
        return _push_folder(Path(folder), repo_id, **options)


def _push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str | None,
) -> str:
    """Upload the files of a folder; return the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = _files_to_upload(folder)
    token = token or get_token()
    if not token:
        raise ValueError(f"not logged in to the Hub: {LOG_IN}.")
    card = folder / CARD
    has_card = card.is_file()
    card_text = card.read_text(encoding="utf-8") if has_card else render(folder)
    api = HfApi(token=token)
    with explained(repo_id, revision):
        if revision is None:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _check_visibility(api, repo_id, private)
        additions = []
        for file in files:
            if file.name != CARD:
                additions.append(CommitOperationAdd(file.name, file))
        if has_card or not api.file_exists(repo_id, CARD, revision=revision):
            content = addressed(card_text, repo_id).encode()
            additions.append(CommitOperationAdd(CARD, content))
        message = commit_message or f"Upload {len(additions)} files with minilora"
        return _commit(api, repo_id, additions, message, revision)


def _check_visibility(api: Any, repo_id: str, private: bool | None) -> None:
    """Raise ValueError if the repository is not as private as required."""
    if private is None:
        return
    is_private = bool(api.model_info(repo_id).private)
    if is_private != private:
        visibility = "private" if is_private else "public"
        raise ValueError(
            f"{repo_id!r} exists and is {visibility}. "
            "Change its visibility on the Hub, or leave `private` out."
        )


def _commit(
    api: Any, repo_id: str, additions: list[Any], message: str, revision: str | None
) -> str:
    """Make the commit and return its address."""
    try:
        commit = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    except RuntimeError as error:
        # huggingface_hub raises RuntimeError for all errors in the upload of a large file.
        cause = " ".join(str(error.__cause__ or "").split())
        raise OSError(
            f"{repo_id!r}: {error} {cause} Try again: files that arrived are not sent twice."
        ) from error
    return commit.commit_url


def _files_to_upload(folder: Path) -> list[Path]:
    """Return the files to upload, sorted by name, and print the names of all others."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: expected one that save_adapter or save_model has written."
        )
    entries = sorted(folder.iterdir())
    files = []
    others = []
    for path in entries:
        if path.is_file() and _matches(path.name, FILES):
            files.append(path)
        else:
            others.append(path.name)
    names = {path.name for path in files}
    has_adapter = names >= {CONFIG_FILE, WEIGHTS_FILE}
    if not has_adapter and not _has_model(names):
        raise ValueError(
            f"{folder} holds neither an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}) nor a model "
            "(config.json and model.safetensors, or a .gguf file): "
            "write it with save_adapter or save_model."
        )
    if others:
        note(f"minilora: not uploaded: {', '.join(others)}")
    return files


def _has_model(names: set[str]) -> bool:
    """Return True for config.json with weights, or for a .gguf file."""
    weights = [name for name in names if _matches(name, _WEIGHTS)]
    if "config.json" in names:
        return len(weights) > 0
    return any(name.endswith(".gguf") for name in weights)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
