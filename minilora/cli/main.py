"""The program `minilora`: parse the arguments, run a command, print errors without traceback.

Each command is a thin wrapper around one public function. The options of `train` are the fields of
LoRAConfig, TrainConfig and the losses: their help texts and types are those of the fields, so
nothing is written twice.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minilora.cli import checkpoints, plan, plot, preview, text, train
from minilora.cli.values import from_toml

GROUPS = (train, text, checkpoints, preview, plan, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Errors that a user can correct are printed to stderr without a traceback.

    Args:
        arguments: the command and its options; None reads sys.argv.

    Returns:
        The exit status: 0 for success, 1 for an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        remedies = getattr(error, "__notes__", None)
        if not remedies:
            raise
        print(f"minilora: {error}", *remedies, sep="\n", file=sys.stderr)
        return 1


def _run(given: list[str]) -> int:
    """Parse the arguments and call the command's function with its options as keywords."""
    if given[:1] == ["train"] and len(given) > 1 and given[1].endswith(".toml"):
        given[1:2] = from_toml(Path(given[1]), _option_names("train"))
    parser = _parser()
    options, unparsed = parser.parse_known_args(given)
    if options.run is train.sweep:
        options.options = unparsed  # sweep passes these on to train
    elif unparsed:
        parser.error(f"unrecognized arguments: {' '.join(unparsed)}")
    keywords = vars(options)
    run = keywords.pop("run")
    return run(**keywords) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minilora", description="LoRA and QLoRA from scratch.")
    commands = parser.add_subparsers(required=True)
    for group in GROUPS:
        group.add_commands(commands)
    return parser


def _option_names(command: str) -> list[str]:
    """Return the names of a command's options and positional arguments."""
    actions = _subparser(command)._actions
    names = {action.dest for action in actions}
    for action in actions:
        names |= {name.lstrip("-") for name in action.option_strings}
    return sorted(names - {"help", "h"})


def _subparser(command: str) -> argparse.ArgumentParser:
    for action in _parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[command]
    raise KeyError(command)
