"""Positional arguments and options that several commands share, and the model that they name."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli.values import parse_value
from minilora.hub import resolve
from minilora.lora.files.find import RUN_ADAPTER, find_adapter
from minilora.lora.files.source import resolve_base, split_source, trained_storage
from minilora.lora.merging.four_bits import ROUNDINGS
from minilora.models.loader import is_four_bit
from minilora.quant.storage import Storage, common_storage, describe

POSITIONAL = {
    "model": "Hub id, folder, .gguf file, or the folder of a run or an adapter, which names its base",
    "checkpoint": "folder of safetensors files in bitsandbytes' 4-bit format",
    "path": "folder of a model, an adapter or a run, or .gguf file",
    "dataset": ".jsonl, .json, .csv or .parquet file of messages, instructions, "
    "prompt/completion or text rows; or a data set on the Hub: owner/name, owner/name:split or "
    "owner/name:file",
    "prompt": "the prompt to answer; - or none reads it from stdin",
    "adapter": "folder or Hub id of an adapter in PEFT's format, or the folder of a run",
    "folder": "where to write the merged model; the second argument after the folder of a run, which "
    "holds its adapter",
}


# The last lines of each command's help: one example a line.
EXAMPLES = {
    "train": "minilora train MODEL rows.jsonl --quantize nf4 --r 16 --output_dir out",
    "check-training": "minilora check-training MODEL --quantize nf4",
    "sweep": "minilora sweep run.toml --search r=4,8,16 --trials 20",
    "generate": 'minilora generate MODEL "Acute otitis media" --adapter out/adapter',
    "chat": "minilora chat out --system 'Answer in one sentence.'",
    "evaluate": "minilora evaluate MODEL held_out.jsonl --adapter out/adapter --compare base --show 5",
    "serve": "minilora serve MODEL --adapter mine=out/adapter",
    "merge": "minilora merge MODEL out/adapter out/merged\nminilora merge out out/merged",
    "export": "minilora export MODEL model.gguf --adapter out/adapter --dtype q8_0",
    "verify": "minilora verify out/four-bit --source out/dense",
    "compare-exports": "minilora compare-exports MODEL rows.jsonl --adapter out/adapter",
    "inspect": "minilora inspect out/adapter",
    "push": "minilora push out/adapter me/my-adapter --private",
    "preview": "minilora preview rows.jsonl --model MODEL --rows 0,17",
    "plan": "minilora plan MODEL --r 16 --card 24GB",
    "runs": "minilora runs out*",
    "env": "minilora env",
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
    examples = EXAMPLES[name].splitlines()
    epilog = f"example: {examples[0]}"
    if len(examples) > 1:
        epilog = "\n".join(["examples:", *examples])
    parser = commands.add_parser(name, help=text, description=text, epilog=epilog)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file of options; those on the command line replace those of the file",
    )
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
    parser: argparse.ArgumentParser,
    text: str = "nf4 rounds the base to 4 bits (QLoRA); keep trains on the bytes of a quantised GGUF "
    "file",
) -> None:
    """Add the option --quantize.

    Args:
        parser: the command's parser.
        text: its help text.
    """
    parser.add_argument("--quantize", choices=["nf4", "keep"], help=text)


def add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the option --quantize of a command that reads adapters.

    Args:
        parser: the command's parser.
    """
    parser.add_argument(
        "--quantize",
        choices=["nf4", "keep", "none"],
        help="the base in 4 bits, in the bytes of its GGUF file, or dense (default: as the adapter "
        "was trained; dense without an adapter)",
    )


def add_rounding(parser: argparse.ArgumentParser, needed: str) -> None:
    """Add the options --rounding and --seed of a merge into 4 bits.

    Args:
        parser: the command's parser.
        needed: the option that makes the result 4-bit.
    """
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help=f"of {needed}: stochastic draws one of the two neighbouring levels and keeps the "
        "adapter on average; nearest loses a small adapter (default stochastic)",
    )
    parser.add_argument("--seed", type=int, help="seed of stochastic rounding (default 0)")


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


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int, temperature: float) -> None:
    """Add the options of text generation.

    Args:
        parser: the command's parser.
        max_new_tokens: default of --max_new_tokens.
        temperature: default of --temperature.
    """
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help="longest answer (default %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="0 is greedy (default %(default)s)",
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="nucleus to sample from (default %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", help="a text before which the answer ends; may be repeated"
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument(
        "--cuda_graph",
        type=lambda value: parse_value(value, bool | str),
        default="auto",
        choices=("auto", True, False),
        metavar="VALUE",
        help="run each token's step on a GPU as one CUDA graph: auto (where it should pay), true "
        "or false (default auto)",
    )


