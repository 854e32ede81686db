"""The commands about checkpoints: merge, verify, compare-exports, inspect, push."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from minilora.cli.options import (
    POSITIONAL,
    add_command,
    add_no_check_base,
    add_rounding,
    add_storage,
    base_and_adapter,
    load,
    storage_options,
)
from minilora.cli.preview import add_data_options, take_data_options
from minilora.lora.files.source import split_source
from minilora.lora.merging.merge import STORAGES
from minilora.tools.compare_exports import compare_exports as compare_forms
from minilora.tools.inspect import inspect as inspect_path
from minilora.tools.merge_figures import FOUR_BITS
from minilora.tools.merge_report import ROWS, MergeReport, first_difference, merge_report, merged_as
from minilora.tools.verify import verify as verify_checkpoint

LOSS_WARNING = 1.001  # `merge` warns if the loss grows by a larger factor


def merge(
    model: str,
    adapter: str | None,
    folder: str | None,
    target: str | None,
    data: str | None,
    force: bool,
    **loading: Any,
) -> None:
    """Merge an adapter into its base, and print what the rounding of the merged weights costs.

    The command writes a folder that transformers loads, and reads it back.

    Args:
        model: Hub id, folder or .gguf file of the base; or the folder of a run or an adapter, which
            names its base.
        adapter: folder or Hub id of the adapter; after the folder of a run, where to write the
            merged model.
        folder: where to write the merged model; None after the folder of a run.
        target: storage of the result; None keeps the dtype of the loaded model.
        data: held-out rows, to measure the loss of each target; None measures the weights alone.
        force: write 4 bits even where they lose a part of the adapter.
        loading: quantize, dtype and check_base, the data options, and three that may be None: rows
            (of `data`, from the first; ROWS of them), rounding (of the target nf4; stochastic) and
            seed (of its draws; 0).

    Raises:
        ValueError: the folder is the base, 4 bits would lose a part of the adapter, an option does
            not fit the target, or the folder differs from the merged model.
    """
    if folder is None:
        folder = str(adapter)
        adapter = None
        if split_source(model)[1] is None:
            raise ValueError(
                f"merge {model} {folder}: expected BASE ADAPTER FOLDER, or the folder of a run and "
                f"FOLDER. {model} is not a folder with an adapter."
            )
    base, _ = split_source(model)
    if Path(folder).resolve() in (Path(model).resolve(), Path(base).resolve()):
        raise ValueError(
            f"{folder} is the base itself, which would be overwritten: give another folder."
        )
    if Path(folder).suffix.lower() == ".gguf":
        option = "" if adapter is None else f" --adapter {adapter}"
        raise ValueError(
            f"merge writes a folder, and {folder} is the name of a GGUF file. To write this file: "
            f"minilora export {model} {folder}{option}"
        )
    drawing = _take_drawing(target, loading)
    rows = loading.pop("rows")
    if rows is not None and data is None:
        raise ValueError("--rows counts the rows of --data, which is missing: give it too.")
    data_options = take_data_options(loading)
    dataset = None if data is None else data_options.load(data)
    loaded, tokenizer = load(model, adapter, **loading)
    source = None
    if target in ("original", "original-nf4"):
        dense: dict[str, Any] = {**loading, "quantize": "none"}
        with warnings.catch_warnings():  # this target is another storage
            warnings.filterwarnings("ignore", message=".*was trained on a base that was")
            source, _ = load(model, adapter, **dense)
    if target is None:
        dtype = next(p.dtype for p in loaded.parameters() if p.is_floating_point())
        target = str(dtype).removeprefix("torch.")
    report = merge_report(
        loaded,
        source,
        tokenizer=tokenizer,
        data=dataset,
        rows=ROWS if rows is None else rows,
        **drawing,
    )
    print(report)
    _warn_of_lost_loss(report, target)
    reason = report.refusal(target)
    if reason is not None and not force:
        raise ValueError(
            f"4 bits would lose a part of the adapter: {reason}. Serve it unmerged, merge to "
            "bfloat16 or original, or pass --force."
        )
    merged: Any = merged_as(loaded, source, target, **drawing)
    del loaded, source
    layout: dict[str, Any] = {"format": "bnb-4bit"} if target in FOUR_BITS else {}
    ml.save_model(merged, folder, tokenizer=tokenizer, **layout)
    _check_written(merged, folder)
    print(f"merged into {folder}; read back, every stage gives the same bits")


def _take_drawing(target: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Remove rounding and seed from the options, and return them as options of ml.merge.

    Raise ValueError if one of them would change nothing.
    """
    rounding = given.pop("rounding")
    seed = given.pop("seed")
    if rounding is not None and target != "nf4":
        raise ValueError(f"--rounding is for --target nf4, and the target is {target}.")
    if seed is not None and (target != "nf4" or rounding == "nearest"):
        raise ValueError("--seed is for --target nf4 with stochastic rounding.")
    return {"rounding": rounding or "stochastic", "seed": seed or 0}


def _warn_of_lost_loss(report: MergeReport, target: str) -> None:
    """Warn if the loss was measured and the merge raises it."""
    if report.losses.get(target, -1.0) > LOSS_WARNING * report.losses.get("trained", 0.0):
        print(
            f"minilora: warning: merging to {target} raises the loss by more than 0.1 %",
            file=sys.stderr,
        )


