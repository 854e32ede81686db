"""Where a model's files are: a folder, a .gguf file, or a Hugging Face Hub id, fetched through the Hub's own cache."""

import re
from pathlib import Path

_TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
_MODEL = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def resolve(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
    *,
    weights: bool = True,
) -> Path:
    """The folder or .gguf file that `source` means; a Hub id is downloaded unless it is cached.

    `weights=False` fetches the tokenizer's files only. HF_HUB_OFFLINE and the other variables of huggingface_hub hold.
    Raises ValueError if `source` can be no model, OSError if the Hub does not give it; both say what to do.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file: give the folder it lies in, a .gguf file, or a Hub id.")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder or .gguf file {str(source)!r}, and it is no Hub id (owner/name) either.")
    return _download(str(source), revision, token, bool(local_files_only), _TOKENIZER + _MODEL * weights)


def _download(repo: str, revision: str | None, token: str | None, local: bool, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download  # here: `import minilora` stays light

    of = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = snapshot_download(
            repo, revision=revision, token=token, local_files_only=local, allow_patterns=patterns
        )
    except errors.GatedRepoError as error:
        raise OSError(
            f"{of} is gated: accept its licence on the Hub, then pass token= or run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{of}: the Hub has no such revision. Give a branch, tag or commit of {repo}.") from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{of} is neither a folder here nor a model on the Hub. Check the spelling; "
            "for a private model pass token= or run `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{of} is not in the cache, and the Hub was not asked or did not answer (offline mode, local_files_only, "
            "or no network). Load it once with a network, or give a local folder."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise OSError(f"{of} cannot be fetched from the Hub: {error}") from error
    return Path(folder)
