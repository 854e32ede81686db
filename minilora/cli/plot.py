"""The command plot."""

from collections.abc import Sequence
from typing import Any

from minilora.cli.options import add_command
from minilora.tools.plot.logs import runs as draw_runs


def plot(runs: Sequence[str], file: str) -> None:
    """Draw the logs of one or several runs into one picture.

    Args:
        runs: output_dir of each run, or its log.jsonl.
        file: the picture: .svg, .png or .pdf.
    """
    draw_runs(runs, file)
    print(file)


def add_commands(commands: Any) -> None:
    """Add the commands of this file.

    Args:
        commands: the subparsers of the program.
    """
    parser = add_command(commands, plot)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output_dir of a run, or its log.jsonl"
    )
    parser.add_argument(
        "--file", default="runs.svg", help=".svg, .png or .pdf (default %(default)s)"
    )
