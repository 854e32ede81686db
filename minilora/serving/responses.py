"""Answers in the form of each endpoint: complete JSON, or server-sent events.

data: {"choices": [{"index": 0, "delta": {"content": "He"}, …}], …}  a piece, once it is final
data: {"choices": [{…, "finish_reason": "stop"}]}                    the reason for the end
data: {"choices": [], "usage": {…}}                                  if the client wants it
data: [DONE]

Source: https://platform.openai.com/docs/api-reference/chat-streaming
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import StreamingResponse

from minilora.generation.scores import TokenScore, TokenTexts
from minilora.serving.engine_client import Echo, Pieces
from minilora.serving.logprobs import CompletionLogprobs, chat_logprobs
from minilora.serving.middleware import Refused
from minilora.serving.structured import ToolUse

DONE = "data: [DONE]\n\n"


@dataclass
class Answer:
    """The answer to one request, or a part of it.

    Attributes:
        text: the text so far.
        finish: the reason for the end; None while the answer grows.
        scores: the scores of its tokens.
        prompt_scores: the scores of the prompt's tokens, if they are a part of the answer.
    """

    text: str = ""
    finish: str | None = None
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)


class ResponseFormat:
    """The JSON form of an endpoint's answers.

    Args:
        kind: "chat" or "completion" (OpenAI's endpoints), or "generate" (minilora's).
        model: the model name of the request.
        include_usage: True adds a last event with the number of tokens to a stream.
        continuous_usage: True adds the number of tokens so far to every event.

    Attributes:
        head: the fields that all of an answer's events share.
        token_texts: the texts of single tokens, if the client wants log-probabilities, else None.
        echoes: the prompt of each answer, if it is a part of the answer.
        tools: the tools of a chat, whose calls are read from the answer.
        begun: indices of the answers of which an event has been sent.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        self.kind = kind
        self.include_usage = include_usage
        self.continuous_usage = continuous_usage
        self.token_texts: TokenTexts | None = None
        self.echoes: list[Echo] = []
        self.tools: ToolUse | None = None
        self.begun: set[int] = set()
        self.head: dict[str, Any] = {"created": int(time.time()), "model": model}
        if kind == "chat":
            self.head |= {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion"}
        elif kind == "completion":
            self.head |= {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion"}

    def complete(self, answers: list[Answer], usage: dict[str, int]) -> dict[str, Any]:
        """Return the body of a response without streaming.

        Args:
            answers: the answers, in the order of the requests.
            usage: the number of tokens, in OpenAI's fields.

        Returns:
            The body.
        """
        if self.kind == "generate":
            (answer,) = answers
            return {"text": answer.text, "finish_reason": answer.finish, "usage": usage}
        choices = []
        for index, answer in enumerate(answers):
            echo = self.echoes[index].text if self.echoes else ""
            message = self._message(echo + answer.text)
            finish = answer.finish
            if self.tools is not None and self.tools.active:
                message, finish = self.tools.message(answer.text, finish)
            logprobs = self._logprobs(index, answer)
            choices.append(self._choice(index, message, finish, logprobs))
        return self.head | {"choices": choices, "usage": usage}

    def opening(self, count: int) -> list[str]:
        """Return the events before the first token: a chat states the role of the speaker.

        Args:
            count: the number of answers.

        Returns:
            The events; empty for other endpoints.
        """
        if self.kind != "chat":
            return []
        choices = []
        for index in range(count):
            delta = {"role": "assistant", "content": "", "refusal": None}
            choices.append(self._choice(index, {"delta": delta}, None))
        return [self._event(choices)]

    def event(self, index: int, part: Answer, usage: dict[str, int]) -> str:
        """Return the event of a piece.

        Args:
            index: the index of the request.
            part: the new part of the answer; its `finish` is None if the answer goes on.
            usage: the number of tokens so far, in OpenAI's fields.

        Returns:
            The event.
        """
        if self.kind == "generate":
            return _data({"text": part.text, "finish_reason": part.finish})
        text = part.text
        if self.echoes and index not in self.begun:
            text = self.echoes[index].text + text
        self.begun.add(index)
        logprobs = None
        if part.scores or part.prompt_scores:
            logprobs = self._logprobs(index, part)
        delta = self._delta(text)
        finish = part.finish
        if self.tools is not None and self.tools.active:
            delta, finish = self.tools.delta(index, text, finish)
        choice = self._choice(index, delta, finish, logprobs)
        return self._event([choice], usage if self.continuous_usage else None)

    def closing(self, usage: dict[str, int]) -> list[str]:
        """Return the events after the last piece.

        Args:
            usage: the number of tokens, in OpenAI's fields.

        Returns:
            The events.
        """
        if self.kind == "generate":
            return [_data({"text": "", "finish_reason": None, "usage": usage}), DONE]
        if self.include_usage:
            return [self._event([], usage), DONE]
        return [DONE]

    def _message(self, text: str) -> dict[str, Any]:
        """Return the fields of a complete text."""
        if self.kind == "chat":
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        """Return the fields of a new text in a stream."""
        if self.kind == "chat":
            return {"delta": {"content": text} if text else {}}
        return {"text": text}

    def _logprobs(self, index: int, part: Answer) -> dict[str, Any] | None:
        """Return the log-probabilities of a part of an answer, if the client wants them."""
        if self.token_texts is None:
            return None
        if self.kind == "chat":
            scores = [score for score in part.scores if not score.is_end]
            return chat_logprobs(scores, self.token_texts)
        echo = self.echoes[index] if self.echoes else Echo("", 0)
        tokens = CompletionLogprobs(self.token_texts)
        tokens.add_prompt(part.prompt_scores, echo.hidden)
        tokens.add_answer(part.scores, len(echo.text))
        return tokens.fields

    def _choice(
        self,
        index: int,
        text: dict[str, Any],
        finish: str | None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return one element of `choices`."""
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        """Return an event of OpenAI's endpoints."""
        event = self.head | {"choices": choices}
        if self.include_usage:
            event["usage"] = usage
        if self.kind == "chat":
            event["object"] = "chat.completion.chunk"
        return _data(event)


async def collect(pieces: Pieces, response_format: ResponseFormat) -> dict[str, Any]:
    """Return the body of a response when all answers are complete.

    Args:
        pieces: the pieces of the answers.
        response_format: the form of the response.

    Returns:
        The body.

    Raises:
        Refused: an answer did not come within the time limit (status 504), or the engine has
            ended (503).
    """
    answers = [Answer() for _ in pieces.asks]
    async for index, piece in pieces:
        failure = _failure(piece.finish)
        if failure is not None:
            raise failure
        answer = answers[index]
        answer.text += piece.text
        answer.finish = piece.finish
        answer.scores += piece.scores
        answer.prompt_scores += piece.prompt_scores
    return response_format.complete(answers, pieces.usage)


class EventStream(StreamingResponse):
    """A response that sends each piece as an event.

    When the response ends, also because the client leaves, unfinished requests are cancelled.

    Args:
        pieces: the pieces of the answers.
        response_format: the form of the events.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: Pieces, response_format: ResponseFormat) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_events(pieces, response_format), headers=headers)
        self.pieces = pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the response.

        Args:
            scope: the ASGI scope of the connection.
            receive: the coroutine function that returns the client's next message.
            send: the coroutine function that sends a message to the client.
        """
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.pieces.close()


async def _events(pieces: Pieces, response_format: ResponseFormat) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    for event in response_format.opening(len(pieces.asks)):
        yield event
    async for index, piece in pieces:
        failure = _failure(piece.finish)
        if failure is not None:
            yield _data(failure.content)
            return
        if piece.text or piece.finish or piece.scores or piece.prompt_scores:
            scores = [*piece.scores]
            part = Answer(piece.text, piece.finish, scores, [*piece.prompt_scores])
            yield response_format.event(index, part, pieces.usage)
    for event in response_format.closing(pieces.usage):
        yield event


def _failure(finish: str | None) -> Refused | None:
    """Return the error of an answer that will not be complete."""
    if finish == "timeout":
        message = "the answer was not complete at the time limit: ask for fewer tokens."
        return Refused(504, message, "timeout")
    if finish == "grammar":
        message = "response_format: the schema allows no further token: simplify it."
        return Refused(400, message, "invalid_request", "response_format")
    if finish == "error":
        return Refused(503, "the server has stopped: send the request again.", "ended")
    return None


def _data(event: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
