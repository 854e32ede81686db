"""Messages and tools in any known form → OpenAI's form, which chat templates read.

    {"role": "user", "content": "Hi"}                     OpenAI
    {"from": "human", "value": "Hi"}                      ShareGPT
    {"content": [{"type": "text", "text": "Hi"}]}         parts of text: joined
    {"from": "function_call", "value": '{"name": …}'}     becomes `tool_calls`
    {"function_call": {"name": …, "arguments": "{…}"}}    OpenAI's older form: becomes `tool_calls`

Message lists, tools, tool calls and their arguments may be JSON text. Arguments become an object,
because templates encode them: a text would be encoded twice. Rows of training and prompts of
generation pass through these functions, so both accept and refuse the same.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minilora.data.chat.values import from_json, kind_of, parse, plain, present

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
SHAREGPT_CALLS = ("function_call", "tool_call")  # the text of such a message is a call
MESSAGE_KEYS = {
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "weight",
}


def read_messages(value: Any, where: str, key: str = "messages") -> list[Message]:
    """Return a list of messages in OpenAI's form.

    Args:
        value: the messages, or their JSON text.
        where: the row or prompt, for errors.
        key: the name of the list, for errors.

    Returns:
        New messages without absent values.

    Raises:
        ValueError: there are no messages, or a role, a content, a weight or a tool call is wrong.
    """
    messages = value
    if isinstance(value, str):
        try:
            messages = parse(value, key)
        except ValueError as error:
            raise ValueError(
                f"{where}: {key!r} must be a list of messages, got str: {error}"
            ) from error
    if isinstance(messages, np.ndarray):
        messages = messages.tolist()
    if not isinstance(messages, list | tuple) or not messages:
        got = "an empty one" if messages == [] else type(messages).__name__
        raise ValueError(f"{where}: {key!r} must be a list of messages, got {got}.")
    return [_message(message, f"{where}, {key}[{turn}]") for turn, message in enumerate(messages)]


def is_message_list(value: Any) -> bool:
    """Return True for a JSON text that holds messages.

    Args:
        value: any value.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        entries = parse(value, "")
    except ValueError:
        return False
    for entry in entries:
        if not isinstance(entry, dict) or not {"role", "from"} & entry.keys():
            return False
    return bool(entries)


def _message(message: Any, where: str) -> Message:
    """Return a message with OpenAI's keys; raise ValueError for a wrong role, content or weight."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{where}: expected a dict with role and content, got {type(message).__name__}."
        )
    message = plain(present(message))
    sharegpt = "from" in message and "role" not in message
    if sharegpt:
        message = _from_sharegpt(message, where)
    role = message.get("role")
    if role not in ROLES:
        known = (*SHAREGPT_ROLES, *ROLES) if sharegpt else ROLES
        raise ValueError(f"{where}: unknown role {role!r}. Expected one of {', '.join(known)}.")
    if "function_call" in message:
        if message.get("tool_calls"):
            raise ValueError(f"{where}: tool_calls and function_call: leave one of them out.")
        call = from_json(message.pop("function_call"), f"{where}: function_call")
        message["tool_calls"] = [{"type": "function", "function": call}]
    calls = _tool_calls(message.pop("tool_calls", None), where)
    if calls:
        message["tool_calls"] = calls
    if "content" in message:
        message["content"] = _joined(message["content"], where)
    content = message.get("content")
    only_calls = content is None and calls
    if not isinstance(content, str) and not only_calls:
        raise ValueError(f"{where}: content must be a text, got {type(content).__name__}.")
    reasoning = message.get("reasoning_content", "")
    if not isinstance(reasoning, str):
        raise ValueError(
            f"{where}: reasoning_content must be a text, got {type(reasoning).__name__}."
        )
    check_characters(reasoning + (content or "") + _as_text(calls), where)
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"{where}: weight must be 0 (not trained) or 1, got {message['weight']!r}."
        )
    return message


def _as_text(value: Any) -> str:
    """Return a nested value as text, with its characters as they are."""
    return json.dumps(value, ensure_ascii=False, default=str)


def check_characters(text: str, where: str) -> None:
    """Raise ValueError for half a surrogate pair: JSON can hold it, and tokenizers cannot.

    Args:
        text: the text.
        where: its name, for errors.

    Raises:
        ValueError: the text holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: half a surrogate pair at character {error.start}: its text was cut there."
        ) from error


