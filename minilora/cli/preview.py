"""The command preview, and the lines that `minilora train` prints about its data."""

import json
import shlex
from typing import Any

from minilora.cli.options import add_command, add_template_kwargs
from minilora.data import dataset_facts
from minilora.data import preview as show
from minilora.data.tokenizer import load_tokenizer
from minilora.losses.sft import SFT
from minilora.training.config import TrainConfig


def preview(
    dataset: str,
    model: str,
    rows: str,
    max_length: int,
    packing: str,
    whole: bool,
    chat_template_kwargs: dict[str, Any] | None,
) -> None:
    """Show rows as training reads them, token by token, and the report on all rows.

    Only the tokenizer is loaded.

    Args:
        dataset: file of rows.
        model: Hub id, folder or .gguf file, for its tokenizer.
        rows: how many rows to show, or row numbers with commas.
        max_length: longest row in tokens.
        packing: "true" shows packed rows.
        whole: show every token, also within long runs.
        chat_template_kwargs: variables of the chat template.
    """
    if "," in rows:
        chosen: int | list[int] = [int(number) for number in rows.split(",") if number]
    else:
        chosen = int(rows)
    tokenizer = load_tokenizer(model)
    shown = show.preview(
        dataset,
        tokenizer,
        rows=chosen,
        max_length=max_length,
        packing=packing == "true",
        chat_template_kwargs=chat_template_kwargs,
    )
    print(shown.text(show.on_terminal(), None if whole else show.EDGE))


def add_commands(commands: Any) -> None:
    """Add the command; its options have the names of `minilora train`.

    Args:
        commands: the subparsers of the program.
    """
    defaults = TrainConfig()
    parser = add_command(commands, preview, "dataset")
    parser.add_argument(
        "--model", required=True, help="Hub id, folder or .gguf file, for its tokenizer"
    )
    parser.add_argument(
        "--rows", default="3", help="number of rows, or row numbers with commas: 17,204 (default 3)"
    )
    parser.add_argument(
        "--max_length",
        type=int,
        default=defaults.max_length,
        help="as in train (default %(default)s)",
    )
    parser.add_argument(
        "--packing", choices=["true", "false"], default="false", help="as in train (default false)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="show every token, also within long runs"
    )
    add_template_kwargs(parser)


def before_training(
    dataset: Any, model: str, tokenizer: Any, config: TrainConfig, objective: Any
) -> str:
    """Return remarks about the tokenizer, and the command that shows which tokens a run supervises.

    Args:
        dataset: the training data; a mixture, which is not a file, gets no remarks.
        model: Hub id, folder or .gguf file of the model.
        tokenizer: the model's tokenizer.
        config: the run.
        objective: the loss; losses other than SFT have rows of other shapes and get no remarks.

    Returns:
        Lines to print, or the empty string.
    """
    if not isinstance(dataset, str) or not isinstance(objective, SFT):
        return ""
    lines = [f"tokenizer: {remark}" for remark in dataset_facts.remarks(tokenizer, chats=True)]
    command = [
        "minilora",
        "preview",
        dataset,
        "--model",
        model,
        "--max_length",
        str(config.max_length),
    ]
    if config.packing:
        command += ["--packing", "true"]
    if config.chat_template_kwargs:
        command += ["--chat_template_kwargs", json.dumps(config.chat_template_kwargs)]
    lines.append(f"token by token: {shlex.join(command)}")
    return "\n".join(lines) + "\n"