def template_check(model: str, needed_by: str | None) -> Callable[[Any], None]:
    """Return a function that refuses a tokenizer without a chat template.

    Args:
        model: name of the model, for the message.
        needed_by: the option or command that needs the template; None accepts every tokenizer.
    """

    def check(tokenizer: Any) -> None:
        if needed_by is None or tokenizer.chat_template:
            return
        raise ValueError(
            f"{needed_by} needs a chat template, and the tokenizer of {model} has none, as is usual "
            "for base models. Use an instruct model, or let this model continue a text: "
            f'minilora generate {model} "Once upon a time".'
        )

    return check


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
    model: str,
    adapter: str | None,
    quantize: str | None,
    dtype: str,
    check_base: bool,
    check_tokenizer: Callable[[Any], None] | None = None,
) -> tuple[Any, Any]:
    """Load a model with its tokenizer and, if given, an adapter.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        adapter: folder or Hub id of an adapter; None loads the base alone, or the adapter of
            `model`.
        quantize: "nf4" or "keep"; "none" for a dense base; None for the storage that the adapter
            states.
        dtype: a dtype's name, or "auto".
        check_base: refuse an adapter that was trained on another base.
        check_tokenizer: a function that may refuse the tokenizer before the model is loaded.

    Returns:
        The model and the tokenizer.
    """
    base, folder = base_and_adapter(model, adapter)
    tokenizer = ml.load_tokenizer(base)
    if check_tokenizer is not None:
        check_tokenizer(tokenizer)
    storage = storage_options(base, [] if folder is None else [folder], quantize)
    loaded = ml.load_model(base, dtype=dtype, **storage)
    if folder is not None:
        ml.load_adapter(loaded, folder, tokenizer=tokenizer, check_base=check_base)
    return loaded, tokenizer


def load_base(model: str, quantize: str | None, dtype: str) -> tuple[Any, Any]:
    """Load the base that a command's argument means, without the adapter.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        quantize: "nf4" or "keep"; "none" for a dense base; None for the storage that the adapter
            states.
        dtype: a dtype's name, or "auto".

    Returns:
        The base and its tokenizer.
    """
    base, adapter = split_source(model)
    adapters = []
    if adapter is not None:
        resolve_base(base, adapter, model, weights=False)
        adapters.append(adapter)
        print(
            f"minilora: {model} holds an adapter; its base {base} is used, without the adapter.",
            file=sys.stderr,
        )
    storage = storage_options(str(base), adapters, quantize)
    return ml.load_model(base, dtype=dtype, **storage), ml.load_tokenizer(base)


def base_and_adapter(model: str, adapter: str | None) -> tuple[str, Path | None]:
    """Return the base and the adapter's local folder that a command's arguments mean.

    The adapter is looked up before the base is loaded, because loading takes longer.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        adapter: folder or Hub id of an adapter, or None.

    Raises:
        ValueError: `model` is a run or an adapter itself, and `adapter` is given too.
        OSError: the adapter or its base cannot be found.
    """
    base, own = split_source(model)
    if own is None:
        folder = None if adapter is None else find_adapter(adapter)[0]
        return str(base), folder
    if adapter is not None:
        raise ValueError(
            f"{model} holds an adapter itself ({own}), and {adapter} is a second one: leave one "
            f"of them out, or give the base {base} instead of {model}."
        )
    resolve_base(base, own, model, weights=False)
    print(f"minilora: base {base}, adapter {own}", file=sys.stderr)
    return str(base), find_adapter(own)[0]


def base_and_adapters(model: str, items: Sequence[str]) -> tuple[str, dict[str, Path]]:
    """Return the base of a command, and the folders of its adapters by name.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter, whose adapter is
            then the first one.
        items: adapters as NAME=PATH, or as PATH, which names itself.

    Raises:
        ValueError: a name occurs twice, or is empty.
        OSError: an adapter or the base cannot be found.
    """
    base, own = base_and_adapter(model, None)
    adapters = {} if own is None else {_adapter_name(Path(model)): own}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or Path(item).exists():
            name = _adapter_name(Path(item))
            path = item
        if not name or name in adapters:
            raise ValueError(
                f"--adapter: expected NAME=PATH, each name once, got {' '.join(items)}."
            )
        adapters[name] = find_adapter(path)[0]
    return base, adapters


def _adapter_name(path: Path) -> str:
    """Return the name of an adapter from its path: out for out/adapter, mine for me/mine."""
    if path.exists():
        path = path.resolve()
    if path.name == RUN_ADAPTER:
        path = path.parent
    return path.name.replace(".", "_")  # the name becomes a part of module paths


def storage_options(model: str, adapters: Sequence[Path], quantize: str | None) -> dict[str, Any]:
    """Return the options of ml.load_model for the storage that adapters were trained on.

    A line reports it where the command did not ask for 4 bits. A checkpoint in 4 bits keeps its
    bits. `load_adapter` warns where the storage differs from the adapter's in the end.

    Args:
        model: Hub id, folder or .gguf file.
        adapters: local folders of the adapters that the base is for.
        quantize: "nf4" or "keep"; "none" for a dense base; None to follow the adapters.
    """
    if quantize == "none":
        return {}
    trained = common_storage([trained_storage(folder) for folder in adapters])
    if trained is not None and trained["quantize"] == "keep" and quantize is None:
        _report_storage(trained)
        return {"quantize": "keep"}
    in_nf4 = trained is not None and trained["quantize"] == "nf4"
    if quantize == "keep" or trained is None or not in_nf4 or is_four_bit(resolve(model)):
        return {"quantize": quantize}
    if quantize is None:
        _report_storage(trained)
    double_quant = trained["double_quant"] is not False
    return {"quantize": "nf4", "blocksize": trained["blocksize"], "double_quant": double_quant}


def _report_storage(storage: Storage) -> None:
    """Print the storage in which a base is loaded because its adapters were trained on it."""
    print(
        f"minilora: the base is loaded {describe(storage)}, because the adapter was trained on it "
        "so. --quantize none keeps it dense.",
        file=sys.stderr,
    )
