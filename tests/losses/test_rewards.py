"""Proves that a mistake in a reward function is found, with the file, the function or the row."""

import re

import pytest

import minilora as ml
from minilora.losses.on_policy import PromptRow, with_answer
from minilora.losses.rewards import load_reward, rewards_of

FILE = '''
import math
LIMIT = 3

def length(prompt, answer, row):
    """Reward short answers."""
    return float(len(answer) <= row.get("limit", LIMIT))

def two(prompt, answer):
    return 1.0

broken = lambda prompt, answer, row: 1 / 0
'''


def answers(count: int = 2):
    prompts = [
        PromptRow([1], [-100], row=7 + i, prompt="p", source={"limit": 5 * i}) for i in range(count)
    ]
    return [with_answer(prompt, [2], text="four") for prompt in prompts]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return path


def test_a_reward_of_a_file_reads_prompt_answer_and_row(file):
    reward = load_reward(f"{file}:length")
    assert rewards_of(reward, answers()) == [0.0, 1.0]
    goal = ml.GRPO(reward=f"{file}:length")
    assert goal.rewards(answers()) == [0.0, 1.0] and "length" in vars(goal)["reward_name"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rewards.py", "expected FILE.py:FUNCTION, got 'rewards.py'"),
        ("nowhere/rewards.py:length", "there is no file nowhere/rewards.py"),
        ("{file}:lenght", "lenght.*length"),
        (
            "{file}:two",
            re.escape("two(prompt, answer) cannot be called as reward(prompt, answer, row)"),
        ),
        ("{file}:LIMIT", "expected a function"),
        (3, "expected a function"),
    ],
)
def test_a_wrong_source_is_refused_before_anything_is_loaded(source, message, file):
    if isinstance(source, str):
        source = source.replace("{file}", str(file))
    with pytest.raises(ValueError, match=message):
        ml.GRPO(reward=source)


def test_a_file_that_is_not_python_is_named(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def reward(:\n")
    with pytest.raises(ValueError, match="bad.py is not Python"):
        load_reward(f"{path}:reward")


def test_an_error_in_a_reward_names_the_row(file):
    with pytest.raises(ZeroDivisionError) as caught:
        rewards_of(load_reward(f"{file}:broken"), answers())
    assert "row 7, answer 'four'" in caught.value.__notes__[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "good", [1.0, 2.0]])
def test_a_reward_that_is_no_number_names_the_row(value):
    def reward(prompt, answer, row):
        return value if row["limit"] else 1

    with pytest.raises(ValueError, match="reward returned .* for row 8, answer 'four'"):
        rewards_of(reward, answers())


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="num_generations: a group of one"):
        ml.GRPO(reward=lambda prompt, answer, row: 0.0, num_generations=1)
