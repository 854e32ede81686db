"""Preference rows of the known forms → a prompt and two answers.

    prompt, chosen, rejected                texts; or messages, with the prompt or without it
    prompt (text), chosen, rejected         conversations, as in UltraFeedback
    chosen, rejected                        conversations that share the prompt
    conversations or messages, chosen, rejected      LLaMA-Factory: one message each
    instruction, input, chosen, rejected             LLaMA-Factory's Alpaca form, texts

As in supervised rows, a list of messages may be JSON text, which is its only form in a .csv cell;
both answers must be such texts, or neither.

Published sets often repeat the prompt at the beginning of both answers. It would then be trained as
a part of the answer, so it is taken off, and the report before training counts such rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minilora.data.chat.messages import is_message_list, read_messages
from minilora.data.chat.values import parse
from minilora.data.formats import Chat, as_messages, shape_of

ANSWERS = ("chosen", "rejected")
OTHER_SHAPES = ("messages", "conversations", "completion", "instruction", "output", "text")


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and two answers: three texts, or three lists of messages.

    Attributes:
        prompt: The prompt.
        chosen: The preferred answer, without the prompt.
        rejected: The other answer, without the prompt.
        others: Further keys of the row, such as `tools`.
        repeated: True if both answers repeated the prompt, which was taken off.
        unused: Keys of the row that would have another meaning in a prompt/completion row.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    others: dict[str, Any]
    repeated: bool = False
    unused: tuple[str, ...] = ()

    def side(self, name: str) -> dict[str, Any]:
        """Return the prompt/completion row of one answer.

        Args:
            name: "chosen" or "rejected".
        """
        answer = self.chosen if name == "chosen" else self.rejected
        return self.others | {"prompt": self.prompt, "completion": answer}


def preference_row(row: Mapping[str, Any], index: int) -> PreferenceRow:
    """Return a row of a known form as a prompt and two answers.

    Args:
        row: The row.
        index: Its number, for errors.

    Raises:
        ValueError: If the row has no two answers of one kind, or no prompt.
    """
    present = {key: value for key, value in row.items() if value is not None}
    if not present.keys() >= set(ANSWERS):
        hint = ""
        if isinstance(present.get("label"), bool):
            hint = " KTO's rows, with one answer and a label, are no pairs: join two of a prompt."
        raise ValueError(
            f"row {index}: expected prompt, chosen and rejected, got a row of the shape "
            f"{shape_of(row, index)}.{hint}"
        )
    answers = [present.pop(name) for name in ANSWERS]
    if all(is_message_list(answer) for answer in answers):  # the JSON texts of two conversations
        answers = [parse(answer, f"row {index}") for answer in answers]
    chosen, rejected = [
        _answer(answer, index, name) for answer, name in zip(answers, ANSWERS, strict=True)
    ]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"row {index}: chosen and rejected must both be texts or both be messages, got "
            f"{type(chosen).__name__} and {type(rejected).__name__}."
        )
    prompt = _take_prompt(present, index)
    # UltraFeedback has `messages` too: the chosen conversation once more.
    unused = tuple(key for key in OTHER_SHAPES if present.pop(key, None) is not None)
    if isinstance(chosen, str):
        pair = _of_texts(prompt, chosen, rejected, present, index)
    else:
        pair = _of_messages(prompt, chosen, rejected, present, index)
    return replace(pair, unused=unused)


def _answer(value: Any, index: int, name: str) -> Any:
    """Return an answer as a text, or as a list of messages with OpenAI's keys."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):  # LLaMA-Factory: one message
        value = [value]
    if not isinstance(value, Sequence | np.ndarray) or not len(value):
        raise ValueError(
            f"row {index}: {name} must be a text or a list of messages, got {value!r:.60}."
        )
    return read_messages(value, f"row {index}", name)


def _messages(messages: Any, index: int, system: Any = None) -> list[dict[str, Any]]:
    """Return messages of OpenAI's or ShareGPT's form with OpenAI's keys."""
    chat = as_messages({"conversations": messages, "system": system}, index)
    assert isinstance(chat, Chat)
    return chat.messages


