"""A conversation as the text of the chat template, in the form that the template can read.

Templates expect different forms of a tool call:

    an object           Qwen, Llama, Gemma, gpt-oss: the template encodes the arguments
    OpenAI's own form   DeepSeek: the arguments are JSON text, and an absent content is None or ""

The first form that the template renders is taken: objects, unless it raises an error or writes
Python's `{'a': 1}` for them.
"""

import json
import os
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from minilora.data.chat.marks import Marker, Part
from minilora.data.chat.messages import Message
from minilora.data.chat_template import template_errors


class Rendering:
    """The text of a conversation, and of its beginnings.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation, of `read_messages`.
        tools: the schemas of `read_tools`, or None.
        place: the row or prompt, for errors.
        options: further variables of the template.

    Attributes:
        text: the text of all messages.

    Raises:
        ValueError: the template refuses the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        *,
        place: str,
        **options: Any,
    ) -> None:
        self.tokenizer = tokenizer
        self.messages = list(messages)
        self.tools = tools
        self.place = place
        self.options = options
        self.form = FORMS[0]
        self.text = self._text_in_its_form()

    def _text_in_its_form(self) -> str:
        """Set the form of tool calls; return the text of the whole conversation."""
        has_calls = any(message.get("tool_calls") for message in self.messages)
        refusals = []
        for self.form in FORMS if has_calls else FORMS[:1]:
            try:
                text = self._render(self.messages)
            except ValueError as error:
                refusals.append(error)
                continue
            if not _writes_python(text, self.messages):
                return text
        self.form = FORMS[0]
        if refusals:
            raise refusals[0]
        return self._render(self.messages)

    def _render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, **options: Any
    ) -> str:
        options = self.options | options
        tools = self.tools if tools is None else tools
        if tools is not None:
            options["tools"] = tools
        try:
            return self.tokenizer.apply_chat_template(
                self.form(messages), tokenize=False, **options
            )
        except template_errors() as error:
            place = f"{self.place}, first {len(messages)} messages"
            raise ValueError(f"{place}: {error}") from error

    def up_to(self, count: int) -> str:
        """Return the text of the first messages.

        Args:
            count: how many.

        Raises:
            ValueError: the template refuses them.
        """
        return self._render(self.messages[:count])

    def before(self, turn: int) -> str:
        """Return the text before an answer, with its header.

        Args:
            turn: number of the answer among the messages.

        Raises:
            ValueError: the template refuses the messages before it.
        """
        if turn == 0:
            return self._before_all()
        return self._render(self.messages[:turn], add_generation_prompt=True)

    def _before_all(self) -> str:
        """Return the text before an answer that is the first message.

        Templates that read the first message cannot render an empty conversation. So the header of
        an answer is taken from another conversation, and found in this one.
        """
        question: list[Message] = [{"role": "user", "content": "a"}]
        prompted = self._render(question, add_generation_prompt=True)
        shared = os.path.commonprefix([prompted, self._render(question)])
        header = prompted[len(shared) :]
        start = self.text.find(header)
        if not header or start < 0:
            raise ValueError(
                f"{self.place}, turn 0: the conversation begins with an answer, and the chat "
                "template writes no header from which its beginning is known. Put a user message "
                "before it, or leave it out."
            )
        return self.text[: start + len(header)]

    def left_out(self, trained: Collection[int] = ()) -> list[Part]:
        """Return the parts of the conversation that the template leaves out.

        Args:
            trained: numbers of the supervised messages, whose reasoning counts too.
        """
        marker = Marker(self.place, self.text)
        messages = marker.messages(self.messages, trained)
        tools = marker.tools(self.tools)
        try:
            rendering = self._render(messages, tools)
        except ValueError:
            # The template compares a text with others, so it refuses the marked one.
            return [part for part in marker.parts if part.text not in self.text]
        return [part for part in marker.parts if not part.is_shown(rendering)]


def check_shown(left_out: Sequence[Part]) -> None:
    """Raise ValueError for the first part that a template leaves out.

    Args:
        left_out: the parts of `Rendering.left_out`.

    Raises:
        ValueError: there is such a part.
    """
    for part in left_out:
        remedy = "write it into the messages, or take it out of the rows"
        if part.kind == "content":
            remedy = "give the message a role that the template writes, or take it out"
        raise ValueError(
            f"{part.place}: the chat template leaves out {part.text[:40]!r}, of its {part.kind}. "
            f"Set a tokenizer.chat_template that writes it, {remedy}."
        )


def _as_objects(messages: Sequence[Message]) -> list[Message]:
    return list(messages)


def as_openai(messages: Sequence[Message], content: str | None = None) -> list[Message]:
    """Return messages in the form of OpenAI's API: arguments are JSON text.

    Args:
        messages: messages of `read_messages`.
        content: the content of a message that has only calls.
    """
    converted = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [_openai_call(call) for call in message["tool_calls"]]
            message = {"content": content, **message, "tool_calls": calls}
        converted.append(message)
    return converted


# transformers' tokenizers take a content of None away, so an empty one is the last form.
FORMS = (_as_objects, as_openai, partial(as_openai, content=""))


def _openai_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    function = {**function, "arguments": arguments}
    if "function" not in call:
        return function
    return {"type": "function", **call, "function": function}


def _writes_python(text: str, messages: Sequence[Message]) -> bool:
    """Return True if a template wrote the arguments of a call as Python writes a dict."""
    contents = "".join(str(message.get("content")) for message in messages)
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = dict(call.get("function", call)["arguments"])
            as_python = str(arguments)
            differs = as_python != json.dumps(arguments, ensure_ascii=False)
            if differs and as_python in text and as_python not in contents:
                return True
    return False
