"""JSON answers and tools of a request: `response_format`, `tools` and `tool_choice`.

    response_format          a grammar for the answer (generation/structured.py)
    tools                    rendered by the chat template; calls are read from the answer
    tool_choice "none"       tools are not rendered
    tool_choice "required"   the answer is one call: the prompt ends with the opening mark of a call,
    or a named tool          and a grammar forces the JSON of a call

A stream sends the content as it comes and each call as one event.
"""

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from minilora.data.chat.tool_calls import ToolForm, parse_tool_calls, tool_form
from minilora.generation.engine import Engine
from minilora.generation.sequence import Ask
from minilora.generation.structured import Grammar, compile_schema
from minilora.serving.middleware import Refused
from minilora.serving.schema import AnswerFormat, Chat


async def grammar_of(
    answer_format: AnswerFormat | None, tools: "ToolUse | None", engine: Engine
) -> Grammar | None:
    """Return the grammar that the answer to a request follows, or None.

    Args:
        answer_format: the client's `response_format`.
        tools: the client's tools.
        engine: the engine, with the tokenizer.

    Raises:
        Refused: the schema cannot be enforced, or the package for it is missing (status 400).
    """
    schema: Any = None
    field = "response_format"
    if answer_format is not None and answer_format.type == "json_object":
        schema = "json"
    elif answer_format is not None and answer_format.type == "json_schema":
        field = "response_format.json_schema.schema"
        if answer_format.json_schema is None:
            message = "response_format.json_schema: this field is required."
            raise Refused(400, message, "invalid_request", "response_format.json_schema")
        schema = answer_format.json_schema.schema_
    if tools is not None and tools.forced:
        field = "tools"
        schema = tools.call_schema()
    if schema is None:
        return None
    try:
        return await asyncio.to_thread(compile_schema, schema, engine.tokenizer, engine.ends)
    except (ValueError, ImportError) as error:
        reason = str(error).removeprefix("schema: ")
        raise Refused(400, f"{field}: {reason}", "invalid_request", field) from error


