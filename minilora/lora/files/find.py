"""The folder of an adapter: find it, or download it, and read its config."""

from pathlib import Path
from typing import Any

from minilora.common import read_json
from minilora.hub import HUB_ID, download
from minilora.lora.config import LoRAConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RUN_ADAPTER = "adapter"  # the folder in which `minilora train` writes the adapter of a run
RUN_MODEL = "model"  # the same with --method full


def result_folder(folder: str | Path) -> Path:
    """Return the folder of the trained weights: that of a run's adapter or model, or the folder.

    A run folder is the `output_dir` of `minilora train`. It holds adapter/, or model/ of a run with
    method="full".

    Args:
        folder: A run folder, or any other path.

    Raises:
        ValueError: The run folder holds both an adapter and a model.
    """
    path = Path(folder).expanduser()
    if (path / CONFIG_FILE).is_file() or (path / "config.json").is_file():
        return path
    has_adapter = (path / RUN_ADAPTER / CONFIG_FILE).is_file()
    has_model = (path / RUN_MODEL / "config.json").is_file()
    if has_adapter and has_model:
        raise ValueError(
            f"{path} holds both {RUN_ADAPTER}/ and {RUN_MODEL}/. Give the folder of one of them."
        )
    if has_adapter:
        return path / RUN_ADAPTER
    if has_model:
        return path / RUN_MODEL
    return path


def find_adapter(
    folder: str | Path, revision: str | None = None, token: str | None = None
) -> tuple[Path, LoRAConfig]:
    """Return the local folder of an adapter and its config; download it from the Hub if necessary.

    Args:
        folder: An adapter's folder, a run folder that holds one, or the id of a repository on the
            Hub.
        revision: Branch, tag or commit of a repository; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        ValueError: The config is damaged or not supported.
        FileNotFoundError: The folder or the config does not exist.
        OSError: The Hub does not provide it.
    """
    path = result_folder(folder)
    if not path.is_dir():
        if "/" not in str(folder) or not HUB_ID.fullmatch(str(folder)):
            raise FileNotFoundError(
                f"{folder}: no such folder. Expected one with {CONFIG_FILE} and {WEIGHTS_FILE}."
            )
        path = download(str(folder), [CONFIG_FILE, WEIGHTS_FILE], revision, token)
    values = read_config(path)
    try:
        config = LoRAConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    # "pissa" is allowed: the exact decomposition of the same W gives the same A₀ and B₀ again.
    if config.begins_from_weight and config.init_lora_weights != "pissa":
        raise ValueError(
            f"{path / CONFIG_FILE}: with init_lora_weights {config.init_lora_weights!r} "
            "PEFT trained the adapter for another base than the named one, which the file does not "
            "contain. Save that base, load it, and set the field to true."
        )
    return path, config


def read_config(folder: Path) -> dict[str, Any]:
    """Read the content of adapter_config.json in a folder.

    Args:
        folder: The folder of an adapter.

    Raises:
        ValueError: The file does not hold a JSON object.
        FileNotFoundError: The file does not exist.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}; a "
            f"run folder holds them in {RUN_ADAPTER}/."
        )
    return read_json(path)
