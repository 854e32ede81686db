"""The command preview, the data options of several commands, and what train prints of its data."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minilora.cli.options import add_command, add_template_kwargs
from minilora.cli.values import parse_value
from minilora.data import dataset_facts
from minilora.data import preview as show
from minilora.data.chat.values import present
from minilora.data.formats import shape_of, unknown_shape
from minilora.data.read_rows import check_file, iterate_dataset
from minilora.data.sources.load_dataset import file_of, load_dataset
from minilora.data.sources.proposal import as_option, mean_length, propose_columns
from minilora.data.tokenizer import load_tokenizer
from minilora.losses.sft import SFT
from minilora.training.config import TrainConfig

SAMPLE = 200  # rows that show the meaning of unknown columns
CHECKED = 10_000  # rows whose shape is known before the model is loaded, in about 0.1 s
CHAT_REMARK = (
    "If MODEL has a chat template, add --chat true: generate puts a prompt through the template, "
    "and training then does the same."
)
SEPARATORS = {"tab": "\t", "\\t": "\t"}  # as written on a command line


# ---- data options


@dataclass(frozen=True)
class DataOptions:
    """The options of ml.load_dataset, as several commands have them.

    Attributes:
        columns: key of a known shape → column.
        system: system message for each conversation.
        chat: make a conversation of prompt and completion.
        separator: character between two cells of a .csv file.
    """

    columns: dict[str, str] | None = None
    system: str | None = None
    chat: bool = False
    separator: str | None = None

    def read(self, dataset: str) -> Any:
        """Return the rows of a dataset, or its path if no option changes its rows.

        Args:
            dataset: a file, or a data set on the Hub.

        Raises:
            ValueError: an option does not fit the rows.
            OSError: there is no such file or data set.
        """
        if self == DataOptions():
            file = file_of(dataset)
            if file is not None:
                check_file(file)
                return str(file)
        return load_dataset(
            dataset,
            columns=self.columns,
            system=self.system,
            chat=self.chat,
            separator=self.separator,
        )

    def load(self, dataset: str, answers: bool = True) -> Any:
        """Return what `read` returns; raise ValueError for an unknown shape of the rows.

        So this error comes before a model is loaded.

        Args:
            dataset: a file, or a data set on the Hub.
            answers: False also takes rows with a `prompt` alone, to which a model samples answers.

        Raises:
            ValueError: one of the first rows has no known shape, or an option does not fit the
                rows.
        """
        loaded = self.read(dataset)
        sample = first_rows(loaded)
        if (answers or not sample[0].get("prompt")) and not has_known_shape(sample):
            raise unknown_shape(sample)
        for index, row in enumerate(islice(iterate_dataset(loaded), CHECKED)):
            if answers or not row.get("prompt"):
                shape_of(row, index)
        return loaded

    def words(self) -> list[str]:
        """Return the options as words of a command line."""
        words = []
        if self.columns:
            words += ["--columns", as_option(self.columns)]
        if self.system:
            words += ["--system", self.system]
        if self.chat:
            words += ["--chat", "true"]
        if self.separator:
            words += ["--separator", "tab" if self.separator == "\t" else self.separator]
        return words


def first_rows(dataset: Any) -> list[Any]:
    """Return the first rows of a dataset, at most SAMPLE.

    Args:
        dataset: rows, or the path of a file.
    """
    return list(islice(iterate_dataset(dataset), SAMPLE))


def has_known_shape(rows: Sequence[Any]) -> bool:
    """Return True if the first row has a known shape.

    Args:
        rows: the first rows of a dataset.
    """
    try:
        shape_of(rows[0])
    except ValueError:
        return False
    return True


def take_data_options(given: dict[str, Any]) -> DataOptions:
    """Remove the data options from the options of a command and return them.

    Args:
        given: the options by name.
    """
    names = ("columns", "system", "chat", "separator")
    return DataOptions(**{name: given.pop(name) for name in names})


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add --columns, --system, --chat and --separator.

    Args:
        parser: the command's parser.
    """
    group = parser.add_argument_group("the rows (ml.load_dataset)")
    group.add_argument(
        "--columns",
        type=_columns,
        metavar="KEY=COLUMN,…",
        help="columns of other names, such as prompt=ticket,completion=answer; also as JSON",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="system message for each conversation that has none"
    )
    group.add_argument(
        "--chat",
        type=_boolean,
        default=False,
        metavar="true|false",
        help="make conversations of prompt and completion, so that the chat template is used, as "
        "in generate (default false)",
    )
    group.add_argument(
        "--separator",
        type=lambda text: SEPARATORS.get(text, text),
        metavar="TEXT",
        help="character between two cells of a .csv file; tab for a tabulator (default: read from "
        "the header)",
    )


def _boolean(text: str) -> bool:
    """Return True or False, or the error that argparse expects."""
    try:
        return parse_value(text, bool)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


