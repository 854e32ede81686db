"""The base and the adapter that one path stands for: an adapter's folder, or a run folder.

out/                      a run folder, as `minilora train … --output_dir out` writes it
  adapter/                adapter_config.json states the base, adapter_model.safetensors its
                          storage (4 bits or dense)
  model/                  instead of adapter/, of a run with method="full"
  checkpoint-20/          is an adapter folder as well
"""

from pathlib import Path
from typing import Any

from minilora.hub import resolve
from minilora.lora.files.base_check import read_binding
from minilora.lora.files.find import CONFIG_FILE, WEIGHTS_FILE, read_config, result_folder
from minilora.quant.storage import Storage, stored_storage


def split_source(source: str | Path) -> tuple[str | Path, Path | None]:
    """Return the base and the adapter that a source stands for.

    Args:
        source: A Hub id, a .gguf file, or the folder of a model, an adapter or a run.

    Returns:
        The base, and the adapter's folder or None.

    Raises:
        ValueError: The adapter's config states no base, or the run folder is ambiguous.
        FileNotFoundError: The run folder holds no trained weights yet.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return source, None
    folder = result_folder(path)
    if (folder / "config.json").is_file():
        return (source if folder == path else folder), None
    if not (folder / CONFIG_FILE).is_file():
        _refuse_unfinished_run(path)
        return source, None
    base = read_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder / CONFIG_FILE}: base_model_name_or_path is {base!r}, expected the Hub id or "
            f"the path of the base. {_remedy(source)}"
        )
    return base, folder


def _refuse_unfinished_run(path: Path) -> None:
    """Raise FileNotFoundError for a run folder that holds checkpoints only."""
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    if checkpoints:
        raise FileNotFoundError(
            f"{path} holds checkpoints and no adapter/ or model/: the run has not ended. Give one "
            f"of them, such as {checkpoints[-1]}, or continue the run."
        )


def resolve_base(
    base: str | Path,
    adapter: Path | None,
    source: str | Path,
    **options: Any,
) -> Path:
    """Return the local folder or .gguf file of a base, as `resolve` does.

    Args:
        base: The base, from `split_source`.
        adapter: The adapter's folder, from `split_source`.
        source: The source that the caller was given, for the message.
        **options: Options of `resolve`.

    Raises:
        FileNotFoundError: The base that an adapter states is not available.
        OSError: The Hub does not provide a base that was given directly.
        ValueError: A base that was given directly is of no known kind.
    """
    if adapter is None:
        return resolve(base, **options)
    try:
        return resolve(base, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{adapter / CONFIG_FILE}: the base of this adapter is {str(base)!r}, which cannot be "
            f"found from {Path.cwd()}: {error} {_remedy(source)}"
        ) from error


def _remedy(source: str | Path) -> str:
    return (
        f"Give the base yourself: `minilora generate BASE --adapter {source}`, or in Python "
        f'ml.load_adapter(ml.load_model(BASE), "{source}").'
    )


def trained_storage(adapter: Path) -> Storage | None:
    """Return the storage of the base that an adapter's file states, or None.

    Args:
        adapter: The adapter's folder.
    """
    path = adapter / WEIGHTS_FILE
    if not path.is_file():
        return None  # load_adapter reports the missing file
    return stored_storage(read_binding(path))
