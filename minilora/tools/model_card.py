"""Model card of an adapter or a model: a README.md with the Hub's YAML header and a description.

The description contains only facts from the folder's files (config, safetensors headers, the
metadata of base_check.py) and from the caller; unknown facts are left out. The last line is a hash
of the text above it. With the hash, a card that was edited can be distinguished from one that may
be overwritten.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.common import read_tensors, write_text
from minilora.data.read_rows import read_dataset
from minilora.evaluation.scores import Scores
from minilora.hub import HUB_ID
from minilora.lora.files.base_check import read_binding
from minilora.lora.files.find import CONFIG_FILE, WEIGHTS_FILE, read_config
from minilora.tools.inspect import inspect
from minilora.training.loop import TrainResult

CARD = "README.md"
HERE = "path/to/this/folder"  # in the code of a card, until push_to_hub inserts the repository
_MARK = "<!-- minilora card "
_CONFIG_FIELDS = (  # of the adapter's config, shown if set
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)
_MODEL_FACTS = ("architectures", "general.architecture", "quantisation", "values")
_DATASET_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_OUR_IMPORT = "import minilora as ml\n\n"
_OUR_GENERATE = (
    'tokenizer = ml.load_tokenizer("{0}")\nprint(ml.generate(model, tokenizer, "Hello"))'
)
_THEIR_IMPORT = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
_THEIR_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{0}")'
# transformers reads a GGUF file by the names of its folder and of the file.
_THEIR_GGUF_MODEL = 'AutoModelForCausalLM.from_pretrained(".", gguf_file="{0}")  # downloaded'
_THEIR_GGUF_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="{0}")'

Figures = TrainResult | Scores | Mapping[str, Any]


@dataclass(frozen=True)
class _Content:
    """The parts of a card that depend on the kind of the folder."""

    hub: dict[str, Any]  # fields of the YAML header
    facts: dict[str, Any]  # rows of the table "What it is"
    opening: str  # title and first sentence
    code: list[str]  # examples in Python


def write_model_card(
    folder: str | Path,
    *figures: Figures,
    dataset: Any = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a model card into the folder of an adapter or a model.

    An existing README.md that minilora did not write, or that was edited since, is kept, with a
    warning.

    Args:
        folder: Folder written by `save_adapter` or `save_model`.
        *figures: Figures to report: a TrainResult, Scores, or a dict of names and values.
        dataset: The training data, as given to `train`, or a Hub id. Of a path only the name of
            the file is written. None leaves the section out.
        base_model: Hub id of the base. None uses the base in the adapter's config, unless that is
            a local path.
        license: The Hub's short name of the licence, such as "apache-2.0". None leaves it out.

    Returns:
        The path of README.md.

    Raises:
        ValueError: Two figures have the same name, or the dataset cannot be parsed.
        OSError: The folder contains neither an adapter nor a model, or the dataset is missing.
    """
    path = Path(folder) / CARD
    text = render(path.parent, figures, dataset, base_model, license)
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace")):
        warnings.warn(
            f"{path} is kept: minilora did not write it, or it was edited since. "
            "Delete it to get a new card.",
            stacklevel=2,
        )
    else:
        write_text(path, text)
    return path


