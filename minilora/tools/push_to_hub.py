"""Upload an adapter or a model to the Hugging Face Hub, in one commit: the files that belong to it, and no others.

FILES names them, at the top of the folder only. What lies beside them (checkpoints, optimiser states, logs, pickles,
tokens, hidden files) stays here, and is listed.
"""

import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from minilora.hub import TOKENIZER, explained
from minilora.lora.active import list_adapters
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from minilora.tools.model_card import CARD, addressed, render

_WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors", "[!.]*.gguf"]
FILES = [CONFIG_FILE, WEIGHTS_FILE, "config.json", "generation_config.json", "model.safetensors.index.json", *_WEIGHTS]
FILES += [*TOKENIZER, "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"]
FILES += [CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"]


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
    """Upload a folder of save_adapter or save_model, or a model's adapter `name`; returns the address of the commit.

    repo_id: owner/name. Without `revision` it is created if missing, private or not as `private` says (None: as the
        Hub's settings have it); with one, a branch, both must be there.
    token: default that of HF_TOKEN or `hf auth login`.
    A folder without README.md gets a card (write_model_card) on its way, unless the repository has one.
    ValueError: no token, no adapter or model, a repository that is not as `private` says. OSError: the Hub refuses or
    does not answer. No commit is made then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token  # here: `import minilora` stays light
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if isinstance(folder_or_model, nn.Module):
        if not list_adapters(folder_or_model):
            raise ValueError("the model has no adapter: write the model with save_model, then push that folder.")
        with tempfile.TemporaryDirectory() as place:
            save_adapter(folder_or_model, place, name)
            options = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
            return push_to_hub(place, repo_id, **options)
    folder = Path(folder_or_model)
    files = _files(folder)
    if not (token := token or get_token()):
        raise ValueError("not logged in to the Hub: pass token=, set HF_TOKEN, or run `hf auth login`.")
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else render(folder)
    api = HfApi(token=token)
    with explained(repo_id, revision):
        if revision is None:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and bool(api.model_info(repo_id).private) != private:
            there = "public" if private else "private"
            raise ValueError(f"{repo_id!r} is there and {there}: change that on the Hub, or leave `private` out.")
        additions = [CommitOperationAdd(file.name, file) for file in files if file.name != CARD]
        if card.is_file() or not api.file_exists(repo_id, CARD, revision=revision):
            additions.append(CommitOperationAdd(CARD, addressed(text, repo_id).encode()))
        message = commit_message or f"Upload {len(additions)} files with minilora"
        try:
            commit = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
        except RuntimeError as error:  # so huggingface_hub wraps what goes wrong with a large file
            why = " ".join(str(error.__cause__ or "").split())
            raise OSError(f"{repo_id!r}: {error} {why} Try again: files that arrived are not sent twice.") from error
    return commit.commit_url


def _files(folder: Path) -> list[Path]:
    """The files to upload, by name. Says which others there are."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that save_adapter or save_model has written.")
    inside = sorted(folder.iterdir())
    files = [path for path in inside if path.is_file() and any(fnmatchcase(path.name, p) for p in FILES)]
    names = {path.name for path in files}
    weights = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)]
    model = weights if "config.json" in names else [name for name in weights if name.endswith(".gguf")]
    if not names >= {CONFIG_FILE, WEIGHTS_FILE} and not model:
        raise ValueError(
            f"{folder} holds neither an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}) nor a model (config.json and "
            "model.safetensors, or a .gguf file): write it with save_adapter or save_model."
        )
    if others := [path.name for path in inside if path not in files]:
        print(f"minilora: not uploaded: {', '.join(others)}", file=sys.stderr)
    return files
