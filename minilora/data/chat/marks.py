"""Marks in messages, by which the text that the template writes of each of them is found.

A template drops a message without an error: Qwen's drops the role developer, Llama-3.1's the
content next to a tool call. A search for the content cannot prove that it is shown, because the
same words may occur elsewhere. So a copy of the conversation gets marks: words that occur nowhere
else, two in each text, one in each key and name. The copy is rendered once. If a mark is missing
from that rendering, the template leaves its part out.

    content     "Paris"            "⟨1⟩Paris⟨2⟩"
                "<b>Paris</b>"     "<b>⟨3⟩Paris⟨4⟩</b>"    templates read a tag at either end
    arguments   {"city": "Rome"}   {"city⟨5⟩": "⟨6⟩Rome⟨7⟩"}

Simplified: numbers and truth values of arguments get no mark, their keys have one. Of a schema, the
name, the description and the names of its parameters must be shown.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.chat.messages import Message

LEADING_TAG = re.compile(r"<[^<>\s]+>")
TRAILING_TAG = re.compile(r"<[^<>\s]+>$")


@dataclass(frozen=True)
class Part:
    """A part of a conversation that the template must show.

    Attributes:
        place: the row and the turn, for errors.
        kind: content, reasoning, tool calls or tools.
        text: the part.
        marks: one mark, or the marks at its beginning and end.
        between: the text between two marks, if it must be unchanged, else None.
    """

    place: str
    kind: str
    text: str
    marks: tuple[str, ...]
    between: str | None = None

    def is_shown(self, rendering: str) -> bool:
        """Return True if a rendering of the marked conversation holds the part.

        Args:
            rendering: the text.
        """
        end = 0
        places = []
        for mark in self.marks:
            start = rendering.find(mark, end)
            if start < 0:
                return False
            end = start + len(mark)
            places += [start, end]
        if self.between is None:
            return True
        shown = rendering[places[1] : places[2]]
        return shown in (self.between, _escaped(self.between, True), _escaped(self.between, False))


def _escaped(text: str, ascii_only: bool) -> str:
    """Return a text as it stands in a JSON text."""
    return json.dumps(text, ensure_ascii=ascii_only)[1:-1]


class Marker:
    """Copies of messages and tools with marks, and the parts that the marks belong to.

    Args:
        place: the row or prompt, for errors.
        source: a text in which no mark may occur.

    Attributes:
        parts: the marked parts, in order.
    """

    def __init__(self, place: str, source: str) -> None:
        self.place = place
        self.parts: list[Part] = []
        self.count = 0
        self.stem = "Zq"
        while self.stem in source:
            self.stem += "q"

    def messages(self, messages: Sequence[Message], trained: Collection[int]) -> list[Message]:
        """Return marked messages.

        Args:
            messages: the messages.
            trained: numbers of the supervised messages. Their reasoning must be shown too, and
                their content unchanged; templates drop the reasoning of earlier answers on purpose.
        """
        marked = []
        for turn, message in enumerate(messages):
            marked.append(self._message(message, f"{self.place}, turn {turn}", turn in trained))
        return marked

    def _message(self, message: Message, place: str, trained: bool) -> Message:
        marked = dict(message)
        content = message.get("content") or ""
        if message["role"] == "assistant":
            marked_content = self._answer(content, place, trained)
        else:
            marked_content = self._text(content, place, "content")
        if content:
            marked["content"] = marked_content
        if trained and message.get("reasoning_content"):
            reasoning = message["reasoning_content"]
            marked["reasoning_content"] = self._text(reasoning, place, "reasoning", True)
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, place) for call in message["tool_calls"]]
        return marked

    def _answer(self, content: str, place: str, trained: bool) -> str:
        """Return an answer whose thought, if it has one, is marked separately."""
        thought, end, answer = content.rpartition("</think>")
        marked_answer = self._text(answer, place, "content", trained)
        if not trained:
            return thought + end + marked_answer
        before, start, inner = thought.rpartition("<think>")
        marked_before = self._text(before, place, "reasoning", True)
        marked_inner = self._text(inner, place, "reasoning", True)
        return marked_before + start + marked_inner + end + marked_answer

    def _call(self, call: dict[str, Any], place: str) -> dict[str, Any]:
        function = dict(call.get("function", call))
        function["name"] = self._word(function["name"], place, "tool calls")
        function["arguments"] = self._nested(function["arguments"], place)
        return {**call, "function": function} if "function" in call else function

    def _nested(self, value: Any, place: str) -> Any:
        """Return arguments with marks in their keys and texts."""
        if isinstance(value, dict):
            return {
                self._word(str(key), place, "tool calls"): self._nested(entry, place)
                for key, entry in value.items()
            }
        if isinstance(value, list):
            return [self._nested(entry, place) for entry in value]
        if isinstance(value, str):
            return self._text(value, place, "tool calls")
        return value

    def tools(self, tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return marked schemas.

        Args:
            tools: the schemas, or None.
        """
        return None if tools is None else [self._tool(tool) for tool in tools]

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = dict(tool.get("function", tool))
        function["name"] = self._word(function["name"], self.place, "tools")
        if isinstance(function.get("description"), str):
            function["description"] = self._text(function["description"], self.place, "tools")
        parameters = function.get("parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
            function["parameters"] = self._parameters(parameters)
        return {**tool, "function": function} if "function" in tool else function

    def _parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return parameters with other names, the same in `properties` and in `required`."""
        names = {}
        for name in parameters["properties"]:
            names[name] = self._word(str(name), self.place, "tools")
        properties = {names[name]: value for name, value in parameters["properties"].items()}
        marked = {**parameters, "properties": properties}
        if isinstance(parameters.get("required"), list):
            marked["required"] = [names.get(name, name) for name in parameters["required"]]
        return marked

    def _mark(self) -> str:
        self.count += 1
        return f"{self.stem}{self.count}Z"

    def _word(self, word: str, place: str, kind: str) -> str:
        """Return a name or key with a mark at its end."""
        mark = self._mark()
        self.parts.append(Part(place, kind, word, (mark,)))
        return word + mark

    def _text(self, text: str, place: str, kind: str, unchanged: bool = False) -> str:
        """Return a text with marks at both ends; a tag at an end stays outside."""
        core = text.strip()
        if not core:
            return text
        leading = LEADING_TAG.match(core)
        first = leading.end() if leading else 0
        trailing = TRAILING_TAG.search(core, first)
        last = trailing.start() if trailing else len(core)
        marks = (self._mark(), self._mark())
        between = core[first:last]
        self.parts.append(Part(place, kind, core, marks, between if unchanged else None))
        marked = core[:first] + marks[0] + between + marks[1] + core[last:]
        return text.replace(core, marked, 1)
