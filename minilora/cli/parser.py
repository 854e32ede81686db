"""The argument parser of every command.

It differs from argparse's in five ways. A name must be complete: `--lr` never stands for
`--lr_scheduler_type`. A name may have hyphens for underscores. An unknown name is answered with the
nearest names, also for names of other libraries. An error prints no list of all options. An optional
positional argument may follow the options, which argparse allows from Python 3.13 on.
"""

import argparse
import copy
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from minilora.common import nearest


class HelpLines(argparse.HelpFormatter):
    """Help texts whose line breaks stay; argparse joins the lines of a text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n".join(fill(line, width, indent) for line in text.splitlines())


class CommandParser(argparse.ArgumentParser):
    """A parser whose option names are exact, with hyphens or underscores."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpLines, **settings)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] typeshed's overloads
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """Parse the arguments after replacing hyphens in the names of options.

        Args:
            args: the arguments; None reads sys.argv.
            namespace: the object that receives the values.

        Returns:
            The namespace, and the arguments that no option takes.
        """
        if args is not None:
            args = [self._with_underscores(argument) for argument in args]
        values, unparsed = super().parse_known_args(args, namespace)
        self._fill_optional(values, unparsed)
        return values, unparsed

    def _fill_optional(self, values: argparse.Namespace, unparsed: list[str]) -> None:
        """Give the first arguments that no option takes to optional positional ones without value.

        `generate MODEL --adapter out "a prompt"`: argparse has set the optional prompt to None when
        it met the option.
        """
        for action in self._actions:
            if action.option_strings or action.nargs != "?":
                continue
            is_value = len(unparsed) > 0 and not unparsed[0].startswith("--")
            if is_value and getattr(values, action.dest, None) is None:
                setattr(values, action.dest, unparsed.pop(0))

    def _with_underscores(self, argument: str) -> str:
        """Return `--learning-rate=1` as `--learning_rate=1` if only the second is an option."""
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in self._option_string_actions:
            return argument
        renamed = "--" + name[2:].replace("-", "_")
        if renamed not in self._option_string_actions:
            return argument
        return renamed + equals + value

    def error(self, message: str) -> NoReturn:
        """Print an error in two lines and exit with status 2.

        Args:
            message: the error.
        """
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` explains each option.\n")

    def check_command(self, name: str) -> None:
        """Exit with an error that names the nearest commands if there is no such command.

        Args:
            name: the command, as the user wrote it.
        """
        if name.startswith("-") or name in self.commands():
            return
        suggestions = nearest(name, self.commands())
        message = f"there is no command {name!r}. Nearest: {', '.join(suggestions)}."
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists all commands.\n")

    def refuse(self, unparsed: Sequence[str]) -> NoReturn:
        """Exit with an error for arguments that no option takes.

        Args:
            unparsed: the arguments, at least one.
        """
        for argument in unparsed:
            if not argument.startswith("--"):
                continue
            name = argument.partition("=")[0]
            suggestions = nearest(name[2:], self.names())
            self.error(f"there is no option {name}. Nearest: --{', --'.join(suggestions)}.")
        self.error(f"unexpected argument {unparsed[0]!r}.")

    def names(self) -> list[str]:
        """Return the names of the options, without their dashes."""
        names = {name.lstrip("-") for name in self._option_string_actions}
        return sorted(names - {"help", "h"})

    def destinations(self, required: bool = False) -> list[str]:
        """Return the names of the positional arguments.

        Args:
            required: leave out those that may be missing.
        """
        positional = [action for action in self._actions if not action.option_strings]
        if required:
            positional = [action for action in positional if action.nargs not in ("?", "*")]
        return [action.dest for action in positional]

    def option(self, name: str) -> argparse.Action | None:
        """Return the option of a name without dashes, or None.

        Args:
            name: the name.
        """
        return self._option_string_actions.get(f"--{name}")

    def parse_given(self, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Parse the arguments without defaults and without required arguments.

        Args:
            args: the arguments.

        Returns:
            The values that were given, by destination, and the arguments that no option takes.
        """
        lenient = copy.deepcopy(self)
        for action in lenient._actions:
            action.default = argparse.SUPPRESS
            action.required = False
        namespace, unparsed = lenient.parse_known_args(list(args))
        return vars(namespace), unparsed

    def with_equals(self, args: Sequence[str]) -> list[str]:
        """Return arguments with `--name value` of this parser's options as `--name=value`.

        Args:
            args: the arguments.
        """
        joined: list[str] = []
        takes_value = False
        for argument in args:
            if takes_value:
                joined[-1] += f"={argument}"
                takes_value = False
                continue
            joined.append(argument)
            action = self._option_string_actions.get(self._with_underscores(argument))
            takes_value = action is not None and action.nargs is None
        return joined

    def require_not(self, destinations: Iterable[str]) -> None:
        """Let some options be left out, because their values come from somewhere else.

        Args:
            destinations: where the options store their values.
        """
        destinations = set(destinations)
        for action in self._actions:
            if action.option_strings and action.dest in destinations:
                action.required = False

    def commands(self) -> dict[str, "CommandParser"]:
        """Return the parser of each command, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices  # pyright: ignore[reportReturnType] typeshed's base class
        return {}

    def command(self, name: str) -> "CommandParser":
        """Return the parser of a command.

        Args:
            name: the command.

        Raises:
            KeyError: there is no such command.
        """
        return self.commands()[name]
