"""Tool calls in the text of an answer, in the form of the model's chat template.

    Hermes, Qwen2.5, Qwen3, SmolLM3   <tool_call>{"name": …, "arguments": {…}}</tool_call>
    Qwen3-Coder, Qwen3.5              <tool_call><function=NAME><parameter=KEY>VALUE</parameter>…
    GLM-4.5                           <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE…
    Llama 3                           {"name": …, "parameters": {…}}
    Mistral                           [TOOL_CALLS][{"name": …, "arguments": {…}}]
    newer Mistral                     [TOOL_CALLS]NAME[ARGS]{…}
    DeepSeek-V3                       <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME ```json {…} ```
    Granite, Phi-4-mini               <|tool_call|>[{"name": …, "arguments": {…}}]

The marker in the template decides the form. A text that does not have this form is not a call: it
stays in the content.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Calls = list[tuple[str, dict[str, Any]]]  # name and arguments of each call
Types = dict[tuple[str, str], Any]  # (function, parameter) -> type in its JSON schema


@dataclass(frozen=True)
class ToolForm:
    """The form in which a chat template writes tool calls.

    Attributes:
        begin: the text with which a call begins; "" if a call is the whole answer.
        end: the text after a call; "" if the answer ends there.
        read: a function of the text between both and the types of parameters.
        opening: the text before the JSON object of a call, for an answer that must be a call;
            "" if the form is not a JSON object.
        key: the name of the arguments in that object.
    """

    begin: str
    end: str
    read: Callable[[str, Types], Calls]
    opening: str = ""
    key: str = "arguments"

    @property
    def markers(self) -> list[str]:
        """Texts that may be special tokens, and must be in the text of an answer."""
        marks = [self.begin, self.end, "[ARGS]", "[CALL_ID]", PYTHON_TAG, "<｜tool▁sep｜>"]
        return [mark for mark in marks if mark]

    def visible(self, text: str) -> int:
        """Return the length of the beginning of a text that cannot belong to a call.

        Args:
            text: an answer so far.
        """
        if not self.begin:
            start = text.lstrip()
            is_call = start.startswith("{") or start.startswith(PYTHON_TAG[: len(start)])
            return 0 if is_call else len(text)
        place = text.find(self.begin)
        if place >= 0:
            return place
        for size in range(min(len(self.begin) - 1, len(text)), 0, -1):
            if text.endswith(self.begin[:size]):
                return len(text) - size
        return len(text)


PYTHON_TAG = "<|python_tag|>"


def tool_form(tokenizer: Any) -> ToolForm | None:
    """Return the form in which a tokenizer's chat template writes tool calls.

    Args:
        tokenizer: the model's tokenizer.

    Returns:
        The form, or None if the template has none of the known forms.
    """
    template = tokenizer.chat_template or ""
    if isinstance(template, Mapping):
        template = "\n".join(template.values())
    for marker, form in FORMS.items():
        if marker in template:
            return form
    return None


def parse_tool_calls(
    text: str, tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the message of an answer: its content and its tool calls.

    The message can be appended to the conversation, followed by a message of the role `tool` for
    each call.

    Args:
        text: the answer.
        tokenizer: the model's tokenizer, whose chat template decides the form of a call.
        tools: the JSON schemas of the tools; forms without JSON read the types of parameters from
            them.

    Returns:
        `{"role": "assistant", "content": …}`, with `tool_calls` if the text has calls. Their
        arguments are dicts.
    """
    form = tool_form(tokenizer)
    content = text
    calls: Calls = []
    if form is not None:
        try:
            content, calls = _split(text, form, _types(tools or []))
        except (ValueError, KeyError, TypeError, AttributeError):
            calls = []  # the text does not have the form
    if not calls:
        return {"role": "assistant", "content": text}
    entries = []
    for name, arguments in calls:
        function = {"name": name, "arguments": arguments}
        entries.append({"type": "function", "function": function})
    return {"role": "assistant", "content": content.strip(), "tool_calls": entries}


def _split(text: str, form: ToolForm, types: Types) -> tuple[str, Calls]:
    """Return the content and the calls of an answer."""
    if not form.begin:
        return "", form.read(text, types)
    end = re.escape(form.end) + "|$" if form.end else "$"
    pattern = re.compile(rf"{re.escape(form.begin)}(.*?)(?:{end})", re.S)
    calls: Calls = []
    for match in pattern.finditer(text):
        calls += form.read(match[1], types)
    content = pattern.sub("", text)
    for mark in SURROUNDINGS:
        content = content.replace(mark, "")
    return content, calls


