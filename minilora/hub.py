"""Download of model files from the Hugging Face Hub, through the Hub's own cache.

A model is named by a folder, a .gguf file, or a Hub id (owner/name).
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
MODEL = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LOG_IN = "run `hf auth login`, set HF_TOKEN, or in Python pass token="
_REMEDIES = {  # by HTTP status
    401: f"The Hub does not know this token. For another one {LOG_IN}.",
    403: "This token may not do that. For one with access (to push: write access) "
    f"{LOG_IN}. Or use a repository of yours.",
    429: "Too many requests: wait, then try again.",
}


def resolve(
    source: str | Path,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
    *,
    weights: bool = True,
) -> Path:
    """Return the local folder or .gguf file of a model. A Hub id is downloaded unless it is cached.

    HF_HUB_OFFLINE and the other environment variables of huggingface_hub apply.

    Args:
        source: A folder, a .gguf file, or a Hub id.
        revision: Branch, tag or commit on the Hub; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.
        local_files_only: Use the cache only and never the network.
        weights: Fetch the model too; False fetches only the tokenizer's files.

    Raises:
        ValueError: `source` is neither a folder, a .gguf file nor a Hub id.
        OSError: The Hub does not provide it. The message contains the remedy.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(
            f"{path} is a file: give the folder that contains it, a .gguf file, or a Hub id."
        )
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(str(source)):
        raise ValueError(
            f"there is no folder or .gguf file {str(source)!r}, and it is not a Hub id "
            f"(owner/name) either. Check the path, which begins at {Path.cwd()}."
            f"{_similar_here(str(source))}"
        )
    patterns = TOKENIZER + MODEL if weights else TOKENIZER
    return download(str(source), patterns, revision, token, local_files_only)


def download(
    repo: str,
    patterns: list[str],
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
    *,
    repo_type: str = "model",
) -> Path:
    """Fetch files of a repository that are not in the cache, and return the cached folder.

    Args:
        repo: Hub id of the repository.
        patterns: File names, with * for any text.
        revision: Branch, tag or commit; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.
        local_files_only: Use the cache only and never the network.
        repo_type: "model" or "dataset".

    Raises:
        OSError: The Hub does not provide it. The message contains the remedy.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "local_files_only": bool(local_files_only),
        "repo_type": repo_type,
    }
    with explained(repo, revision):
        return Path(snapshot_download(repo, allow_patterns=patterns, **options))


def list_dataset_files(
    repo: str, revision: str | None = None, token: str | None = None
) -> list[str]:
    """Return the names of the files of a data set; in offline mode, of those in the cache.

    Args:
        repo: Hub id of the data set.
        revision: Branch, tag or commit; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        OSError: The Hub does not provide it. The message contains the remedy.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        # A pattern without a file, because huggingface_hub asks for every file of a pattern.
        folder = download(repo, ["*.absent"], revision, token, True, repo_type="dataset")
        files = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(path.relative_to(folder).as_posix() for path in files)
    with explained(repo, revision):
        return sorted(
            HfApi(token=token).list_repo_files(repo, repo_type="dataset", revision=revision)
        )


def cached_file(repo: str, name: str) -> Path | None:
    """Return a file of a repository if it is in the cache, without the network; else None.

    Args:
        repo: Hub id of the repository.
        name: Name of the file in it.
    """
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        path = try_to_load_from_cache(repo, name)
    except errors.HFValidationError:  # no repository has such a name
        return None
    return Path(path) if isinstance(path, str) else None  # not a string: known to be absent


def missing_path(path: str | Path, expected: str) -> FileNotFoundError:
    """Return the error for a path that does not exist, of a function that reads local files only.

    Args:
        path: The path.
        expected: The folders or files that the function reads.
    """
    return FileNotFoundError(
        f"{path} is neither a folder nor a file here; paths begin at {Path.cwd()}. Expected "
        f"{expected}. Download a repository of the Hub first, "
        f"`hf download OWNER/NAME --local-dir FOLDER`, and give this folder."
        f"{_similar_here(str(path))}"
    )


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub in the `with` block into an OSError with a remedy.

    Args:
        repo: Hub id of the repository, for the message.
        revision: Branch, tag or commit, for the message.

    Raises:
        OSError: The Hub, the network or the cache did not provide the repository.
    """
    from huggingface_hub import errors

    # The base class of the HTTP client's errors: no connection, timeouts.
    connection_error: Any = errors.HfHubHTTPError.__bases__[0]
    subject = repr(repo)
    if revision:
        subject += f" at revision {revision!r}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{subject} is gated: accept its licence on the Hub, then {LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(
            f"{subject}: the Hub has no such revision. Give a branch, tag or commit of {repo}."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{subject} is neither a folder nor a file here, nor a repository that the Hub shows to "
            f"you. Check the spelling. For a private one {LOG_IN}."
            f"{_similar_here(repo)}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{subject} is neither a folder nor a file here, nor in the cache, and the Hub was not "
            "asked or did not answer (offline mode, local_files_only, or no network). "
            "Check the spelling. Load it once with a network, or give a local folder."
            f"{_similar_here(repo)}"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise OSError(
            f"{subject}: the Hub is not asked in offline mode. Unset HF_HUB_OFFLINE."
        ) from error
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{subject}: {reason} {_remedy(error.response.status_code)}") from error
    except connection_error as error:
        raise OSError(
            f"{subject}: no answer from the Hub ({error}). "
            "Check the network, and HF_ENDPOINT if it is set."
            f"{_similar_here(repo)}"
        ) from error


def _similar_here(repo: str) -> str:
    """Return a sentence that names local folders with a similar name, or no text."""
    folder = Path(repo).parent
    if not folder.is_dir():
        return ""
    entries = [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".gguf"]
    similar = difflib.get_close_matches(Path(repo).name, [path.name for path in entries])
    if not similar:
        return ""
    return f" Similar names here: {', '.join(str(folder / name) for name in similar)}."


def _remedy(status: int) -> str:
    """Return the advice for an HTTP status."""
    if status in _REMEDIES:
        return _REMEDIES[status]
    if status >= 500:
        return "Try again later."
    return "The Hub's answer contains the reason."
