"""The commands that train: train, sweep, check-training."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import minilora as ml
from minilora.cli.options import add_command, add_quantize, add_storage, load_base
from minilora.cli.preview import (
    DataOptions,
    add_data_options,
    before_training,
    take_data_options,
)
from minilora.cli.values import CONFIGS, add_fields, add_objectives
from minilora.common import check_writable
from minilora.data.read_rows import check_file
from minilora.data.sources.hub_files import is_hub_dataset
from minilora.lora.files.find import CONFIG_FILE
from minilora.lora.files.source import split_source
from minilora.losses import OBJECTIVES
from minilora.losses.on_policy import OnPolicy
from minilora.tools.check_training import check_training as measure_training
from minilora.tools.sweep import sweep as search_options
from minilora.tools.sweep import sweep_table
from minilora.training.distributed import process_on
from minilora.training.run import check_run_options
from minilora.training.run_folder import checked_folder

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it: 128 + SIGINT


def train(
    model: str,
    dataset: Any,
    adapter: str | None,
    quantize: str | None,
    dtype: str,
    eval_dataset: str | None,
    objective: str,
    **given: Any,
) -> int:
    """Fine-tune an adapter, or with --method full the model, on a dataset and save it.

    Args:
        model: Hub id, folder or .gguf file.
        dataset: file of rows, or a data set on the Hub.
        adapter: folder for the trained weights; None chooses "adapter" (or "model", with --method
            full), in output_dir if there is one.
        quantize: "nf4", "keep" or None.
        dtype: a dtype's name, or "auto".
        eval_dataset: file of held-out rows.
        objective: a key of minilora.losses.OBJECTIVES.
        given: the other options: fields of LoRAConfig, TrainConfig and the loss, the data options
            and further datasets.

    Returns:
        The exit status: 0, or INTERRUPTED after Ctrl-C.

    Raises:
        ValueError: an option is invalid, missing or has no effect.
    """
    # Every option is checked before the model is loaded.
    general = given.pop("general_dataset")
    mix = given.pop("mix")
    mix_rows = given.pop("mix_rows")
    test_size = given.pop("test_size")
    if mix_rows is not None and not mix:
        raise ValueError("--mix_rows counts the rows of a mixture, and --mix is missing.")
    data = take_data_options(given)
    lora_config, train_config, goal = _configs(objective, given)
    evaluates = eval_dataset is not None or test_size is not None
    check_run_options(train_config, goal, evaluates)
    ranks = process_on(torch.device("cpu"), train_config.fsdp)
    _check_output_dir(train_config, ranks.is_main)
    folder = _result_folder(adapter, train_config, ranks.is_main)
    load = partial(data.load, answers=not isinstance(goal, OnPolicy))
    rows, held_out = _datasets(dataset, eval_dataset, load, test_size, train_config.seed)
    rows = _mixture(rows, mix, mix_rows, load, train_config.seed)
    _check_cache(train_config, rows)
    held_out = _held_out(held_out, general)
    _check_base(model)
    full = train_config.method == "full"
    if full and dtype == "auto":
        dtype = "float32"
    device = "cpu" if ranks.fsdp else None  # FSDP moves only the shards to the GPUs

    loaded = ml.load_model(model, quantize=quantize, dtype=dtype, device=device)
    tokenizer = ml.load_tokenizer(model)
    if isinstance(goal, ml.Classify | ml.RewardModel):
        goal.add_head(loaded, train_config.seed)
    if not full:
        ml.inject(loaded, lora_config, seed=train_config.seed)
        print(ml.count_parameters(loaded))
    shown = None if mix else dataset
    print(before_training(shown, data, model, tokenizer, train_config, goal), end="")
    result = ml.train(loaded, tokenizer, rows, train_config, objective=goal, eval_dataset=held_out)

    if ranks.is_main:
        if full:
            ml.save_model(loaded, folder, tokenizer=tokenizer)
        else:
            ml.save_adapter(loaded, folder)
        ml.write_model_card(folder, result, dataset=_card_dataset(dataset, rows))
    print(_summary(result, folder))
    if not result.interrupted:
        return 0
    if train_config.output_dir is None:
        print("Without --output_dir there is no checkpoint, and the run cannot continue.")
    else:
        print("To continue, run the same command with --resume_from_checkpoint last.")
    return INTERRUPTED


def _check_base(model: str) -> None:
    """Refuse a run or an adapter as the model of a new run, because `train` adds an adapter."""
    base, adapter = split_source(model)
    if adapter is not None:
        raise ValueError(
            f"{model} holds an adapter ({adapter}), and train begins from a base: give {base}. To "
            "continue a run, repeat its command with --resume_from_checkpoint last; to train "
            "further from its result, merge the adapter first."
        )


def _check_output_dir(config: ml.TrainConfig, is_main: bool) -> None:
    """Refuse a folder that cannot be written, is in use, or holds an earlier run."""
    if is_main and config.output_dir is not None:
        check_writable(Path(config.output_dir), "--output_dir")
    with checked_folder(config):
        pass  # ml.train checks and locks the folder again, after the model is loaded


def _result_folder(adapter: str | None, config: ml.TrainConfig, check: bool) -> Path:
    """Return the folder for the trained weights; if asked, check that it is free and writable."""
    is_full = config.method == "full"
    name = "model" if is_full else "adapter"
    folder = Path(adapter or Path(config.output_dir or "", name))
    if not check:
        return folder
    written = folder / ("config.json" if is_full else CONFIG_FILE)
    if written.exists() and config.resume_from_checkpoint is None:
        raise ValueError(
            f"--adapter: {folder} holds the weights of an earlier run. Choose another folder, or "
            "delete it."
        )
    check_writable(folder, "--adapter")
    return folder


def _configs(objective: str, given: dict[str, Any]) -> tuple[ml.LoRAConfig, ml.TrainConfig, Any]:
    """Return the configurations and the loss; refuse an option without effect."""
    lora, training, learned = (
        _take_fields(config, given) for config in (*CONFIGS, OBJECTIVES[objective])
    )
    train_config = ml.TrainConfig(**training)
    unused = list(given)
    if train_config.method == "full":
        unused += lora
    if unused:
        raise ValueError(
            f"--{unused[0]} has no effect with --objective {objective} "
            f"--method {train_config.method}."
        )
    for field in fields(OBJECTIVES[objective]):
        if field.default is MISSING and field.name not in learned:
            raise ValueError(f"--objective {objective} needs --{field.name}.")
    if objective in ("classify", "reward_model"):
        lora = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} | lora
    return ml.LoRAConfig(**lora), train_config, OBJECTIVES[objective](**learned)


def _take_fields(config: type, given: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields of `config` from `given` and return them."""
    return {field.name: given.pop(field.name) for field in fields(config) if field.name in given}


