"""Positional arguments and options that several commands share, and the model that they name."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.common import read_json
from minilora.hub import resolve
from minilora.lora.files.base_check import read_binding
from minilora.lora.files.find import WEIGHTS_FILE
from minilora.lora.files.save_load import find_adapter
from minilora.quant.storage import common_storage, describe, stored_storage

POSITIONAL = {
    "model": "Hub id, folder or .gguf file; for train also a .toml file that holds all options",
    "checkpoint": "folder of safetensors files in bitsandbytes' 4-bit format",
    "path": "folder of a model or an adapter, or .gguf file",
    "dataset": ".jsonl, .json, .csv or .parquet file of messages, instructions, "
    "prompt/completion or text rows",
    "prompt": "the prompt to answer",
    "adapter": "folder or Hub id of an adapter in PEFT's format",
    "folder": "where to write the merged model",
}


# The last line of each command's help.
EXAMPLES = {
    "train": "minilora train MODEL rows.jsonl --quantize nf4 --r 16 --output_dir out",
    "check-training": "minilora check-training MODEL --quantize nf4",
    "sweep": "minilora sweep run.toml --search r=4,8,16 --trials 20",
    "generate": 'minilora generate MODEL "Acute otitis media" --adapter out/adapter',
    "evaluate": "minilora evaluate MODEL held_out.jsonl --adapter out/adapter --compare base --show 5",
    "serve": "minilora serve MODEL --adapter mine=out/adapter",
    "merge": "minilora merge MODEL out/adapter out/merged",
    "verify": "minilora verify out/four-bit --source out/dense",
    "compare-exports": "minilora compare-exports MODEL rows.jsonl --adapter out/adapter",
    "inspect": "minilora inspect out/adapter",
    "push": "minilora push out/adapter me/my-adapter --private",
    "preview": "minilora preview rows.jsonl --model MODEL --rows 0,17",
    "plan": "minilora plan MODEL --r 16 --card 24GB",
    "runs": "minilora runs out*",
    "plot": "minilora plot out other-out --file runs.svg",
}


def add_command(
    commands: Any, run: Callable[..., Any], *positional: str
) -> argparse.ArgumentParser:
    """Add a command with the name and the help text of its function.

    Args:
        commands: the subparsers of the program.
        run: the function to call with the options as keywords; the first paragraph of its
            docstring is the help text.
        positional: keys of POSITIONAL. A command with a "model" gets the option --dtype too.

    Returns:
        The parser of the command.
    """
    name = run.__name__.replace("_", "-")
    text = summary(run)
    example = f"example: {EXAMPLES[name]}"
    parser = commands.add_parser(name, help=text, description=text, epilog=example)
    parser.set_defaults(run=run)
    for argument in positional:
        parser.add_argument(argument, help=POSITIONAL[argument])
    if "model" in positional:
        parser.add_argument(
            "--dtype",
            default="auto",
            help="dtype of dense weights and of the computation; auto follows the hardware",
        )
    return parser


def summary(function: Callable[..., Any]) -> str:
    """Return the first paragraph of a function's docstring, as one line.

    Args:
        function: a function with a docstring.
    """
    paragraph = (function.__doc__ or "").partition("\n\n")[0]
    return " ".join(paragraph.split())


def add_quantize(
    parser: argparse.ArgumentParser, text: str = "keep the base in 4 bits (QLoRA)"
) -> None:
    """Add the option --quantize.

    Args:
        parser: the command's parser.
        text: its help text.
    """
    parser.add_argument("--quantize", choices=["nf4"], help=text)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the option --quantize of a command that reads adapters.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--quantize",
        choices=["nf4", "none"],
        help="keep the base in 4 bits, or dense (default: as the adapter was trained; dense "
        "without an adapter)",
    )


def add_no_check_base(parser: argparse.ArgumentParser) -> None:
    """Add the option --no_check_base.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--no_check_base",
        dest="check_base",
        action="store_false",
        help="accept an adapter that was trained on another base, tokenizer or chat template",
    )


def add_template_kwargs(parser: argparse.ArgumentParser) -> None:
    """Add the option --chat_template_kwargs.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--chat_template_kwargs",
        type=_json_object,
        metavar="JSON",
        help='variables of the chat template, such as {"enable_thinking": false} (default: those '
        "that the adapter was trained with)",
    )


def _json_object(text: str) -> dict[str, Any]:
    """Return a JSON object, or the error that argparse expects."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def load(
    model: str, adapter: str | None, quantize: str | None, dtype: str, check_base: bool
) -> tuple[Any, Any]:
    """Load a model with its tokenizer and, if given, an adapter.

    Args:
        model: Hub id, folder or .gguf file.
        adapter: folder or Hub id of an adapter; None loads the base alone.
        quantize: "nf4"; "none" for a dense base; None for the storage that the adapter states.
        dtype: a dtype's name, or "auto".
        check_base: refuse an adapter that was trained on another base.

    Returns:
        The model and the tokenizer.
    """
    # The adapter is looked up before the base, because loading the base takes longer.
    folder = None if adapter is None else find_adapter(adapter)[0]
    storage = storage_options(model, [] if folder is None else [folder], quantize)
    loaded = ml.load_model(model, dtype=dtype, **storage)
    tokenizer = ml.load_tokenizer(model)
    if folder is not None:
        ml.load_adapter(loaded, folder, tokenizer=tokenizer, check_base=check_base)
    return loaded, tokenizer


def storage_options(model: str, adapters: Sequence[Path], quantize: str | None) -> dict[str, Any]:
    """Return the options of ml.load_model for the storage that adapters were trained on.

    A line reports it where the command did not ask for 4 bits. A checkpoint in 4 bits keeps its
    bits. `load_adapter` warns where the storage differs from the adapter's in the end.

    Args:
        model: Hub id, folder or .gguf file.
        adapters: local folders of the adapters that the base is for.
        quantize: "nf4"; "none" for a dense base; None to follow the adapters.
    """
    if quantize == "none":
        return {}
    trained = common_storage([_storage_of(folder) for folder in adapters])
    if trained is None or trained["quantize"] != "nf4" or _is_four_bit(model):
        return {"quantize": quantize}
    if quantize is None:
        print(
            f"minilora: the base is loaded {describe(trained)}, because the adapter was trained on "
            "it so. --quantize none keeps it dense.",
            file=sys.stderr,
        )
    double_quant = trained["double_quant"] is not False
    return {"quantize": "nf4", "blocksize": trained["blocksize"], "double_quant": double_quant}


def _storage_of(folder: Path) -> dict[str, Any] | None:
    """Return the storage that an adapter's file states, or None."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        return None  # load_adapter reports the missing file
    return stored_storage(read_binding(path))


def _is_four_bit(model: str) -> bool:
    """Return True if a checkpoint is in 4 bits already."""
    config = resolve(model) / "config.json"
    return config.is_file() and "quantization_config" in read_json(config)
