"""`minilora preview`, and what `minilora train` says about it."""

import shlex
from argparse import ArgumentParser
from typing import Any

from minilora.data import dataset_facts
from minilora.data import preview as show
from minilora.data.tokenizer import load_tokenizer
from minilora.losses.sft import SFT
from minilora.training.config import TrainConfig


def preview(dataset: str, model: str, rows: str, max_length: int, packing: str, whole: bool) -> None:
    """Show rows as training will see them, token by token, and the report about all; only the tokenizer is loaded."""
    chosen = [int(number) for number in rows.split(",") if number] if "," in rows else int(rows)
    tokenizer = load_tokenizer(model)
    found = show.preview(dataset, tokenizer, rows=chosen, max_length=max_length, packing=packing == "true")
    print(found.text(show.on_terminal(), None if whole else show.EDGE))


def add_options(parser: ArgumentParser) -> None:
    """The options of `minilora preview`, named as those of `minilora train`."""
    defaults = TrainConfig()
    parser.add_argument("--model", required=True, help="Hub id, folder or .gguf file, for its tokenizer")
    parser.add_argument("--rows", default="3", help="how many, or their numbers, with commas: 17,204 (default 3)")
    parser.add_argument("--max_length", type=int, default=defaults.max_length, help="as in train (default %(default)s)")
    parser.add_argument("--packing", choices=["true", "false"], default="false", help="as in train (default false)")
    parser.add_argument("--whole", action="store_true", help="every token, also within long runs")


def before_training(dataset: Any, model: str, tokenizer: Any, config: TrainConfig, objective: Any) -> str:
    """What to know about the tokenizer, and the command that shows what a run learns.

    Nothing for a mixture, which is in no file, and for rows of another kind than SFT's.
    """
    if not isinstance(dataset, str) or not isinstance(objective, SFT):
        return ""
    known = "".join(f"tokenizer: {remark}\n" for remark in dataset_facts.remarks(tokenizer, chats=True))
    packing = ["--packing", "true"] if config.packing else []
    command = ["minilora", "preview", dataset, "--model", model, "--max_length", str(config.max_length), *packing]
    return f"{known}token by token: {shlex.join(command)}\n"
