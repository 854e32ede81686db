"""The folder of an adapter: find it, or download it, and read its config."""

from pathlib import Path
from typing import Any

from minilora.common import read_json
from minilora.hub import HUB_ID, download
from minilora.lora.config import LoRAConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def find_adapter(
    folder: str | Path, revision: str | None = None, token: str | None = None
) -> tuple[Path, LoRAConfig]:
    """Return the local folder of an adapter and its config; download it from the Hub if necessary.

    Args:
        folder: A folder, or the id of a repository on the Hub.
        revision: Branch, tag or commit of a repository; None is the main branch.
        token: Access token for the Hub; None uses the token of `hf auth login`.

    Raises:
        ValueError: The config is damaged or not supported.
        FileNotFoundError: The folder or the config does not exist.
        OSError: The Hub does not provide it.
    """
    path = Path(folder)
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
            f"{path}: no such file. An adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    return read_json(path)
