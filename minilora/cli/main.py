"""The program `minilora`: parse the arguments, run a command, print errors without traceback.

Each command is a thin wrapper around one public function. The options of `train` are the fields of
LoRAConfig, TrainConfig and the losses: their help texts and types are those of the fields, so
nothing is written twice.
"""

import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minilora as ml
from minilora.cli import (
    chat,
    checkpoints,
    evaluate,
    export,
    plan,
    plot,
    preview,
    runs,
    text,
    train,
)
from minilora.cli.parser import CommandParser
from minilora.cli.values import as_words, read_config
from minilora.common import __version__

INTERRUPTED = train.INTERRUPTED
TERMINATED = 128 + signal.SIGTERM
SAMPLE = "sample:smollm2"  # stands for the result of ml.samples.smollm2()
GROUPS = (train, text, chat, evaluate, checkpoints, export, preview, plan, plot, runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors that a user can correct are printed to stderr without a traceback, and warnings without
    their place in the code.

    Args:
        arguments: the command and its options; None reads sys.argv.

    Returns:
        The exit status: 0 for success, 1 for an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    ends_on_signal = given[:1] not in (["serve"], ["chat"])
    with _plain_warnings(), _termination_as_interrupt(ends_on_signal) as terminations:
        try:
            status = _run(given)
        except KeyboardInterrupt:
            print("minilora: interrupted", file=sys.stderr)
            status = INTERRUPTED
        except (ValueError, TypeError, OSError, ImportError) as error:
            print(f"minilora: {error}", *_notes(error), sep="\n", file=sys.stderr)
            status = 1
        except RuntimeError as error:
            if not _notes(error):
                raise
            print(f"minilora: {error}", *_notes(error), sep="\n", file=sys.stderr)
            status = 1
    if status == INTERRUPTED and terminations:
        return TERMINATED
    return status


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as sentences: their place in the code helps no user of a command."""

    def sentence(message: Warning | str, *place: Any) -> str:
        return f"minilora: warning: {message}\n"

    previous = warnings.formatwarning
    warnings.formatwarning = sentence
    try:
        yield
    finally:
        warnings.formatwarning = previous


@contextmanager
def _termination_as_interrupt(active: bool) -> Iterator[list[int]]:
    """Let SIGTERM, as of Slurm or a spot machine, end a command as Ctrl-C does.

    Args:
        active: False changes nothing: the server handles both signals itself, and Ctrl-C does not
            end a chat.

    Yields:
        A list that receives the signal's number.
    """
    received: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def terminate(number: int, frame: Any) -> None:
        received.append(number)
        signal.raise_signal(signal.SIGINT)

    def interrupt_if_terminated(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt

    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt == signal.SIG_IGN:  # as in a background job of a script: Ctrl-C stays ignored
        signal.signal(signal.SIGINT, interrupt_if_terminated)
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        if on_interrupt == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(given: list[str]) -> int:
    """Parse the arguments and call the command's function with its options as keywords."""
    parser = _parser()
    if not given:
        parser.print_help()
        return 0
    parser.check_command(given[0])
    if given[0] == "train" and len(given) > 1 and given[1].endswith(".toml"):
        given.insert(1, "--config")
    keywords, unparsed = _keywords(parser, given)
    run = keywords.pop("run")
    keywords.pop("config", None)
    if run is train.sweep:
        keywords["options"] = unparsed  # sweep passes these on to train
    elif unparsed:
        parser.command(given[0]).refuse(unparsed)
    if keywords.get("model") == SAMPLE:
        keywords["model"] = ml.samples.smollm2()
    return run(**keywords) or 0


def _keywords(parser: CommandParser, given: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of a command by name, and the arguments that no option takes."""
    names = [word.partition("=")[0] for word in given[1:]]
    if "--config" not in names:
        options, unparsed = parser.parse_known_args(given)
        return vars(options), unparsed
    command = parser.command(given[0])
    known = command.names() + command.destinations()
    arguments = given[1:]
    if given[0] == "sweep":
        train_parser = parser.command("train")
        known += train_parser.names() + train_parser.destinations()
        arguments = train_parser.with_equals(arguments)  # no value is taken for a positional
    on_line, unparsed = command.parse_given(arguments)
    known = [name for name in known if name != "config"]
    path = Path(on_line["config"])
    in_file = read_config(path, known)
    words = [given[0]]
    missing = []
    for name in command.destinations():
        if name in on_line or name in in_file:
            words.append(str(on_line.get(name, in_file.pop(name, None))))
        elif name in command.destinations(required=True):
            missing.append(name)
    if missing:
        raise ValueError(
            f"{path}: {' and '.join(missing)} missing: add them to the file, or give them on the "
            "command line."
        )
    passed_on = []
    if given[0] == "sweep" and "dataset" in in_file:
        passed_on.append(str(in_file.pop("dataset")))
    for name, value in in_file.items():
        action = command.option(name)
        if action is None:
            train_action = parser.command("train").option(name)
            assert train_action is not None
            passed_on += as_words(train_action, name, value)
        elif action.dest not in on_line:
            words += as_words(action, name, value)
    command.require_not(on_line)
    options, _ = parser.parse_known_args(words)
    return vars(options) | on_line, passed_on + unparsed


def _parser() -> CommandParser:
    parser = CommandParser(prog="minilora", description="LoRA and QLoRA from scratch.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(required=True)
    for group in GROUPS:
        group.add_commands(commands)
    return parser
