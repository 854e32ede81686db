"""The model card: a README.md with the Hub's YAML on top, and below it in words what is known of an adapter or model.

Known is what the folder's own files hold (config, safetensors headers, the metadata of base_check.py) and what the
caller hands over; of the rest nothing is said. The last line is a hash of the text above it, by which a card that
somebody has edited since is told from one that may be written anew.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.common import read_tensors, write_text
from minilora.data.formats import read_dataset
from minilora.evaluation.metrics import Scores
from minilora.hub import HUB_ID
from minilora.lora.files.base_check import read_binding
from minilora.lora.files.save_load import CONFIG_FILE, WEIGHTS_FILE
from minilora.tools.inspect import inspect, read_json
from minilora.training.loop import TrainResult

CARD, HERE = "README.md", "path/to/this/folder"  # HERE: in the code of a card, until push_to_hub knows better
_MARK = "<!-- minilora card "
_SHOWN = ("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern")
_SHOWN += ("alpha_pattern", "layers_to_transform", "bias", "lora_bias", "modules_to_save")  # of its config, if set


def write_model_card(
    folder: str | Path,
    *figures: TrainResult | Scores | Mapping[str, Any],
    dataset: Any = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md into the folder of an adapter or a model; returns its path.

    figures: what to report: a TrainResult, Scores, a dict of names and values.
    dataset: what it was trained on, as given to `train`, or a Hub id. Of a path only the file's name is written.
    base_model: its Hub id. Default: the one in the adapter's config, where that is no local path.
    license: the Hub's short name of it, such as "apache-2.0".
    A README.md that was not written here, or has been edited since, is kept, with a warning.
    ValueError: two figures of one name, a dataset that cannot be read; OSError: neither an adapter nor a model.
    """
    path = Path(folder) / CARD
    text = render(path.parent, figures, dataset, base_model, license)
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        warnings.warn(
            f"{path} is kept: it is not a card of minilora's, or was edited. Delete it for one.", stacklevel=2
        )
    else:
        write_text(path, text)
    return path