def _from_sharegpt(message: Message, where: str) -> Message:
    """Return a ShareGPT message with the keys `role` and `content` first."""
    rest = dict(message)
    name = str(rest.pop("from"))
    value = rest.pop("value", None)
    role = SHAREGPT_ROLES.get(name, name)
    if name not in SHAREGPT_CALLS:
        return {"role": role, "content": value, **rest}
    calls = from_json(value, f"{where}: the value of a {name}")
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        raise ValueError(
            f'{where}: the value of a {name} must be JSON: {{"name": …, "arguments": {{…}}}} or a '
            f"list of these, got {value!r:.60}."
        )
    wrapped = []
    for call in calls:
        is_bare = isinstance(call, dict) and "function" not in call
        wrapped.append({"type": "function", "function": call} if is_bare else call)
    return {"role": role, "tool_calls": wrapped, **rest}


def _joined(content: Any, where: str) -> Any:
    """Return the joined parts of a content; any other content unchanged."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"{where}: content must be a text, got list. Join its text parts into one text, "
                f"and leave out others, such as images: part {number} has the type {kind!r}, "
                'expected {"type": "text", "text": …}.'
            )
        texts.append(text)
    if not texts:
        raise ValueError(f"{where}: content must be a text, got an empty list of parts.")
    return "".join(texts)


def _tool_calls(value: Any, where: str) -> list[Any]:
    """Return tool calls whose arguments are objects."""
    calls = from_json(value, f"{where}: tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise ValueError(
            f"{where}: tool_calls must be a list of calls, got {kind_of(calls)}. "
            "Put a single call into a list."
        )
    return [_tool_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return {"function": {"name", "arguments"}} or {"name", "arguments"}, as it was given."""
    entry = _named_function(call, where)
    function = entry.get("function", entry)
    arguments = from_json(function.get("arguments"), f"{where}: arguments of {function['name']}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(
            f"{where}: arguments of {function['name']} must be an object, got "
            f"{type(arguments).__name__}: {arguments!r:.60}."
        )
    function = {**function, "arguments": arguments}
    return {**entry, "function": function} if "function" in entry else function


def _named_function(value: Any, where: str) -> dict[str, Any]:
    """Return a call or schema as a dict, decoded, that has a name or a function with a name."""
    entry = from_json(value, where)
    function = entry
    if isinstance(entry, dict) and "function" in entry:
        function = from_json(entry["function"], f"{where}: function")
        entry = {**entry, "function": function}
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f'{where} has no name: expected {{"name": …}} or {{"type": "function", "function": '
            f'{{"name": …}}}}, got {value!r:.60}.'
        )
    return entry


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of tools.

    Args:
        value: a list of schemas, each a dict or JSON text, or JSON text of the list.
        where: the row, for errors.

    Returns:
        New schemas without absent values, or None without a tool.

    Raises:
        ValueError: the value is not a list of schemas with names.
    """
    tools = plain(from_json(value, f"{where}: tools"))
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError(
            f"{where}: tools must be a list of JSON schemas, got {kind_of(tools)}. "
            "Put a single schema into a list."
        )
    schemas = [_tool(tool, f"{where}: tools[{number}]") for number, tool in enumerate(tools)]
    check_characters(_as_text(schemas), f"{where}: tools")
    return schemas


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """Return a schema whose parameters are decoded."""
    entry = _named_function(tool, where)
    function = entry.get("function", entry)
    if not isinstance(function.get("parameters"), str):
        return entry
    parameters = from_json(function["parameters"], f"{where}: parameters")
    function = {**function, "parameters": parameters}
    if parameters is None:
        del function["parameters"]
    return {**entry, "function": function} if "function" in entry else function


def unread_keys(messages: Any, key: str) -> Iterator[str]:
    """Yield the keys of messages, and of their parts, that only a template can read.

    Args:
        messages: a list of messages, or its JSON text.
        key: the name of the list.

    Yields:
        Names such as "messages[].mood".
    """
    if isinstance(messages, str):
        messages = parse(messages, key) if is_message_list(messages) else ()
    for message in messages:
        known = MESSAGE_KEYS
        if "role" not in present(message):
            known = MESSAGE_KEYS | {"from", "value"}
        for name, value in present(message).items():
            if name not in known:
                yield f"{key}[].{name}"
            if name in ("content", "value") and not isinstance(value, str):
                for part in value:
                    for part_name in present(part).keys() - {"type", "text"}:
                        yield f"{key}[].{name}[].{part_name}"
