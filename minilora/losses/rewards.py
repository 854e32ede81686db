"""Reward functions: load one from a file, check it, call it, and name the row that fails.

    def reward(prompt, answer, row) -> float

    prompt    the prompt of the row: a text or a list of messages
    answer    the sampled answer as text, without the end token
    row       the whole row as a dict; it may hold the expected answer

On the command line a reward is named as FILE.py:FUNCTION. The file is run as a program of its own
would be, so it is code that you trust.
"""

import inspect
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from minilora.common import unknown_name
from minilora.losses.on_policy import Answer

Reward = Callable[[Any, str, Any], float]
FORM = "reward(prompt, answer, row)"


def load_reward(source: Reward | str) -> Reward:
    """Return a reward function, which takes three arguments.

    Args:
        source: The function, or "FILE.py:FUNCTION".

    Raises:
        ValueError: If the file or the function does not exist, or takes other arguments.
    """
    function: Any = source
    if isinstance(source, str):
        function = _from_file(source)
    if not callable(cast(Any, function)):
        raise ValueError(f"reward: expected a function {FORM}, got {function!r:.80}.")
    try:
        inspect.signature(function).bind("prompt", "answer", {})
    except TypeError as error:
        raise ValueError(
            f"reward: {reward_name(function)}{inspect.signature(function)} cannot be called as {FORM}: "
            f"{error}. Give it these three parameters."
        ) from error
    except ValueError:  # a function of C without a signature
        pass
    return function


def _from_file(source: str) -> Any:
    """Return the function that FILE.py:FUNCTION names."""
    path, colon, name = source.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"reward: expected FILE.py:FUNCTION, got {source!r}.")
    if not Path(path).is_file():
        raise ValueError(
            f"reward: there is no file {path}. Expected a Python file with a function {FORM}; "
            f"paths begin at {Path.cwd()}."
        )
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise ValueError(f"reward: {path} is not Python: {error}.") from error
    functions = [key for key, value in names.items() if inspect.isfunction(value)]
    if name not in names:
        raise unknown_name(f"reward: {path}", name, functions)
    return names[name]


def rewards_of(function: Reward, answers: Sequence[Answer]) -> list[float]:
    """Return the reward of each answer.

    Args:
        function: The reward function. Its exceptions are raised with a note that names the row.
        answers: The answers.

    Returns:
        One finite number for each answer.

    Raises:
        ValueError: If a reward is not a finite number; the message names the row.
    """
    rewards = []
    for answer in answers:
        assert answer.prompt is not None
        place = f"row {answer.row}, answer {answer.text!r:.200}"
        try:
            value = function(answer.prompt.prompt, answer.text, answer.prompt.source)
        except Exception as error:  # of any kind: it goes on, with the name of the row
            error.add_note(f"The reward {reward_name(function)} failed at {place}.")
            raise
        rewards.append(_number(value, function, place))
    return rewards


def _number(value: Any, function: Reward, place: str) -> float:
    """Return a reward as a finite float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward: {reward_name(function)} returned {value!r:.80} for {place}: expected a finite "
            "number. Return the lowest reward for an answer that cannot be judged."
        )
    return number


def reward_name(function: Any) -> str:
    """Return the name of a reward function, for messages and files.

    Args:
        function: The function, or a callable object.
    """
    return getattr(function, "__name__", type(function).__name__)
