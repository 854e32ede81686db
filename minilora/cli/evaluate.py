"""The command evaluate: figures, predictions, the worst rows, and a comparison of before and after."""

import json
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli.options import (
    POSITIONAL,
    add_command,
    add_no_check_base,
    add_storage,
    add_template_kwargs,
    base_and_adapter,
    load,
)
from minilora.cli.preview import add_data_options, take_data_options
from minilora.common import check_writable
from minilora.data.chat_template import as_trained
from minilora.evaluation.evaluate import check_arguments
from minilora.evaluation.metrics import NAMED, SHORT_NAMES, metric_functions
from minilora.lora.files.save_load import find_adapter

BASE = "base"  # --compare base: the model without its adapter
COMPARED = "compared"  # name of the other adapter in the model
LOADING = ("quantize", "dtype", "check_base")


def evaluate(
    model: str,
    dataset: str,
    adapter: str | None,
    compare: str | None,
    out: str | None,
    show: int,
    **options: Any,
) -> None:
    """Score a model on held-out rows: loss, perplexity, exact match, token F1, likeliest label.

    Everything that can be known without the model is checked before it is loaded.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        dataset: file of rows, or a data set on the Hub.
        adapter: folder or Hub id of an adapter; None uses that of `model`, or the
            base alone.
        compare: "base", or folder or Hub id of another adapter to compare with; None compares
            nothing.
        out: file for the rows with their answers; None writes none.
        show: number of rows with the lowest scores to print.
        options: quantize, dtype and check_base of loading, options of ml.evaluate, and the
            data options.

    Raises:
        ValueError: an option is invalid, or has no effect.
    """
    rows = take_data_options(options).load(dataset)
    metric_functions(options["metrics"])
    check_arguments(options["metrics"], options["max_new_tokens"], options["batch_size"])
    if out is not None:
        _check_output(Path(out))
    base, folder = base_and_adapter(model, adapter)
    if adapter is None and folder is not None:
        adapter = str(folder)
    other = _compared_adapter(compare, adapter)
    loading = {name: options.pop(name) for name in LOADING}
    loaded, tokenizer = load(base, None if folder is None else str(folder), **loading)
    # Both sides of a comparison read the same prompts: those of the adapter's training.
    tokenizer = as_trained(tokenizer, options.pop("chat_template_kwargs"), loaded)
    if other is not None:
        check_base = loading["check_base"]
        ml.load_adapter(loaded, other, COMPARED, tokenizer=tokenizer, check_base=check_base)
        ml.set_adapter(loaded, "default")
    scores = ml.evaluate(loaded, tokenizer, rows, **options)
    before = None
    if compare is not None:
        before = _scores_before(loaded, tokenizer, rows, other, options)
    if out is not None:
        scores.write(out, before)
    _print(scores, before, (compare or "", adapter or ""), show)


def _check_output(path: Path) -> None:
    """Raise ValueError if the file of the predictions cannot be written."""
    if path.is_dir():
        raise ValueError(
            f"--out: {path} is a folder. Give the name of a file, such as {path}.jsonl."
        )
    check_writable(path.parent, "--out")


def _compared_adapter(compare: str | None, adapter: str | None) -> Path | None:
    """Return the folder of the adapter to compare with; None for the base or no comparison."""
    if compare is None:
        return None
    if adapter is None:
        raise ValueError(
            f"--compare {compare}: expected an --adapter to compare with it, and there is none. "
            "Add --adapter, or leave out --compare."
        )
    if compare == BASE:
        return None
    return find_adapter(compare)[0]


def _scores_before(
    model: Any, tokenizer: Any, dataset: Any, other: Path | None, options: dict[str, Any]
) -> ml.Scores:
    """Return the scores of the base, or of the other adapter, on the same rows."""
    if other is not None:
        ml.set_adapter(model, COMPARED)
        return ml.evaluate(model, tokenizer, dataset, **options)
    with ml.disable_adapters(model):
        return ml.evaluate(model, tokenizer, dataset, **options)


def _print(scores: ml.Scores, before: ml.Scores | None, paths: tuple[str, str], show: int) -> None:
    """Print the figures or the comparison, the worst rows, and the figures as JSON."""
    figures: dict[str, Any] = dict(scores.as_dict())
    if before is None:
        print(scores)
    else:
        first, second = paths
        print(f"{scores.n} rows: {first}, then {second}")
        print(scores.compare(before, (Path(first).name[:12], Path(second).name[:12])))
        figures["compared"] = before.as_dict()
    worst = scores.worst(show)
    if worst:
        print(f"\nThe {len(worst)} of {len(scores.rows)} rows with the lowest scores:")
    for row in worst:
        print(row)
    print(json.dumps(figures))


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    parser = add_command(commands, evaluate, "model", "dataset")
    add_data_options(parser)
    parser.add_argument("--adapter", help=POSITIONAL["adapter"])
    parser.add_argument(
        "--compare",
        metavar="base|ADAPTER",
        help="score the same rows with the adapter off (base), or with another adapter, and print "
        "both, with the numbers of rows that are better and worse",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write each row's prompt, answer and scores as JSON lines"
    )
    parser.add_argument(
        "--show", type=int, default=0, help="print the N rows with the lowest scores", metavar="N"
    )
    names = ", ".join([*NAMED, *SHORT_NAMES])
    parser.add_argument(
        "--metrics",
        metavar="A,B",
        help=f"metrics of the greedy answers, separated by commas: {names} (default exact_match,"
        "token_f1); pass_at_1 runs the answers as programs",
    )
    parser.add_argument(
        "--labels",
        type=lambda value: value.split(","),
        help="the allowed answers, separated by commas",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=32, help="longest answer (default %(default)s)"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        help="rows of the greatest length in one pass; changes no result (default: rows of 4,096 "
        "tokens together)",
    )
    add_template_kwargs(parser)
    add_no_check_base(parser)
    add_storage(parser)