def render(
    folder: Path,
    figures: Sequence[TrainResult | Scores | Mapping[str, Any]] = (),
    dataset: Any = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The text of the card; arguments as in `write_model_card`."""
    from huggingface_hub import ModelCardData  # here: `import minilora` stays light

    hub, facts, what, code = (_adapter if (folder / CONFIG_FILE).is_file() else _model)(folder, base_model)
    if hub["base_model"] is None:
        hub["base_model_relation"] = None
    elif any(isinstance(found, TrainResult) for found in figures):
        hub["base_model_relation"] = hub["base_model_relation"] or "finetune"
    hub["datasets"], training_data = _data(dataset)
    sections = {"What it is": facts, "Data": training_data, "Figures": _figures(figures)}
    parts = [f"---\n{ModelCardData(**hub, license=license).to_yaml()}\n---", what]
    for title, rows in sections.items():
        known = {name: value for name, value in rows.items() if value is not None}
        if known:
            lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in known.items()]
            parts.append("\n".join([f"## {title}\n", "| | |", "|---|---|", *lines]))
    parts += ["## Use", *(f"```python\n{lines}\n```" for lines in code)]
    return seal("\n\n".join(parts) + "\n\n")


def seal(text: str) -> str:
    """`text` and the line that says it was written here."""
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def is_ours(card: str) -> bool:
    """Whether a card was written here and not touched since."""
    return seal(card[: card.rfind(_MARK)]) == card


def addressed(card: str, repo_id: str) -> str:
    """A card of ours whose code loads from the Hub; any other as it is."""
    return seal(card[: card.rfind(_MARK)].replace(HERE, repo_id)) if is_ours(card) else card


def _adapter(folder: Path, base_model: str | None) -> tuple[dict[str, Any], dict[str, Any], str, list[str]]:
    """Fields for the Hub, facts, opening words, code."""
    config, bound = read_json(folder / CONFIG_FILE), read_binding(folder / WEIGHTS_FILE)
    source = base_model or config.get("base_model_name_or_path") or ""
    on_hub = base_model is not None or _is_hub_id(source)
    base = source if on_hub else Path(source).name  # no path of the machine it was trained on
    kinds = sorted({kind.removeprefix("gguf-") for kind, *_ in bound.get("layers", {}).values()})
    tensors = read_tensors(folder / WEIGHTS_FILE)  # PEFT puts an adapted embedding's own weight beside the adapter
    trained = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(".base_layer.weight"))
    facts = {name: config[name] for name in _SHOWN if config.get(name) and config[name] != "none"}
    facts |= {"numbers that were trained": trained, "minilora": bound.get("version")}
    facts["the base's weights"] = [kind.replace("nf4/", "4 bits, NF4 in blocks of ") for kind in kinds] or None
    hub: dict[str, Any] = {"library_name": "peft", "base_model_relation": "adapter", "tags": ["lora", "minilora"]}
    hub["base_model"] = base if on_hub else None
    hub["pipeline_tag"] = "text-generation" if config.get("task_type") in (None, "CAUSAL_LM") else None
    link = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base}`, a local model"
    what = f"# A LoRA adapter{f' for {link}' if base else ''}\n\nThe files are in PEFT's format."
    base = base or "the base"
    four_bit = next((f', quantize="nf4", blocksize={kind[4:]}' for kind in kinds if kind.startswith("nf4/")), "")
    load = f'model = ml.load_model("{base}"{four_bit})\nml.load_adapter(model, "{HERE}")'
    ours = f"{_OURS}{load}\n{_GENERATE.format(base)}"
    theirs = f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{HERE}")'
    theirs = f"from peft import PeftModel\n{_THEIRS}{theirs}\n{_TOKENIZER.format(base)}"
    return hub, facts, what, [ours, theirs]


def _model(folder: Path, base_model: str | None) -> tuple[dict[str, Any], dict[str, Any], str, list[str]]:
    """The same of a dense, 4-bit or GGUF model."""
    gguf = None if (folder / "config.json").is_file() else next(iter(sorted(folder.glob("*.gguf"))), None)
    found = inspect(gguf or folder).facts
    facts = {name: found.get(name) for name in ("architectures", "general.architecture", "quantisation", "values")}
    what = f" made from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    hub: dict[str, Any] = {"base_model": base_model, "base_model_relation": None, "tags": ["minilora"]}
    hub["pipeline_tag"] = "text-generation"
    if gguf is not None:
        return hub, facts, f"# A GGUF model{what}", [f'{_OURS}model = ml.load_model("{gguf.name}")  # downloaded']
    ours, theirs = f'model = ml.load_model("{HERE}")', f'model = AutoModelForCausalLM.from_pretrained("{HERE}")'
    if (folder / "tokenizer.json").is_file():
        ours, theirs = f"{ours}\n{_GENERATE.format(HERE)}", f"{theirs}\n{_TOKENIZER.format(HERE)}"
    return hub | {"library_name": "transformers"}, facts, f"# A model{what}", [f"{_OURS}{ours}", f"{_THEIRS}{theirs}"]


_OURS = "import minilora as ml\n\n"
_GENERATE = 'tokenizer = ml.load_tokenizer("{0}")\nprint(ml.generate(model, tokenizer, "Hello"))'
_THEIRS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{0}")'


def _is_hub_id(text: str) -> bool:
    return HUB_ID.fullmatch(text) is not None and not text.endswith(".gguf") and not Path(text).exists()


def _data(dataset: Any) -> tuple[list[str] | None, dict[str, Any]]:
    """Datasets on the Hub, and facts."""
    path = Path(dataset) if isinstance(dataset, str | Path) else None
    if path is not None and _is_hub_id(str(path)) and path.suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        return [str(path)], {"dataset": f"[{path}](https://huggingface.co/datasets/{path})"}
    facts = {} if dataset is None else {"rows": len(read_dataset(dataset))}
    return None, facts if path is None else {"file": path.name} | facts


def _figures(figures: Sequence[TrainResult | Scores | Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for figure in figures:
        if isinstance(figure, TrainResult):
            named = {"training steps": figure.steps, "training tokens": figure.tokens, "training loss": figure.loss}
            named |= {"evaluation loss": figure.eval_loss, "training interrupted": figure.interrupted or None}
        elif isinstance(figure, Scores):
            named = {f"held-out {name.replace('_', ' ')}": value for name, value in figure.as_dict().items()}
            named["held-out rows"] = named.pop("held-out n")
        else:
            named = dict(figure)
        if twice := sorted(found.keys() & named.keys()):
            raise ValueError(f"figures: {twice} are given twice. Give one of them as a dict, under other names.")
        found |= named
    return found


def _cell(value: Any) -> str:
    """A name or value as the cell of a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    text = f"{value:,}" if type(value) is int else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