def _take_prompt(row: dict[str, Any], index: int) -> Any:
    """Remove the prompt from a row and return it: a text, messages, or None."""
    prompt = row.pop("prompt", None)
    if is_message_list(prompt):
        prompt = parse(prompt, f"row {index}")
    if isinstance(prompt, str):
        return prompt
    if prompt is not None:
        return _answer(prompt, index, "prompt")
    for key in ("messages", "conversations"):
        if key in row:
            return _messages(row.pop(key), index, row.pop("system", None))
    if "instruction" in row:
        names = ("instruction", "input", "system")
        question = {name: row.pop(name) for name in names if name in row}
        chat = as_messages(question | {"output": ""}, index)
        assert isinstance(chat, Chat)
        return chat.messages[:-1]
    return None


def _of_texts(
    prompt: Any, chosen: str, rejected: str, others: dict[str, Any], index: int
) -> PreferenceRow:
    """Return a row whose answers are texts."""
    if prompt is None:
        raise ValueError(
            f"row {index}: chosen and rejected are texts and need a prompt: put it under `prompt`."
        )
    if not isinstance(prompt, str):  # a conversation, and texts as its answers
        chosen_turn = [{"role": "assistant", "content": chosen}]
        rejected_turn = [{"role": "assistant", "content": rejected}]
        return PreferenceRow(prompt, chosen_turn, rejected_turn, others)
    repeated = bool(prompt.strip())
    repeated = repeated and chosen.startswith(prompt) and rejected.startswith(prompt)
    if repeated:
        chosen = chosen.removeprefix(prompt)
        rejected = rejected.removeprefix(prompt)
    return PreferenceRow(prompt, chosen, rejected, others, repeated)


def _of_messages(
    prompt: Any,
    chosen: list[dict[str, Any]],
    rejected: list[dict[str, Any]],
    others: dict[str, Any],
    index: int,
) -> PreferenceRow:
    """Return a row whose answers are messages."""
    if prompt is None or (isinstance(prompt, str) and chosen[0]["role"] != "assistant"):
        size = _shared_messages(chosen, rejected, index)
        shared = chosen[:size]
        if isinstance(prompt, str) and shared[-1].get("content", "").strip() != prompt.strip():
            raise ValueError(
                f"row {index}: the prompt {prompt[:40]!r} is not the last message that chosen and "
                f"rejected share, {shared[-1].get('content', '')[:40]!r}. Drop `prompt`, or correct "
                "it."
            )
        row = PreferenceRow(shared, chosen[size:], rejected[size:], others)
        _check_begins(row, index)
        return row
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    size = _repeated_messages(prompt, chosen)
    other_size = _repeated_messages(prompt, rejected)
    if size != other_size:
        raise ValueError(
            f"row {index}: one answer repeats the prompt and the other does not: chosen begins with "
            f"{size} of its messages, rejected with {other_size}. Take the prompt out of both."
        )
    row = PreferenceRow(prompt, chosen[size:], rejected[size:], others, repeated=size > 0)
    _check_begins(row, index)
    return row


def _check_begins(row: PreferenceRow, index: int) -> None:
    """Raise ValueError unless both answers begin with an assistant message."""
    for name, answer in zip(ANSWERS, (row.chosen, row.rejected), strict=True):
        role = answer[0]["role"] if answer else "nothing"
        if role != "assistant":
            raise ValueError(
                f"row {index}: after the prompt, {name} must begin with an assistant message, got "
                f"{role}. Let both answers follow the same prompt."
            )


def _repeated_messages(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> int:
    """Return the number of first messages of an answer that are the last ones of the prompt."""
    for size in range(min(len(prompt), len(answer)), 0, -1):
        if prompt[-size:] == answer[:size]:
            return size
    return 0


def _shared_messages(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], index: int
) -> int:
    """Return the number of first messages that two conversations share: the prompt."""
    size = 0
    for message, other in zip(chosen, rejected, strict=False):
        if message != other:
            break
        size += 1
    size = min(size, len(chosen) - 1, len(rejected) - 1)  # equal answers still leave a prompt
    if size <= 0:
        raise ValueError(
            f"row {index}: chosen and rejected do not begin with the same messages, the prompt."
        )
    return size
