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
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

from minilora.serving.engine_client import Pieces
from minilora.serving.middleware import Refused

DONE = "data: [DONE]\n\n"


@dataclass
class Answer:
    """The answer to one request.

    Attributes:
        text: the text so far.
        finish: the reason for the end; None while the answer grows.
    """

    text: str = ""
    finish: str | None = None


class ResponseFormat:
    """The JSON form of an endpoint's answers.

    Args:
        kind: "chat" or "completion" (OpenAI's endpoints), or "generate" (minilora's).
        model: the model name of the request.
        include_usage: True adds a last event with the number of tokens to a stream.

    Attributes:
        head: the fields that all of an answer's events share.
    """

    def __init__(self, kind: str, model: str, include_usage: bool = False) -> None:
        self.kind = kind
        self.include_usage = include_usage
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
            choices.append(self._choice(index, self._message(answer.text), answer.finish))
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

    def event(self, index: int, text: str, finish: str | None) -> str:
        """Return the event of a piece.

        Args:
            index: the index of the request.
            text: the new text.
            finish: the reason for the end; None if the answer goes on.

        Returns:
            The event.
        """
        if self.kind == "generate":
            return _data({"text": text, "finish_reason": finish})
        return self._event([self._choice(index, self._delta(text), finish)])

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

    def _choice(self, index: int, text: dict[str, Any], finish: str | None) -> dict[str, Any]:
        """Return one element of `choices`."""
        return {"index": index, **text, "logprobs": None, "finish_reason": finish}

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
        answers[index].text += piece.text
        answers[index].finish = piece.finish
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
        if piece.text or piece.finish:
            yield response_format.event(index, piece.text, piece.finish)
    for event in response_format.closing(pieces.usage):
        yield event


def _failure(finish: str | None) -> Refused | None:
    """Return the error of an answer that will not be complete."""
    if finish == "timeout":
        message = "the answer was not complete at the time limit: ask for fewer tokens."
        return Refused(504, message, "timeout")
    if finish == "error":
        return Refused(503, "the server has stopped: send the request again.", "ended")
    return None


def _data(event: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
