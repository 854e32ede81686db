"""Rows of any known shape → conversations or plain text.

Each row is recognised by its keys, in this order; a row of no known shape is an error:

    messages                    OpenAI: [{"role", "content"}, …]; `tools` go to the template
    conversations               ShareGPT: [{"from", "value"}, …]; `system` becomes the first message
    prompt, chosen, rejected    preferences: recognised, but not for supervised training
    prompt, completion          two texts, joined without a separator, or two lists of messages (or
                                the JSON texts of two such lists); the completion is supervised
    instruction, output         Alpaca: `input` follows the instruction after a blank line; `system`
    text                        plain text, all of it supervised

A row of a chat may have `chat_template_kwargs`, as in TRL: variables that its template reads.
As in TRL, plain texts (prompt/completion, text) do not pass through the chat template. Values of
None and NaN count as absent: Arrow and pandas give every row the keys of all others. Message lists
and tools may be JSON text (chat/messages.py). Other keys are not used; the report lists them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora.data.chat.messages import (
    Message,
    check_characters,
    is_message_list,
    read_messages,
    read_tools,
    unread_keys,
)
from minilora.data.chat.values import present
from minilora.data.read_rows import Row
from minilora.data.sources.proposal import proposal_text

KWARGS = frozenset({"chat_template_kwargs"})  # variables of the chat template for this row
# shape: the keys that define it, and further keys that are used if present
SHAPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "messages": (frozenset({"messages"}), frozenset({"tools"}) | KWARGS),
    "conversations": (frozenset({"conversations"}), frozenset({"system", "tools"}) | KWARGS),
    "preference": (frozenset({"chosen", "rejected"}), frozenset({"prompt"}) | KWARGS),
    "prompt/completion": (frozenset({"prompt", "completion"}), frozenset({"tools"}) | KWARGS),
    "instruction/output": (
        frozenset({"instruction", "output"}),
        frozenset({"input", "system"}) | KWARGS,
    ),
    "text": (frozenset({"text"}), frozenset()),
}
MESSAGE_LISTS = {"messages", "conversations", "prompt", "completion"}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: the messages in order.
        first_trained: number of the first message that can be supervised.
        tools: JSON schemas of tools, for the template.
        chat_template_kwargs: further variables of the template.
    """

    messages: list[Message]
    first_trained: int = 0
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def trained_turns(self) -> list[int]:
        """Return the numbers of the supervised messages.

        These are the assistant messages from `first_trained` on, except those of weight 0.
        """
        turns = []
        for number in range(self.first_trained, len(self.messages)):
            message = self.messages[number]
            if message["role"] == "assistant" and message.get("weight", 1):
                turns.append(number)
        return turns


@dataclass(frozen=True)
class Text:
    """Plain text that passes through no template.

    Attributes:
        completion: the supervised text.
        prompt: the text before it.
    """

    completion: str
    prompt: str = field(default="", kw_only=True)


class RawText(str):
    """A prompt to encode without the chat template."""


def shape_of(row: Row, index: int = 0) -> str:
    """Return the shape of a row, a key of SHAPES.

    Args:
        row: the row.
        index: its number, for errors.

    Raises:
        ValueError: the row has no known shape.
    """
    keys = present(row).keys()
    for shape, (required, _) in SHAPES.items():
        if required <= keys:
            return shape
    raise unknown_shape([row], index)


def unknown_shape(rows: Sequence[Row], index: int = 0) -> ValueError:
    """Return a ValueError for a row of no known shape, with a proposal for its columns.

    Args:
        rows: the row, and further rows of its data set, which make the proposal better.
        index: number of the row.
    """
    keys = sorted(map(str, present(rows[0])))
    missing = _missing_keys(keys)
    if missing and index > 0:  # the rows before it have a known shape, so the columns have names
        return ValueError(
            f"row {index}: {' and '.join(missing)} missing or empty, next to the keys {keys}. "
            "Complete this row, or remove it."
        )
    return ValueError(
        f"row {index}: keys {keys} match no known shape. Expected one of: {known_shapes()}."
        f"{proposal_text(rows)}"
    )


def known_shapes() -> str:
    """Return the required keys of every shape, as text."""
    shapes = []
    for required, _ in SHAPES.values():
        shapes.append(", ".join(sorted(required)))
    return "; ".join(shapes)


