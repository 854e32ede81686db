"""Rows of any known shape → conversations or plain text.

Each row is recognised by its keys, in this order; a row of no known shape is an error:

    messages                    OpenAI: [{"role", "content"}, …]; `tools` go to the template
    conversations               ShareGPT: [{"from", "value"}, …]; `system` becomes the first message
    prompt, chosen, rejected    preferences: recognised, but not for supervised training
    prompt, completion          two texts, joined without a separator, or two lists of messages;
                                the completion is supervised
    instruction, output         Alpaca: `input` follows the instruction after a blank line; `system`
    text                        plain text, all of it supervised

As in TRL, plain texts (prompt/completion, text) do not pass through the chat template. Values of
None count as absent: Arrow gives every row the keys of all others. Other keys are not used; the
report lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minilora.data.read_rows import Row

Message = dict[str, Any]

# shape: the keys that define it, and further keys that are used if present
SHAPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "messages": (frozenset({"messages"}), frozenset({"tools"})),
    "conversations": (frozenset({"conversations"}), frozenset({"system", "tools"})),
    "preference": (frozenset({"chosen", "rejected"}), frozenset({"prompt"})),
    "prompt/completion": (frozenset({"prompt", "completion"}), frozenset({"tools"})),
    "instruction/output": (frozenset({"instruction", "output"}), frozenset({"input", "system"})),
    "text": (frozenset({"text"}), frozenset()),
}
MESSAGE_LISTS = {"messages", "conversations", "prompt", "completion"}
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}
MESSAGE_KEYS = {
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "weight",
}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: the messages in order.
        first_trained: number of the first message that can be supervised.
        tools: JSON schemas of tools, for the template.
    """

    messages: list[Message]
    first_trained: int = 0
    tools: list[Any] | None = None

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
    keys = {key for key, value in row.items() if value is not None}
    for shape, (required, _) in SHAPES.items():
        if required <= keys:
            return shape
    known = "; ".join(", ".join(sorted(required)) for required, _ in SHAPES.values())
    raise ValueError(
        f"row {index}: keys {sorted(map(str, keys))} match no known shape. "
        f"Expected one of: {known}."
    )


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
    for key, value in row.items():
        if value is not None and key not in known:
            extra.add(str(key))
    for key in required & MESSAGE_LISTS:
        if isinstance(row[key], list):
            for message in row[key]:
                extra |= _extra_message_keys(message, key)
    return extra


def _extra_message_keys(message: Mapping[str, Any], key: str) -> set[str]:
    known = MESSAGE_KEYS
    if key == "conversations":
        known = MESSAGE_KEYS | {"from", "value"}
    names = {name for name, value in message.items() if value is not None}
    return {f"{key}[].{name}" for name in names - known}


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
    if shape == "preference":
        raise ValueError(
            f"row {index}: chosen/rejected is preference data, which supervised training cannot "
            "use. To train on the chosen answers, rename `chosen` to `completion` and drop "
            "`rejected`."
        )
    if shape == "text":
        return Text(_text(row, "text", index))
    if shape == "prompt/completion":
        return _prompt_completion(row, index)
    if shape == "instruction/output":
        messages = _alpaca(row, index)
        tools = None
    else:
        messages = _messages(row[shape], index, shape)
        tools = row.get("tools")
    if row.get("system") and shape != "messages":
        messages.insert(0, {"role": "system", "content": _text(row, "system", index)})
    return Chat(messages, tools=tools)


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
    prompt, completion = row["prompt"], row["completion"]
    texts = [isinstance(part, str) for part in (prompt, completion)]
    if all(texts):
        if row.get("tools") is not None:
            raise ValueError(
                f"row {index}: tools need a chat, but prompt and completion are plain texts."
            )
        return Text(_text(row, "completion", index), prompt=_text(row, "prompt", index))
    if any(texts):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise ValueError(
            f"row {index}: prompt and completion must both be texts or both be messages, "
            f"got {kinds}."
        )
    messages = _messages(prompt, index, "prompt")
    first_trained = len(messages)
    messages += _messages(completion, index, "completion")
    return Chat(messages, first_trained, row.get("tools"))


def _text(row: Row, key: str, index: int) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"row {index}: {key!r} must be a text, got {type(row[key]).__name__}.")
    _check_characters(row[key], f"row {index}, {key!r}")
    return row[key]


def _check_characters(text: str, where: str) -> None:
    """Raise ValueError for half a surrogate pair: JSON can hold it, and tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}: its text was cut there."
        ) from error


def _messages(messages: Any, index: int, key: str) -> list[Message]:
    is_list = isinstance(messages, list | tuple)
    if not is_list or not messages:
        got = "an empty one" if is_list else type(messages).__name__
        raise ValueError(f"row {index}: {key!r} must be a list of messages, got {got}.")
    return [
        _message(message, f"row {index}, {key}[{turn}]", key)
        for turn, message in enumerate(messages)
    ]


def _message(message: Any, where: str, key: str) -> Message:
    """Return a message with OpenAI's keys; raise ValueError for a wrong role, content or weight."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}: expected a dict with role and content, got {type(message).__name__}."
        )
    message = {name: value for name, value in message.items() if value is not None}
    if key == "conversations" and "from" in message:
        message = _from_sharegpt(message)
    role = message.get("role")
    content = message.get("content")
    if role not in ROLES:
        known = ROLES if key != "conversations" else (*SHAREGPT_ROLES, *ROLES)
        raise ValueError(f"{where}: unknown role {role!r}. Expected one of {', '.join(known)}.")
    only_calls = content is None and message.get("tool_calls")
    if not isinstance(content, str) and not only_calls:
        hint = " Join its text parts into one text." if isinstance(content, list) else ""
        raise ValueError(f"{where}: content must be a text, got {type(content).__name__}.{hint}")
    _check_characters(content or "", where)
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{where}: weight must be 0 (not trained) or 1, got {message['weight']!r}."
        )
    return message


def _from_sharegpt(message: Message) -> Message:
    """Return a ShareGPT message with the keys `role` and `content` first."""
    rest = dict(message)
    role = rest.pop("from")
    return {
        "role": SHAREGPT_ROLES.get(role, role),
        "content": rest.pop("value", None),
        **rest,
    }