def _check_written(merged: Any, folder: str) -> None:
    """Read the folder back; raise ValueError if a stage of the model differs by one bit."""
    parameter = next(merged.parameters())
    written = ml.load_model(folder, dtype=parameter.dtype, device=parameter.device)
    tokens = torch.arange(min(16, parameter.shape[0]), device=parameter.device)[None]  # (1, T)
    stage = first_difference(merged, written, tokens)
    if stage is not None:
        raise ValueError(
            f"{folder}, read back, differs from the merged model, first in {stage}. Do not use it."
        )


def verify(checkpoint: str, source: str | None, against: str | None) -> int:
    """Compare a 4-bit checkpoint tensor by tensor: with its source, itself or bitsandbytes.

    Args:
        checkpoint: folder of the 4-bit checkpoint.
        source: folder of the base it was quantised from; None dequantises and quantises again.
        against: "bitsandbytes" compares with the installed package.

    Returns:
        The exit status: 1 if a tensor differs.
    """
    verdicts = verify_checkpoint(checkpoint, source, against)
    for name, verdict in verdicts.items():
        print(f"{name:<60} {verdict}")
    differing = [verdict for verdict in verdicts.values() if verdict.startswith("different")]
    return 1 if differing else 0


def compare_exports(model: str, dataset: str, adapter: str | None, **options: Any) -> int:
    """Compare the answers of a trained model in every form: merged, 4-bit, GGUF, served.

    Args:
        model: Hub id, folder or .gguf file of the base.
        dataset: rows whose prompts are answered.
        adapter: folder or Hub id of the adapter; None takes the adapter of the run `model`.
        options: options of ml.compare_exports, where None leaves the default, and the data options.

    Returns:
        The exit status: 1 if a form differs.
    """
    data = take_data_options(options).load(dataset)
    given = {name: value for name, value in options.items() if value is not None}
    base, folder = base_and_adapter(model, adapter)
    if folder is None:
        raise ValueError(
            f"compare-exports needs an adapter: give --adapter, or the folder of a run as MODEL; "
            f"{model} holds no adapter."
        )
    storage = storage_options(base, [folder], given.pop("quantize", None))
    given["quantize"] = storage.get("quantize")
    report = compare_forms(base, folder, data, **given)
    print(report)
    return int(report.first is not None)


def inspect(path: str, other: str | None) -> None:
    """Describe a model folder, GGUF file or adapter folder; or compare two adapters.

    Args:
        path: the folder or file.
        other: a second adapter; None describes the first.
    """
    print(inspect_path(path, other))


def push(folder: str, repo_id: str, **options: Any) -> None:
    """Upload an adapter or a model, with its card, to the Hugging Face Hub.

    Args:
        folder: folder of the adapter or the model.
        repo_id: owner/name on the Hub.
        options: options of ml.push_to_hub.
    """
    print(ml.push_to_hub(folder, repo_id, **options))


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    _add_merge(commands)
    _add_verify(commands)
    _add_compare_exports(commands)
    parser = add_command(commands, inspect, "path")
    parser.add_argument("other", nargs="?", help="a second adapter to compare with")
    _add_push(commands)


def _add_merge(commands: Any) -> None:
    parser = add_command(commands, merge, "model", "adapter")
    parser.usage = (
        "minilora merge MODEL ADAPTER FOLDER [OPTIONS]\n       minilora merge RUN FOLDER [OPTIONS]"
    )
    parser.add_argument("folder", nargs="?", help=POSITIONAL["folder"])
    add_no_check_base(parser)
    add_storage(parser)
    parser.add_argument(
        "--target",
        choices=[*STORAGES, "original", "original-nf4"],
        help="storage of the result: a dtype, nf4 (4 bits again), original: merge into the base "
        "before it was quantised, or original-nf4: and quantise it then (default: the dtype of the "
        "loaded model)",
    )
    parser.add_argument("--data", help="held-out rows: measures the loss of every target")
    parser.add_argument(
        "--rows", type=int, help=f"number of rows of --data, from the first (default {ROWS})"
    )
    add_rounding(parser, "--target nf4")
    add_data_options(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="write 4 bits even where they lose a part of the adapter",
    )


def _add_verify(commands: Any) -> None:
    parser = add_command(commands, verify, "checkpoint")
    parser.add_argument(
        "--source", help="folder of the base it was quantised from, to quantise again"
    )
    parser.add_argument(
        "--against",
        choices=["bitsandbytes"],
        help="compare with the installed package; accepts a dense folder too",
    )


def _add_compare_exports(commands: Any) -> None:
    parser = add_command(commands, compare_exports, "model", "dataset")
    parser.add_argument("--adapter", help=POSITIONAL["adapter"])
    add_storage(parser)
    parser.add_argument("--rows", type=int, help="number of rows, from the first (default 8)")
    parser.add_argument(
        "--tolerance", type=float, help="KL in nats that counts as rounding (default 0.01)"
    )
    add_data_options(parser)


def _add_push(commands: Any) -> None:
    parser = add_command(commands, push)
    parser.add_argument("folder", help="folder of an adapter or a model")
    parser.add_argument("repo_id", help="owner/name on the Hub; created if missing")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="visible to you and your organisation only",
    )
    parser.add_argument(
        "--revision", help="an existing branch (default: main, created with the repository)"
    )
    parser.add_argument("--message", dest="commit_message", help="message of the commit")