def _missing_keys(keys: Sequence[str]) -> list[str]:
    """Return what completes some keys to the nearest shape; nothing if they have no part of one."""
    missing: list[str] = []
    most = 0
    for required, optional in SHAPES.values():
        present_keys = required & set(keys)
        matching = len((required | optional) & set(keys))
        if present_keys and matching > most:
            most = matching
            missing = sorted(required - present_keys)
    return missing


def extra_keys(row: Row, index: int = 0) -> set[str]:
    """Return the keys of a row that only a template can read.

    Args:
        row: the row.
        index: its number, for errors.

    Returns:
        Keys of the row, and keys of its messages as "messages[].key".
    """
    required, optional = SHAPES[shape_of(row, index)]
    known = required | optional
    extra = set()
    for key, value in present(row).items():
        if key not in known:
            extra.add(str(key))
        if key in required & MESSAGE_LISTS:
            extra |= set(unread_keys(value, key))
    return extra


def as_messages(row: Row, index: int = 0) -> Chat | Text:
    """Return a row of any shape as a conversation, or as plain text.

    Args:
        row: the row.
        index: its number, for errors.

    Raises:
        ValueError: the row has no known shape or is preference data, a role is unknown, or a
            content is not a text.
    """
    shape = shape_of(row, index)
    row = present(row)
    if shape == "preference":
        raise ValueError(
            f"row {index}: chosen/rejected is preference data, which supervised training cannot "
            "use. To train on the chosen answers, rename `chosen` to `completion` and drop "
            "`rejected`."
        )
    if shape in ("messages", "conversations", "prompt/completion"):
        _check_desirable(row, index)
    if shape == "text":
        return Text(_text(row, "text", index))
    if shape == "prompt/completion":
        return _prompt_completion(row, index)
    if shape == "instruction/output":
        messages = _alpaca(row, index)
        tools = None
    else:
        messages = read_messages(row[shape], f"row {index}", shape)
        tools = read_tools(row.get("tools"), f"row {index}")
    if row.get("system") and shape != "messages":
        messages.insert(0, {"role": "system", "content": _text(row, "system", index)})
    return Chat(messages, tools=tools, chat_template_kwargs=row.get("chat_template_kwargs"))


def _check_desirable(row: Row, index: int) -> None:
    """Raise ValueError for a KTO row whose answer is undesirable."""
    for key in ("label", "kto_tag"):
        if str(row.get(key)).lower() == "false":
            raise ValueError(
                f"row {index}: {key!r} is false, which marks an undesirable answer (KTO's rows), "
                f"and supervised training would train it. Keep the rows whose {key!r} is true, or "
                "make pairs of prompt, chosen and rejected for DPO. If the key means something "
                "else, rename it."
            )


def _alpaca(row: Row, index: int) -> list[Message]:
    """Return the messages of an instruction/output row."""
    question = _text(row, "instruction", index)
    if row.get("input"):
        question += "\n\n" + _text(row, "input", index)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, "output", index)},
    ]


def _prompt_completion(row: Row, index: int) -> Chat | Text:
    """Return two texts, or the messages of both; JSON texts count as messages only together."""
    place = f"row {index}"
    parts = (row["prompt"], row["completion"])
    tools = read_tools(row.get("tools"), place)
    texts = [isinstance(part, str) for part in parts]
    if all(texts) and not all(is_message_list(part) for part in parts):
        given = {"tools": tools} | {key: row.get(key) for key in KWARGS}
        for key, value in given.items():
            if value:
                raise ValueError(
                    f"{place}: {key} need a chat, but prompt and completion are plain texts."
                )
        return Text(_text(row, "completion", index), prompt=_text(row, "prompt", index))
    if any(texts) and not all(texts):
        kinds = " and ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"{place}: prompt and completion must both be texts or both be messages, got {kinds}."
        )
    messages = read_messages(row["prompt"], place, "prompt")
    first_trained = len(messages)
    messages += read_messages(row["completion"], place, "completion")
    return Chat(messages, first_trained, tools, row.get("chat_template_kwargs"))


def _text(row: Row, key: str, index: int) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"row {index}: {key!r} must be a text, got {type(row[key]).__name__}.")
    check_characters(row[key], f"row {index}, {key!r}")
    return row[key]
