"""Where a model's files are: a folder, a .gguf file, or a Hugging Face Hub id, fetched through the Hub's own cache."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
MODEL = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_REMEDIES = {  # by HTTP status
    401: "The Hub does not know this token: pass another as token=, or run `hf auth login`.",
    403: "This token may not do that: pass one with access, or write access to push, or use a repository of yours.",
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
    """The folder or .gguf file that `source` means; a Hub id is downloaded unless it is cached.

    `weights=False` fetches the tokenizer's files only. HF_HUB_OFFLINE and the other variables of huggingface_hub hold.
    Raises ValueError if `source` can be no model, OSError if the Hub does not give it; both say what to do.
    """
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file: give the folder it lies in, a .gguf file, or a Hub id.")
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"there is no folder or .gguf file {str(source)!r}, and it is no Hub id (owner/name) either.")
    return download(str(source), TOKENIZER + MODEL * weights, revision, token, local_files_only)


def download(
    repo: str,
    patterns: list[str],
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """The folder of the Hub's cache with the files of `repo` that fit `patterns`, fetched if need be."""
    from huggingface_hub import snapshot_download  # here: `import minilora` stays light

    asked: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": bool(local_files_only)}
    with explained(repo, revision):
        return Path(snapshot_download(repo, allow_patterns=patterns, **asked))


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Inside, what goes wrong between huggingface_hub and the Hub becomes an OSError that says what to do."""
    from huggingface_hub import errors

    unanswered: Any = errors.HfHubHTTPError.__bases__[0]  # the HTTP client's: no connection, timeouts
    of = f"{repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{of} is gated: accept its licence on the Hub, then pass token= or run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{of}: the Hub has no such revision. Give a branch, tag or commit of {repo}.") from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{of} is neither a folder here nor a repository that the Hub shows to you. Check the spelling; "
            "for a private one pass token= or run `hf auth login`."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{of} is not in the cache, and the Hub was not asked or did not answer (offline mode, local_files_only, "
            "or no network). Load it once with a network, or give a local folder."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise OSError(f"{of}: the Hub is not asked in offline mode. Unset HF_HUB_OFFLINE.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = _REMEDIES.get(status, "Try again later." if status >= 500 else "The Hub's answer says why.")
        raise OSError(f"{of}: {' '.join(str(error).split())} {remedy}") from error
    except unanswered as error:
        raise OSError(
            f"{of}: no answer from the Hub ({error}). Check the network, and HF_ENDPOINT if it is set."
        ) from error