def _datasets(
    dataset: str,
    eval_dataset: str | None,
    load: Callable[[str], Any],
    test_size: float | None,
    seed: int,
) -> tuple[Any, Any]:
    """Return the rows to train on and the held-out rows, each a path or a list."""
    if test_size is None:
        held_out = None if eval_dataset is None else load(eval_dataset)
        return load(dataset), held_out
    if eval_dataset is not None:
        raise ValueError(
            "--test_size holds out a part of the dataset, and --eval_dataset names other held-out "
            "rows: leave one of them out."
        )
    return ml.train_test_split(load(dataset), test=test_size, seed=seed)


def _mixture(
    dataset: Any,
    mix: Sequence[tuple[str, str]] | None,
    mix_rows: int | None,
    load: Callable[[str], Any],
    seed: int,
) -> Any:
    """Return the dataset, mixed with those of --mix."""
    if mix:
        parts = [(dataset, 1.0)]
        for path, weight in mix:
            parts.append((load(path), float(weight)))
        return ml.mix_datasets(parts, mix_rows, seed)
    return dataset


def _check_cache(config: ml.TrainConfig, rows: Any) -> None:
    """Raise ValueError for a cache of rows that are not a file."""
    if config.dataset_cache is not None and not isinstance(rows, str):
        raise ValueError(
            "--dataset_cache keeps the tokens of a dataset file, and --columns, --system, --chat, "
            "--separator, --test_size and --mix make other rows of it. Leave them or the cache "
            "out; or write these rows to a .jsonl file first."
        )


def _held_out(eval_dataset: Any, general: str | None) -> Any:
    """Return the evaluation dataset, or a dict of it and the general text."""
    if general is None:
        return eval_dataset
    if eval_dataset is None:
        raise ValueError(
            "--general_dataset is measured together with --eval_dataset, which is missing."
        )
    check_file(general)
    return {"": eval_dataset, "general": general}


def _card_dataset(dataset: str, rows: Any) -> Any:
    """Return what the model card names as its data: a Hub id, a file, or the number of rows."""
    if is_hub_dataset(dataset):
        return dataset.partition(":")[0]
    return rows


