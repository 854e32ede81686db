"""The command `runs`, which compares training runs."""

from collections.abc import Sequence
from typing import Any

from minilora.cli.options import add_command
from minilora.tools.compare_runs import compare_runs


def runs(folders: Sequence[str]) -> None:
    """Compare runs: the options that differ, and the last figures of each.

    Args:
        folders: output_dir of each run.
    """
    print(compare_runs(folders))


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    parser = add_command(commands, runs)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="output_dir of a run")
