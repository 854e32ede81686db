"""An answer as clients read it: whole, or as server-sent events, in the words of the endpoint that was asked.

data: {"choices": [{"index": 0, "delta": {"content": "He"}, …}], …}     a piece, as soon as it is sure
data: {"choices": [{…, "finish_reason": "stop"}]}                       why it ended: stop, length
data: {"choices": [], "usage": {…}}                                     if asked for
data: [DONE]
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


@dataclass
class Answer:
    """What was said to one request, and why it ended."""

    text: str = ""
    finish: str | None = None


class Shape:
    """`kind`: chat or completion (OpenAI's), or generate (ours)."""

    def __init__(self, kind: str, model: str, usage: bool = False) -> None:
        self.kind, self.usage = kind, usage
        self.head: dict[str, Any] = {"created": int(time.time()), "model": model}
        if kind != "generate":
            prefix, thing = ("chatcmpl", "chat.completion") if kind == "chat" else ("cmpl", "text_completion")
            self.head |= {"id": f"{prefix}-{uuid.uuid4().hex}", "object": thing}

    def whole(self, answers: list[Answer], usage: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        if self.kind == "generate":
            return {"text": answers[0].text, "finish_reason": answers[0].finish, "usage": usage}
        choices = [self._choice(i, answer.text, answer.finish, "message") for i, answer in enumerate(answers)]
        return self.head | {"choices": choices, "usage": usage}

    def opening(self, count: int) -> list[str]:
        """The events before the first token: in a chat, who speaks."""
        if self.kind != "chat":
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        choices = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(count)]
        return [self._event(choices)]

    def event(self, index: int, text: str, finish: str | None) -> str:
        """A piece of an answer."""
        if self.kind == "generate":
            return _data({"text": text, "finish_reason": finish})
        return self._event([self._choice(index, text, finish, "delta")])

    def closing(self, usage: dict[str, int]) -> list[str]:
        """The events after the last."""
        if self.kind == "generate":
            return [_data({"text": "", "finish_reason": None, "usage": usage}), "data: [DONE]\n\n"]
        return [*([self._event([], usage)] if self.usage else []), "data: [DONE]\n\n"]

    def _choice(self, index: int, text: str, finish: str | None, place: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            said = {place: {"role": "assistant", "content": text, "refusal": None}}
            if place == "delta":
                said = {place: {"content": text} if text else {}}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        event = self.head | {"choices": choices} | ({"usage": usage} if self.usage else {})
        return _data(event | ({"object": "chat.completion.chunk"} if self.kind == "chat" else {}))


async def whole(pieces: Pieces, shape: Shape) -> dict[str, Any]:
    """The answers, when they are complete. Refused if they did not come."""
    answers = [Answer() for _ in pieces.asks]
    async for index, piece in pieces:
        if refusal := failure(piece.finish):
            raise refusal
        answers[index].text += piece.text
        answers[index].finish = piece.finish
    return shape.whole(answers, pieces.usage)


class Stream(StreamingResponse):
    """The answers while they come. Whatever ends it, a client that leaves too, what is not done is forgotten."""

    media_type = "text/event-stream"

    def __init__(self, pieces: Pieces, shape: Shape) -> None:
        super().__init__(_events(pieces, shape), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.pieces = pieces

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.pieces.close()


async def _events(pieces: Pieces, shape: Shape) -> AsyncIterator[str]:
    for event in shape.opening(len(pieces.asks)):
        yield event
    async for index, piece in pieces:
        if refusal := failure(piece.finish):
            yield _data(refusal.content)
            return
        if piece.text or piece.finish:
            yield shape.event(index, piece.text, piece.finish)
    for event in shape.closing(pieces.usage):
        yield event


def failure(finish: str | None) -> Refused | None:
    """What to tell a client whose answer will not be complete."""
    if finish == "timeout":
        return Refused(504, "the answer was not complete when its time was over: ask for fewer tokens.", "timeout")
    return Refused(503, "the server has ended: ask again.", "ended") if finish == "error" else None


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