def _summary(result: ml.TrainResult, folder: Path) -> str:
    """Return the last line that `train` prints."""
    state = "interrupted" if result.interrupted else "done"
    figures = {"loss": result.loss}
    if result.evals:
        figures |= result.evals[-1]
    shown = ""
    for name, value in figures.items():
        if name != "step" and value is not None:
            shown += f", {name} {value:.4g}"
    return f"{state} after {result.steps} steps{shown}; in {folder}"


def sweep(
    model: str, options: Sequence[str], search: Sequence[str], folder: str, **settings: Any
) -> None:
    """Search over options of train; each trial runs in a new process.

    Other options are passed on to train.

    Args:
        model: as for train, or the .toml file of a run.
        options: options of train.
        search: OPTION=VALUES.
        folder: folder of the study and its trials.
        settings: further options of ml.sweep.

    Raises:
        ValueError: an item of `search` is not OPTION=VALUES, or an option occurs twice.
    """
    values = {}
    for item in search:
        name, equals, choices = item.partition("=")
        if equals:
            values[name] = choices
    if len(values) < len(search):
        raise ValueError(
            f"--search: expected OPTION=VALUES, each option once, got {' '.join(search)}."
        )
    print(sweep_table(search_options([model, *options], values, folder, **settings)))


def check_training(
    model: str, quantize: str | None, dtype: str, data: str | None, **options: Any
) -> int:
    """Check that a model trains correctly: splits, eval batches, adapter off, frozen base, merging.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter, whose base is
            checked.
        quantize: "nf4", "keep", "none", or None to store the base as in the run's training.
        dtype: a dtype's name, or "auto".
        data: rows to measure with; None takes a few short texts.
        options: the data options.

    Returns:
        The exit status: 1 if a check fails.
    """
    data_options = take_data_options(options)
    if data is None and data_options != DataOptions():
        raise ValueError(f"{data_options.words()[0]} changes the rows of --data, which is missing.")
    rows = None if data is None else data_options.load(data)
    loaded, tokenizer = load_base(model, quantize, dtype)
    report = measure_training(loaded, tokenizer, rows=rows)
    print(report)
    return int(not report.passed)


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    _add_train(commands)
    parser = add_command(commands, check_training, "model")
    add_storage(parser)
    parser.add_argument("--data", help="rows to measure with (default: a few short texts)")
    add_data_options(parser)
    _add_sweep(commands)


def _add_train(commands: Any) -> None:
    parser = add_command(commands, train, "model", "dataset")
    parser.usage = (
        "minilora train MODEL DATASET [OPTIONS]\n       minilora train RUN.toml [OPTIONS]"
    )
    add_quantize(parser)
    parser.add_argument(
        "--adapter",
        "--folder",
        dest="adapter",
        help="folder for the trained weights (default: adapter, or model with --method full; in "
        "output_dir, if given)",
    )
    parser.add_argument("--eval_dataset", help="held-out rows, measured during training")
    parser.add_argument(
        "--test_size",
        type=_number,
        metavar="X|N",
        help="share or number of the rows to hold out, in place of --eval_dataset; the same rows "
        "for the same seed",
    )
    parser.add_argument(
        "--general_dataset",
        help="text of another kind, such as prose: its perplexity, measured with eval_dataset, "
        "shows forgetting",
    )
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="sft", help="the loss (default %(default)s)"
    )
    parser.add_argument(
        "--mix",
        nargs=2,
        action="append",
        metavar=("PATH", "WEIGHT"),
        help="a further dataset and its weight, where DATASET has weight 1; may be repeated",
    )
    parser.add_argument(
        "--mix_rows",
        type=int,
        help="rows of the mixture (default: the most that need no repetition)",
    )
    add_data_options(parser)
    group = parser.add_argument_group("the adapter (LoRAConfig) and the run (TrainConfig)")
    for config in CONFIGS:
        add_fields(group, config)
    add_objectives(parser, OBJECTIVES)


def _number(text: str) -> float:
    """Return a whole number, or a share."""
    return int(text) if text.isdigit() else float(text)


def _add_sweep(commands: Any) -> None:
    parser = add_command(commands, sweep)
    parser.add_argument("model", help="as for train, or the .toml file of a run")
    parser.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="OPTION=VALUES",
        help="an option of train and its values: r=4,8,16 or learning_rate=1e-5:1e-3:log; may be "
        "repeated",
    )
    parser.add_argument(
        "--trials", type=int, default=20, help="total number of trials (default %(default)s)"
    )
    parser.add_argument(
        "--metric",
        default="eval_loss",
        help="a figure of the last evaluation (default %(default)s)",
    )
    parser.add_argument(
        "--folder", default="sweep", help="folder of study.db and the trials (default %(default)s)"
    )
