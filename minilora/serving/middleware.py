"""What stands between the socket and the routes: who may ask, how much may be sent, how long it may take.

An ASGI wrapper around the application. A body is read whole, within a limit of bytes and of seconds, before anything
else is done for it; a request is ended, its answer too, when its time is up, so a client that reads slowly or not at
all holds a place no longer than any other.
"""

import asyncio
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from minilora.serving.config import ServeConfig
from minilora.serving.metrics import Metrics

PUBLIC = ("/", "/healthz")  # without a token: the page, which asks for it, and what a supervisor polls
BODY_SECONDS = 20.0  # for a body to arrive
GRACE = 5.0  # seconds beyond config.timeout, in which the engine's own word about it goes out
LOCAL = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """An error for the client, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, {}
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        message = message.encode(errors="replace").decode()  # of a client's half surrogates
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def inside(folder: str | None, path: str) -> Path:
    """The adapter's folder `path`, taken from `folder` on, links followed. Refused for whatever lies, or leads,
    outside, with the words for what is not there, so that nobody learns what is."""
    if folder is None:
        raise Refused(403, "this server loads no adapters: start it with --adapter_folder.", "adapters_fixed")
    top = found = Path(folder).resolve()
    try:
        found = (top / path).resolve()
        held = [found, *(entry.resolve() for entry in found.iterdir())] if found.is_dir() else []
    except (OSError, ValueError):  # no such name: too long, or with a zero byte
        held = []
    if not held or not all(entry.is_relative_to(top) for entry in held):
        raise Refused(400, f"lora_path: {path!r} is no adapter's folder inside the server's.", param="lora_path")
    return found


class Guard:
    """`app` behind the rules of `config`. `open` counts requests under way; `draining` refuses new ones."""

    def __init__(self, app: Any, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.token = None if token is None else hashlib.sha256(token.encode()).digest()
        self.open, self.draining = 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def noted(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.metrics.requests[scope["path"] if message["status"] < 400 else "refused", message["status"]] += 1
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        self.open += 1
        try:
            async with asyncio.timeout(self.config.timeout + GRACE):
                self._check(scope)
                if scope["method"] == "POST":
                    receive = _replayed(await self._body(scope, receive), receive)
                await self.app(scope, receive, noted)
        except Refused as refusal:
            await _refuse(noted, refusal)
        except TimeoutError:
            if not started:
                await _refuse(noted, Refused(504, "the server's time for a request is over.", "timeout"))
        finally:
            self.open -= 1

    def _check(self, scope: Any) -> None:
        """Refused for a request that may not be made."""
        headers = dict(scope["headers"])
        if self.token is None and self.config.is_local:  # a page from elsewhere, under a name that leads here
            host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]").lower()
            if host not in (*LOCAL, self.config.host):
                raise Refused(403, f"expected a Host header of this machine, got {host!r}.", "wrong_host")
        if scope["path"] in PUBLIC and scope["method"] in ("GET", "HEAD"):
            return
        if self.token is not None:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self.token)
            if kind.lower() != b"bearer" or not same:
                refusal = Refused(401, "expected the server's token: Authorization: Bearer …", "invalid_api_key")
                refusal.headers = {"www-authenticate": "Bearer"}
                raise refusal
        if scope["method"] == "POST":
            if self.draining:
                refusal = Refused(503, "this server is stopping: ask another.", "stopping")
                refusal.headers = {"retry-after": "1", "connection": "close"}
                raise refusal
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, f"expected Content-Type: application/json, got {kind.decode('latin-1')!r}.")

    async def _body(self, scope: Any, receive: Any) -> bytes:
        most, body = self.config.max_body, b""
        size = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = Refused(413, f"the body is larger than the {most} bytes that this server takes.", "too_large")
        if not size.isdigit() or int(size) > most:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError as error:
            raise Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds.", "timeout") from error
        return body


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives `body` first, and then what comes."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return left.pop() if left else await receive()

    return replay


async def _refuse(send: Any, refusal: Refused) -> None:
    content = json.dumps(refusal.content).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))} | refusal.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