def render(
    folder: Path,
    figures: Sequence[Figures] = (),
    dataset: Any = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Return the text of a folder's card.

    Args:
        folder: Folder of an adapter or a model.
        figures: Figures to report, as in `write_model_card`.
        dataset: The training data, as in `write_model_card`.
        base_model: Hub id of the base, as in `write_model_card`.
        license: The Hub's short name of the licence, as in `write_model_card`.

    Returns:
        The card, with its hash in the last line.

    Raises:
        ValueError: Two figures have the same name, or the dataset cannot be parsed.
        OSError: The folder contains neither an adapter nor a model, or the dataset is missing.
    """
    from huggingface_hub import ModelCardData  # here: `import minilora` stays light

    if (folder / CONFIG_FILE).is_file():
        content = _adapter_content(folder, base_model)
    else:
        content = _model_content(folder, base_model)
    datasets, data_facts = _describe_data(dataset)
    hub = dict(content.hub)
    hub["base_model_relation"] = _relation(content.hub, figures)
    hub["datasets"] = datasets
    header = ModelCardData(**hub, license=license).to_yaml()
    parts = [f"---\n{header}\n---", content.opening]
    parts += _section("What it is", content.facts)
    parts += _section("Data", data_facts)
    parts += _section("Figures", _collect_figures(figures))
    parts.append("## Use")
    parts += [f"```python\n{lines}\n```" for lines in content.code]
    return _seal("\n\n".join(parts) + "\n\n")


def is_ours(card: str) -> bool:
    """Return True if minilora wrote the card and it was not edited since.

    Args:
        card: Text of a README.md.

    Returns:
        True if the hash in the last line fits the text above it.
    """
    return _seal(card[: card.rfind(_MARK)]) == card


def addressed(card: str, repo_id: str) -> str:
    """Return the card with code that loads from the Hub.

    Args:
        card: Text of a README.md.
        repo_id: The repository, which replaces the folder in the code.

    Returns:
        The changed card with a new hash; a card that is not minilora's is returned unchanged.
    """
    if not is_ours(card):
        return card
    text = card[: card.rfind(_MARK)]
    return _seal(text.replace(HERE, repo_id))


def _seal(text: str) -> str:
    """Append the line with the hash."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text}{_MARK}{digest} -->\n"


def _relation(hub: Mapping[str, Any], figures: Sequence[Figures]) -> str | None:
    """Return the Hub's relation to the base: known only with a base, "finetune" after training."""
    if hub["base_model"] is None:
        return None
    relation = hub["base_model_relation"]
    if relation is not None:
        return relation
    for figure in figures:
        if isinstance(figure, TrainResult):
            return "finetune"
    return None


def _section(title: str, facts: Mapping[str, Any]) -> list[str]:
    """Return a section with a table of the known facts; an empty list without facts."""
    rows = []
    for name, value in facts.items():
        if value is not None:
            rows.append(f"| {_cell(name)} | {_cell(value)} |")
    if not rows:
        return []
    return ["\n".join([f"## {title}\n", "| | |", "|---|---|", *rows])]


def _adapter_content(folder: Path, base_model: str | None) -> _Content:
    """Describe an adapter in PEFT's format."""
    config = read_config(folder)
    binding = read_binding(folder / WEIGHTS_FILE)
    source = base_model or config.get("base_model_name_or_path") or ""
    on_hub = base_model is not None or _is_hub_id(source)
    # A card contains no path of the machine on which the adapter was trained.
    base = source if on_hub else Path(source).name
    kinds = _base_kinds(binding)
    is_causal = config.get("task_type") in (None, "CAUSAL_LM")
    hub: dict[str, Any] = {
        "library_name": "peft",
        "base_model_relation": "adapter",
        "tags": ["lora", "minilora"],
        "base_model": base if on_hub else None,
        "pipeline_tag": "text-generation" if is_causal else None,
    }
    facts = _adapter_facts(folder, config, binding, kinds)
    title = "# A LoRA adapter"
    if base:
        link = _link(base) if on_hub else f"`{base}`, a local model"
        title += f" for {link}"
    opening = f"{title}\n\nThe files are in PEFT's format."
    return _Content(hub, facts, opening, _adapter_code(base or "the base", kinds))


def _base_kinds(binding: Mapping[str, Any]) -> list[str]:
    """Return the kinds of the base's layers, such as "nf4/64" or "bfloat16"."""
    kinds = set()
    for kind, *_ in binding.get("layers", {}).values():
        kinds.add(kind.removeprefix("gguf-"))
    return sorted(kinds)


def _adapter_facts(
    folder: Path, config: Mapping[str, Any], binding: Mapping[str, Any], kinds: list[str]
) -> dict[str, Any]:
    facts = {}
    for name in _CONFIG_FIELDS:
        value = config.get(name)
        if value and value != "none":
            facts[name] = value
    trained = 0
    for key, tensor in read_tensors(folder / WEIGHTS_FILE).items():
        # PEFT stores an adapted embedding's frozen weight together with the adapter.
        if not key.endswith(".base_layer.weight"):
            trained += tensor.numel()
    facts["numbers that were trained"] = trained
    facts["minilora"] = binding.get("version")
    descriptions = [kind.replace("nf4/", "4 bits, NF4 in blocks of ") for kind in kinds]
    facts["the base's weights"] = descriptions or None
    return facts


def _adapter_code(base: str, kinds: list[str]) -> list[str]:
    """Return the code that loads an adapter here and with PEFT."""
    quantize = ""
    for kind in kinds:
        if kind.startswith("nf4/"):
            quantize = f', quantize="nf4", blocksize={kind.removeprefix("nf4/")}'
            break
        if kind.startswith("q"):  # a type of GGUF, such as q4_1
            quantize = ', quantize="keep"'
            break
    ours = (
        f"{_OUR_IMPORT}"
        f'model = ml.load_model("{base}"{quantize})\n'
        f'ml.load_adapter(model, "{HERE}")\n'
        f"{_OUR_GENERATE.format(base)}"
    )
    their_base = f'AutoModelForCausalLM.from_pretrained("{base}")'
    their_tokenizer = _THEIR_TOKENIZER.format(base)
    if base.endswith(".gguf"):
        their_base = _THEIR_GGUF_MODEL.format(base)
        their_tokenizer = _THEIR_GGUF_TOKENIZER.format(base)
    theirs = (
        "from peft import PeftModel\n"
        f"{_THEIR_IMPORT}"
        f"base = {their_base}\n"
        f'model = PeftModel.from_pretrained(base, "{HERE}")\n'
        f"{their_tokenizer}"
    )
    return [ours, theirs]


def _model_content(folder: Path, base_model: str | None) -> _Content:
    """Describe a dense, 4-bit or GGUF model."""
    gguf = _first_gguf(folder)
    if (folder / "config.json").is_file():
        gguf = None
    inspected = inspect(gguf or folder).facts
    facts = {name: inspected.get(name) for name in _MODEL_FACTS}
    origin = f" made from {_link(base_model)}" if base_model else ""
    hub: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": None,
        "tags": ["minilora"],
        "pipeline_tag": "text-generation",
    }
    if gguf is not None:
        code = f'{_OUR_IMPORT}model = ml.load_model("{gguf.name}")  # downloaded'
        return _Content(hub, facts, f"# A GGUF model{origin}", [code])
    hub["library_name"] = "transformers"
    ours = f'{_OUR_IMPORT}model = ml.load_model("{HERE}")'
    theirs = f'{_THEIR_IMPORT}model = AutoModelForCausalLM.from_pretrained("{HERE}")'
    if (folder / "tokenizer.json").is_file():
        ours += f"\n{_OUR_GENERATE.format(HERE)}"
        theirs += f"\n{_THEIR_TOKENIZER.format(HERE)}"
    return _Content(hub, facts, f"# A model{origin}", [ours, theirs])