def _types(tools: Sequence[Mapping[str, Any]]) -> Types:
    """Return the type of each parameter."""
    types: Types = {}
    for tool in tools:
        function = tool.get("function", tool)
        properties = (function.get("parameters") or {}).get("properties") or {}
        for name, schema in properties.items():
            types[function["name"], name] = schema.get("type")
    return types


# ---- one function a form


def _read_json(text: str, types: Types) -> Calls:
    """Read one JSON object, a list of objects, or objects separated by semicolons."""
    text = text.strip().removeprefix(PYTHON_TAG).strip()
    decoder = json.JSONDecoder()
    entries: list[Any] = []
    while text:
        value, end = decoder.raw_decode(text)
        entries += value if isinstance(value, list) else [value]
        text = text[end:].lstrip(" ;\n")
    return [_named(entry) for entry in entries]


def _named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of a call in JSON."""
    arguments = entry["parameters"] if "parameters" in entry else entry.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(entry["name"], str) or not isinstance(arguments, dict):
        raise ValueError("a call needs a name and an object of arguments")
    return entry["name"], arguments


def _read_functions(text: str, types: Types) -> Calls:
    """Read <function=NAME> with <parameter=KEY>."""
    calls: Calls = []
    for name, body in re.findall(r"<function=([^>\n]+)>(.*?)(?:</function>|$)", text, re.S):
        pairs = re.findall(
            r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", body, re.S
        )
        calls.append((name, _typed(name, pairs, types)))
    return calls


def _read_glm(text: str, types: Types) -> Calls:
    """Read NAME with pairs of <arg_key> and <arg_value>."""
    name = text.partition("<arg_key>")[0].strip()
    if not name:
        raise ValueError("a call needs a name")
    pattern = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    return [(name, _typed(name, re.findall(pattern, text, re.S), types))]


def _typed(name: str, pairs: Sequence[tuple[str, str]], types: Types) -> dict[str, Any]:
    """Return arguments whose values are JSON, except those of the type string."""
    arguments: dict[str, Any] = {}
    for key, value in pairs:
        key = key.strip()
        arguments[key] = value
        if types.get((name, key)) == "string":
            continue
        try:
            arguments[key] = json.loads(PYTHON_VALUES.get(value, value))
        except ValueError:
            pass  # a text
    return arguments


def _read_mistral(text: str, types: Types) -> Calls:
    """Read a JSON list, or one NAME[ARGS]{…}."""
    if not re.match(r"\s*[\w.-]+\s*(\[|\{)", text):
        return _read_json(text, types)
    name, _, rest = text.partition("{")
    name = re.split(r"\[CALL_ID\]|\[ARGS\]", name)[0].strip()
    return [(name, json.loads("{" + rest))]


def _read_deepseek(text: str, types: Types) -> Calls:
    """Read function<｜tool▁sep｜>NAME and a block of JSON, or NAME<｜tool▁sep｜>{…}."""
    before, _, after = text.partition("<｜tool▁sep｜>")
    if "```json" in after:
        name, _, block = after.partition("```json")
        return [(name.strip(), json.loads(block.strip().removesuffix("```")))]
    return [(before.strip(), json.loads(after))]


PYTHON_VALUES = {"True": "true", "False": "false", "None": "null"}  # as Qwen3.5's template writes
SURROUNDINGS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_TAGS = ("<tool_call>", "</tool_call>")
# Marker in a template -> form; the first marker that the template has decides.
FORMS = {
    "<function=": ToolForm(*_TAGS, _read_functions),
    "<arg_key>": ToolForm(*_TAGS, _read_glm),
    "<tool_call>": ToolForm(*_TAGS, _read_json, "<tool_call>\n"),
    "[TOOL_CALLS]": ToolForm("[TOOL_CALLS]", "", _read_mistral, "[TOOL_CALLS]["),
    "<｜tool▁call▁begin｜>": ToolForm(
        "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", _read_deepseek
    ),
    "<|tool_call|>": ToolForm("<|tool_call|>", "<|/tool_call|>", _read_json, "<|tool_call|>["),
    '"parameters": ': ToolForm("", "", _read_json, key="parameters"),
}
