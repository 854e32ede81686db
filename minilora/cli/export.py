"""The command export: a merged model as a GGUF file or a folder, or an adapter as a GGUF file."""

import argparse
import json
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli.options import (
    POSITIONAL,
    add_command,
    add_no_check_base,
    add_rounding,
    add_storage,
    base_and_adapter,
    load,
)
from minilora.common import check_writable
from minilora.hub import resolve

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}
FORMATS = {"gguf": "gguf", "dense": "safetensors", "bnb-4bit": "bnb-4bit"}  # name in save_model
ADAPTER = "gguf-adapter"  # the adapter alone


def export(
    model: str,
    out: str,
    adapter: str | None,
    format: str | None,
    dtype: str | None,
    quantize: str | None,
    check_base: bool,
    **drawing: Any,
) -> None:
    """Write a model as a GGUF file for llama.cpp, or as a folder for transformers and vLLM.

    An adapter is merged into the weights first, or written alone for llama.cpp's --lora.

    Args:
        model: Hub id, folder or .gguf file of the base, or the folder of a run or an adapter.
        out: the file or the folder to write; it must not exist.
        adapter: folder or Hub id of an adapter; None uses that of `model`, or writes the base alone.
        format: a key of FORMATS, or "gguf-adapter" for the adapter alone; None chooses gguf for a
            name that ends in .gguf, else dense.
        dtype: a key of DTYPES; None keeps the dtype of the checkpoint.
        quantize: "nf4", "keep", "none", or None to follow the adapter.
        check_base: refuse an adapter that was trained on another base.
        drawing: rounding of a merge into bnb-4bit (None is stochastic), and seed of its draws (None
            is 0).

    Raises:
        ValueError: an option or the name does not fit the format, `out` exists or is not writable,
            or the format cannot hold the model.
    """
    if format is None:
        format = "gguf" if _is_gguf(out) else "dense"
    _check_target(Path(out), format, dtype)
    if format == "bnb-4bit":
        if quantize in ("none", "keep"):
            raise ValueError(
                f"--format bnb-4bit stores NF4, and --quantize {quantize} loads another storage."
            )
        quantize = "nf4"
    base, folder = base_and_adapter(model, adapter)
    adapter = None if folder is None else str(folder)
    if format == ADAPTER and adapter is None:
        raise ValueError(
            f"export: --format {ADAPTER} writes an adapter, and {model} has none. Give the folder of "
            "a run or an adapter, or --adapter."
        )
    storage = _stored_dtype(base)
    in_four_bits = format == "bnb-4bit"
    rounds_again = in_four_bits and adapter is not None
    rounding = drawing["rounding"]
    seed = drawing["seed"]
    if not rounds_again and (rounding is not None or seed is not None):
        raise ValueError("--rounding and --seed are for --format bnb-4bit with an adapter.")
    if seed is not None and rounding == "nearest":
        raise ValueError("--seed is for stochastic rounding, and --rounding is nearest.")
    loaded, tokenizer = load(base, adapter, quantize, storage, check_base)
    if format == ADAPTER:
        ml.save_gguf_adapter(loaded, out)
        size = _count_bytes(Path(out)) / 1e6
        print(f"wrote {out}: {size:.1f} MB. Use it with llama-server -m BASE.gguf --lora {out}.")
        return
    if rounds_again:
        rounding = rounding or "stochastic"
        lost = "loses a small adapter" if rounding == "nearest" else "adds noise to the adapter"
        print(
            f"The merged weights are rounded to 4 bits again ({rounding}), which {lost}: "
            f"minilora merge {base} {adapter} FOLDER --target nf4 --data ROWS measures the cost."
        )
    saved_dtype = None if dtype is None else DTYPES[dtype]
    ml.save_model(
        loaded,
        out,
        format=FORMATS[format],
        merge=adapter is not None or not in_four_bits,
        requantize=rounding or False,
        seed=seed or 0,
        dtype=saved_dtype,
        tokenizer=tokenizer,
    )
    size = _count_bytes(Path(out)) / 1e6
    print(f"wrote {out}: {size:.1f} MB. Load it with ml.load_model({out!r}).")


def _is_gguf(out: str) -> bool:
    suffix = Path(out).suffix
    return suffix.lower() == ".gguf"


def _check_target(out: Path, format: str, dtype: str | None) -> None:
    """Check that the name, the format and the dtype fit together, and that `out` can be written."""
    is_file = format in ("gguf", ADAPTER)
    if format == ADAPTER and dtype is not None:
        raise ValueError(f"export: --format {ADAPTER} stores fp32. Leave --dtype out.")
    if is_file != _is_gguf(str(out)):
        expected = "a file name that ends in .gguf" if is_file else "the name of a folder"
        raise ValueError(f"export: --format {format} needs {expected}, got {out}.")
    if dtype in ("q8_0", "q4_0") and not is_file:
        raise ValueError(
            f"--dtype {dtype} is a type of GGUF files, and --format is {format}. Give a name that "
            "ends in .gguf, or another dtype: f32, f16, bf16."
        )
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise ValueError(f"export: {out} exists. Choose another name, or delete it.")
    folder = out.parent if is_file else out
    check_writable(folder, "export")
    if is_file:
        _check_package(out)


def _check_package(out: Path) -> None:
    """Raise ImportError without the gguf package, before the model is loaded."""
    try:
        import gguf  # noqa: F401  # the import is the check
    except ImportError as error:
        raise ImportError(
            f"{out}: writing GGUF needs the gguf package: pip install -e '.[gguf]'"
        ) from error


def _stored_dtype(model: str) -> str:
    """Return the dtype of a checkpoint, in which loading rounds nothing."""
    config = resolve(model) / "config.json"
    if not config.is_file():
        return "float32"  # a .gguf file
    fields: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    name = fields.get("dtype") or fields.get("torch_dtype")
    if name in ("float32", "float16", "bfloat16"):
        return name
    return "float32"


def _count_bytes(out: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    if out.is_file():
        return out.stat().st_size
    total = 0
    for path in out.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
    return total


def add_commands(commands: Any) -> None:
    """Add the command.

    Args:
        commands: the subparsers of the program.
    """
    parser: argparse.ArgumentParser = add_command(commands, export)
    parser.add_argument("model", help=POSITIONAL["model"])
    parser.add_argument("out", help="OUT.gguf for a GGUF file, else a folder; must not exist")
    parser.add_argument("--adapter", help=f"{POSITIONAL['adapter']}, merged into the weights")
    parser.add_argument(
        "--format",
        choices=(*FORMATS, ADAPTER),
        help="gguf: one file for llama.cpp; dense: a folder of safetensors; bnb-4bit: a folder in "
        "bitsandbytes' format; gguf-adapter: the adapter alone, for llama.cpp (default: gguf for a "
        "name that ends in .gguf, else dense)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the matrices; q8_0 and q4_0, 8 and 4 bits, for GGUF only (default: that of the checkpoint)",
    )
    add_rounding(parser, "--format bnb-4bit with an adapter")
    add_no_check_base(parser)
    add_storage(parser)
