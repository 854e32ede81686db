"""Prompt and completion as a conversation, and a system message for each row.

Two plain texts do not pass through the chat template. As messages they do, so a model is trained on
what `generate` gives it. Both functions change the rows only; formats.py reads and checks them.
"""

from typing import Any

from minilora.data.chat.messages import is_message_list, read_messages
from minilora.data.chat.values import present
from minilora.data.formats import shape_of
from minilora.data.read_rows import Row

ANSWERS = ("completion", "chosen", "rejected")
SYSTEM_ROLES = ("system", "developer")


def as_conversation(row: Row, index: int) -> Row:
    """Return a row of texts with messages in their place; a row of messages stays as it is.

    Args:
        row: the row.
        index: its number, for errors.

    Raises:
        ValueError: the row is plain text, which has no prompt.
    """
    shape = shape_of(row, index)
    if shape == "text":
        raise ValueError(
            f"row {index}: chat makes a conversation of a prompt and an answer, and this row is "
            "plain text. Leave chat out, or map two columns on prompt and completion."
        )
    if shape not in ("prompt/completion", "preference"):
        return row
    answers = [key for key in ANSWERS if key in present(row)]
    texts = [key for key in answers if isinstance(row[key], str)]
    are_messages = [is_message_list(row[key]) for key in answers]
    if not texts or all(are_messages):
        return row
    changed: dict[Any, Any] = dict(row)
    for key in texts:
        changed[key] = [{"role": "assistant", "content": row[key]}]
    if isinstance(row.get("prompt"), str):
        changed["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return changed


def with_system(row: Row, text: str, index: int) -> Row:
    """Return a conversation that begins with a system message; one that has its own keeps it.

    Args:
        row: the row.
        text: the content of the message.
        index: the number of the row, for errors.

    Raises:
        ValueError: the row is text, to which no system message can be added.
    """
    shape = shape_of(row, index)
    if row.get("system"):
        return row
    if shape == "messages":
        return _with_message(row, ["messages"], text, index)
    if shape == "conversations":
        messages = read_messages(row["conversations"], f"row {index}", "conversations")
        begins_with_one = messages[0]["role"] in SYSTEM_ROLES
        return row if begins_with_one else {**row, "system": text}
    if shape == "instruction/output" or "instruction" in present(row):
        return {**row, "system": text}
    if shape == "preference" and not _is_text(row.get("chosen")):
        return _preference_with_system(row, text, index)
    return _with_message(row, ["prompt"], text, index)


def _preference_with_system(row: Row, text: str, index: int) -> Row:
    """Return a row whose answers are messages, with a system message before the prompt."""
    prompt = row.get("prompt")
    chosen = row["chosen"]
    is_separate = prompt is not None and not _is_text(prompt)
    if isinstance(chosen, list | str) and not is_separate:
        first = read_messages(chosen, f"row {index}", "chosen")[0]
        if first["role"] != "assistant":  # both answers repeat the whole conversation
            return _with_message(row, ["chosen", "rejected"], text, index)
        row = {**row, "prompt": [{"role": "user", "content": prompt}]}
    return _with_message(row, ["prompt"], text, index)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not is_message_list(value)


def _with_message(row: Row, keys: list[str], text: str, index: int) -> Row:
    """Return a row whose lists of messages begin with a system message."""
    changed: dict[Any, Any] = dict(row)
    for key in keys:
        if row.get(key) is None or _is_text(row[key]):
            raise ValueError(
                f"row {index}: system adds a message to a conversation, and this row has plain "
                "text. Add --chat true (chat=True), which makes a conversation of prompt and "
                "completion."
            )
        messages = read_messages(row[key], f"row {index}", key)
        if messages[0]["role"] not in SYSTEM_ROLES:
            messages.insert(0, {"role": "system", "content": text})
        changed[key] = messages
    return changed