def _columns(text: str) -> dict[str, str]:
    """Return KEY=COLUMN,… or JSON as a dict, or the error that argparse expects."""
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    columns = {}
    for pair in text.split(","):
        key, equals, column = pair.partition("=")
        if not (key and equals and column):
            raise argparse.ArgumentTypeError(
                f"expected KEY=COLUMN,… such as prompt=ticket,completion=answer, got {text!r}"
            )
        columns[key.strip()] = column.strip()
    return columns


# ---- the command


def preview(
    dataset: str,
    model: str | None,
    rows: str,
    max_length: int,
    packing: str,
    whole: bool,
    chat_template_kwargs: dict[str, Any] | None,
    **data: Any,
) -> None:
    """Show rows as training reads them, token by token, and the report on all rows.

    Only the tokenizer is loaded. Without a model, or for columns of unknown names, the command
    shows the columns and proposes the option --columns, with --chat true for a tokenizer that has a
    chat template.

    Args:
        dataset: file of rows, or a data set on the Hub.
        model: Hub id, folder or .gguf file, for its tokenizer; None shows the columns alone.
        rows: how many rows to show, or row numbers with commas.
        max_length: longest row in tokens.
        packing: "true" shows packed rows.
        whole: show every token, also within long runs.
        chat_template_kwargs: variables of the chat template.
        data: the data options.
    """
    options = take_data_options(data)
    loaded = options.read(dataset)
    sample = first_rows(loaded)
    if model is None or not has_known_shape(sample):
        print(_columns_text(dataset, sample, options, model))
        return
    if "," in rows:
        chosen: int | list[int] = [int(number) for number in rows.split(",") if number]
    else:
        chosen = int(rows)
    tokenizer = load_tokenizer(model)
    shown = show.preview(
        loaded,
        tokenizer,
        rows=chosen,
        max_length=max_length,
        packing=packing == "true",
        chat_template_kwargs=chat_template_kwargs,
    )
    print(shown.text(show.on_terminal(), None if whole else show.EDGE))


def _columns_text(
    dataset: str, rows: Sequence[Any], options: DataOptions, model: str | None
) -> str:
    """Return the columns of some rows, their shape, and the next command."""
    names = list(dict.fromkeys(name for row in rows for name in present(row)))
    lines = [f"{len(rows)} rows read; columns:"]
    for name in names:
        values = [row[name] for row in rows if name in present(row)]
        different = len({str(value) for value in values})
        lines.append(
            f"  {name}: {mean_length(values):.0f} characters on average, {different} different "
            f"of {len(values)}, first {str(values[0])[:48]!r}"
        )
    command = [*_command(dataset, model or "MODEL"), *options.words()]
    if has_known_shape(rows):
        lines.append(f"shape: {shape_of(rows[0])}. Token by token: {shlex.join(command)}")
        if model is None and not options.chat and shape_of(rows[0]) == "prompt/completion":
            lines.append(CHAT_REMARK)
        return "\n".join(lines)
    proposal = propose_columns(rows)
    if not proposal:
        raise ValueError("\n".join([*lines, str(unknown_shape(rows))]))
    command += ["--columns", as_option(proposal)]
    lines.append(
        "The columns match no known shape. By their names and contents they may mean the following. "
        "Check it, and pass the same options to train."
    )
    if "prompt" in proposal or "completion" in proposal:
        if model is None:
            lines.append(CHAT_REMARK)
        elif load_tokenizer(model).chat_template:
            command += ["--chat", "true"]
    lines.append(f"  {shlex.join(command)}")
    return "\n".join(lines)


def _command(dataset: str, model: str) -> list[str]:
    """Return the words of the command that shows a dataset token by token."""
    return ["minilora", "preview", dataset, "--model", model]


def add_commands(commands: Any) -> None:
    """Add the command; its options have the names of `minilora train`.

    Args:
        commands: the subparsers of the program.
    """
    defaults = TrainConfig()
    parser = add_command(commands, preview, "dataset")
    parser.add_argument(
        "--model",
        help="Hub id, folder or .gguf file, for its tokenizer (default: show the columns alone)",
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
    add_data_options(parser)


def before_training(
    dataset: str | None,
    data: DataOptions,
    model: str,
    tokenizer: Any,
    config: TrainConfig,
    objective: Any,
) -> str:
    """Return remarks about the tokenizer, and the command that shows which tokens a run supervises.

    Args:
        dataset: file or Hub id of the training data; None, for a mixture, gets no remarks.
        data: the data options of the run.
        model: Hub id, folder or .gguf file of the model.
        tokenizer: the model's tokenizer.
        config: the run.
        objective: the loss; losses other than SFT have rows of other shapes and get no remarks.

    Returns:
        Lines to print, or the empty string.
    """
    if dataset is None or not isinstance(objective, SFT):
        return ""
    lines = [f"tokenizer: {remark}" for remark in dataset_facts.remarks(tokenizer, chats=True)]
    command = [*_command(dataset, model), "--max_length", str(config.max_length)]
    if config.packing:
        command += ["--packing", "true"]
    if config.chat_template_kwargs:
        command += ["--chat_template_kwargs", json.dumps(config.chat_template_kwargs)]
    command += data.words()
    lines.append(f"token by token: {shlex.join(command)}")
    return "\n".join(lines) + "\n"