def _first_gguf(folder: Path) -> Path | None:
    files = sorted(folder.glob("*.gguf"))
    return files[0] if files else None


def _link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _is_hub_id(text: str) -> bool:
    """Return True for a Hub id that is not a file or folder on this machine."""
    if HUB_ID.fullmatch(text) is None or text.endswith(".gguf"):
        return False
    return not Path(text).exists()


def _describe_data(dataset: Any) -> tuple[list[str] | None, dict[str, Any]]:
    """Return the datasets on the Hub, and the rows of the section "Data"."""
    if dataset is None:
        return None, {}
    if not isinstance(dataset, str | Path):
        return None, {"rows": len(read_dataset(dataset))}
    path = Path(dataset)
    if _is_hub_id(str(path)) and path.suffix not in _DATASET_SUFFIXES:
        return [str(path)], {"dataset": f"[{path}](https://huggingface.co/datasets/{path})"}
    return None, {"file": path.name, "rows": len(read_dataset(dataset))}


def _collect_figures(figures: Sequence[Figures]) -> dict[str, Any]:
    """Return all figures in one dict; ValueError if a name occurs twice."""
    collected: dict[str, Any] = {}
    for figure in figures:
        named = _named_figures(figure)
        duplicates = sorted(collected.keys() & named.keys())
        if duplicates:
            raise ValueError(
                f"figures: {duplicates} are given twice. "
                "Give one of them as a dict, under other names."
            )
        collected |= named
    return collected


def _named_figures(figure: Figures) -> dict[str, Any]:
    """Return the names and values to report."""
    if isinstance(figure, TrainResult):
        return {
            "training steps": figure.steps,
            "training tokens": figure.tokens,
            "training loss": figure.loss,
            "evaluation loss": figure.eval_loss,
            "training interrupted": figure.interrupted or None,
        }
    if isinstance(figure, Scores):
        named = {}
        for name, value in figure.as_dict().items():
            named[f"held-out {name.replace('_', ' ')}"] = value
        named["held-out rows"] = named.pop("held-out n")
        return named
    return dict(figure)


def _cell(value: Any) -> str:
    """Return a name or a value as the cell of a table."""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if type(value) is int:  # not a bool
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = str(value)
    return " ".join(text.replace("|", "\\|").split())