class ToolUse:
    """The tools of a request, and the calls in its answers.

    Args:
        tools: the schemas that the chat template renders; none without tools.
        tokenizer: the model's tokenizer.
        forced: names of the tools of which the answer must call one; empty if it need not.
        parallel: False keeps only the first call of an answer.

    Attributes:
        active: True if answers are read for calls.
        shown: special tokens of the calls, which the text of the answer must have.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        forced: Sequence[str] = (),
        parallel: bool = True,
    ) -> None:
        self.tools = list(tools)
        self.tokenizer = tokenizer
        self.forced = list(forced)
        self.parallel = parallel
        self.active = bool(tools)
        self.form: ToolForm | None = tool_form(tokenizer) if tools else None
        self.shown: frozenset[int] = frozenset()
        if self.form is not None:
            ids = [tokenizer.convert_tokens_to_ids(mark) for mark in self.form.markers]
            self.shown = frozenset(token for token in ids if token is not None)
        self._texts: dict[int, str] = {}  # answer -> its text so far
        self._sent: dict[int, int] = {}  # answer -> number of characters that are sent

    @classmethod
    def of(cls, body: Chat, tokenizer: Any) -> "ToolUse":
        """Return the tools of a chat.

        Args:
            body: the request.
            tokenizer: the model's tokenizer.

        Raises:
            Refused: the chosen tool is unknown, or the template writes tool calls in a form that
                this server cannot read (status 400).
        """
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        names = [tool["function"]["name"] for tool in tools]
        choice = body.tool_choice or "auto"
        forced: list[str] = []
        if choice == "none":
            tools = []
        elif choice == "required":
            forced = names
        elif choice != "auto":
            forced = [choice.function.name]
        unknown = [name for name in forced if name not in names]
        if unknown or (choice == "required" and not names):
            message = f"tool_choice: expected one of the tools {names}, got {unknown or choice}."
            raise Refused(400, message, "invalid_request", "tool_choice")
        made = cls(tools, tokenizer, forced, body.parallel_tool_calls is not False)
        if made.active and made.form is None:
            message = (
                "tools: the chat template of this model has no form of tool calls that this server "
                "can read. Use a model whose template supports tools, or response_format."
            )
            raise Refused(400, message, "invalid_request", "tools")
        return made

    def prompt(self, messages: list[dict[str, Any]]) -> Any:
        """Return the prompt of `encode_prompt`: the messages, with the tools.

        Args:
            messages: the conversation.
        """
        return {"messages": messages, "tools": self.tools} if self.tools else messages

    def opened(self, ask: Ask, longest: int) -> Ask:
        """Return a request whose prompt ends with the opening mark, if a call is forced.

        Args:
            ask: the request.
            longest: largest length of prompt and answer together, in tokens.
        """
        if not self.forced or self.form is None or not self.form.opening:
            return ask
        ids = self.tokenizer.encode(self.form.opening, add_special_tokens=False)
        prompt = ask.prompt + ids
        limit = max(1, min(ask.max_tokens, longest - len(prompt)))
        return replace(ask, prompt=prompt, max_tokens=limit)

    def call_schema(self) -> dict[str, Any]:
        """Return the JSON schema of one call of a forced tool."""
        key = "arguments" if self.form is None else self.form.key
        calls = []
        definitions: dict[str, Any] = {}
        for number, tool in enumerate(self.tools):
            function = tool["function"]
            if function["name"] not in self.forced:
                continue
            parameters = function.get("parameters") or {"type": "object", "properties": {}}
            parameters = _with_prefix(parameters, f"{number}_")
            for name in ("$defs", "definitions"):
                for entry, schema in parameters.pop(name, {}).items():
                    definitions[f"{number}_{entry}"] = schema
            properties = {"name": {"const": function["name"]}, key: parameters}
            calls.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": ["name", key],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": calls, "$defs": definitions}

    def message(self, text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
        """Return the fields of a complete answer, and the reason for its end.

        Args:
            text: the answer.
            finish: the engine's reason for the end.
        """
        content, calls = self._read(text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
            finish = "tool_calls"
        return {"message": message}, finish

    def delta(self, index: int, text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
        """Return the fields of a new part of a stream, and the reason for the end of the answer.

        Args:
            index: the number of the answer.
            text: the new text.
            finish: the engine's reason for the end; None if the answer goes on.
        """
        text = self._texts.get(index, "") + text
        sent = self._sent.get(index, 0)
        self._texts[index] = text
        calls: list[dict[str, Any]] = []
        visible = 0
        if finish is not None:
            _, calls = self._read(text)
        if finish is None or calls:
            if self.form is not None and not self.forced:
                visible = self.form.visible(text)
        else:
            visible = len(text)
        delta: dict[str, Any] = {}
        if visible > sent:
            delta["content"] = text[sent:visible]
            self._sent[index] = visible
        if calls:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
            finish = "tool_calls"
        return {"delta": delta}, finish

    def _read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the content and the calls of an answer, in OpenAI's form."""
        if self.forced:
            try:
                call = json.loads(text)
            except ValueError:
                return text, []  # the answer reached its largest length
            arguments = call.get("arguments", call.get("parameters"))
            return "", [_openai_call(call["name"], arguments)]
        message = parse_tool_calls(text, self.tokenizer, self.tools)
        calls = []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            calls.append(_openai_call(function["name"], function["arguments"]))
        return message["content"], calls if self.parallel else calls[:1]


def _openai_call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a call with a new id, which has nine letters and digits, as Mistral needs."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


def _with_prefix(schema: Any, prefix: str) -> Any:
    """Return a schema whose references name definitions at the root, with a prefix."""
    if isinstance(schema, list):
        return [_with_prefix(part, prefix) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            value = f"#/$defs/{prefix}{value.rpartition('/')[2]}"
        result[key] = _with_prefix(value, prefix)
    return result
