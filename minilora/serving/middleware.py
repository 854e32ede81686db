"""The middleware between the socket and the routes: token, size limits and time limits.

It is an ASGI wrapper around the application. It reads a request's body completely, within a limit
of bytes and of seconds, before the application sees the request. It ends a request, and its answer
too, at the time limit, so a client that reads slowly or not at all occupies the server no longer
than other clients.

Source: https://asgi.readthedocs.io/en/latest/specs/www.html
"""

import asyncio
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

from minilora.serving.config import ServeConfig
from minilora.serving.metrics import Metrics

# These need no token: the page, which asks for it, and the health check.
PUBLIC = ("/", "/health", "/healthz")
BODY_SECONDS = 20.0  # time limit for the arrival of a body
GRACE = 5.0  # seconds after config.timeout, in which the engine's own time-out message is sent
LOCAL = ("localhost", "127.0.0.1", "::1")
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An error for the client, in the form of OpenAI's errors.

    Args:
        status: the HTTP status.
        message: the message for the client.
        code: a short name of the problem; None for problems without one.
        param: the field that causes the problem; None if no single field does.

    Attributes:
        headers: further headers of the response.
        content: the body of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        default_type = "server_error" if status >= 500 else "invalid_request_error"
        error = {
            # A message may quote half of a surrogate pair, which UTF-8 cannot encode.
            "message": message.encode(errors="replace").decode(),
            "type": ERROR_TYPES.get(status, default_type),
            "param": param,
            "code": code,
        }
        self.content = {"error": error}


def adapter_path(folder: str | None, path: str) -> Path:
    """Return the resolved path of an adapter folder inside an allowed folder.

    A path outside and a missing path give the same message, so that a client cannot find out which
    files exist.

    Args:
        folder: the allowed folder; None allows nothing.
        path: the client's path, relative to the allowed folder or absolute.

    Returns:
        The path, with all links followed.

    Raises:
        Refused: loading is not allowed (status 403), or the path is missing, is not a folder,
            leads outside or has an entry that leads outside (400).
    """
    if folder is None:
        message = "this server loads no adapters: start it with --adapter_folder."
        raise Refused(403, message, "adapters_fixed")
    allowed = Path(folder).resolve()
    resolved = allowed
    entries: list[Path] = []
    try:
        resolved = (allowed / path).resolve()
        if resolved.is_dir():
            entries = [resolved, *(entry.resolve() for entry in resolved.iterdir())]
    except (OSError, ValueError):  # not a possible name: too long, or with a zero byte
        entries = []
    is_inside = all(entry.is_relative_to(allowed) for entry in entries)
    if not entries or not is_inside:
        message = f"lora_path: {path!r} is not an adapter folder inside the server's folder."
        raise Refused(400, message, param="lora_path")
    return resolved


class Guard:
    """The middleware around an application.

    Args:
        app: the ASGI application.
        config: the options of the server.
        token: the token that clients must send; None accepts requests without one.
        metrics: the counters of the server.

    Attributes:
        open: number of requests in progress.
        draining: True refuses new requests.
    """

    def __init__(self, app: Any, config: ServeConfig, token: str | None, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self.token_hash: bytes | None = None
        if token is not None:
            self.token_hash = hashlib.sha256(token.encode()).digest()
        self.open = 0
        self.draining = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request.

        Args:
            scope: the ASGI scope of the connection.
            receive: the coroutine function that returns the client's next message.
            send: the coroutine function that sends a message to the client.
        """
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        response = _CountedResponse(scope["path"], send, self.metrics)
        self.open += 1
        try:
            async with asyncio.timeout(self.config.timeout + GRACE):
                self._check(scope)
                if scope["method"] == "POST":
                    body = await self._read_body(scope, receive)
                    receive = _replay(body, receive)
                await self.app(scope, receive, response)
        except Refused as refusal:
            await _send_refusal(response, refusal)
        except TimeoutError:
            if not response.started:
                message = "the request took longer than the server's time limit."
                await _send_refusal(response, Refused(504, message, "timeout"))
        finally:
            self.open -= 1

    def _check(self, scope: Any) -> None:
        """Raise Refused for a request that is not allowed."""
        headers = dict(scope["headers"])
        if self.token_hash is None and self.config.is_local:
            self._check_host(headers)
        if scope["path"] in PUBLIC and scope["method"] in ("GET", "HEAD"):
            return
        if self.token_hash is not None:
            _check_token(headers, self.token_hash)
        if scope["method"] == "POST":
            self._check_post(headers)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Raise Refused for another host name: DNS rebinding by a web page from elsewhere."""
        header = headers.get(b"host", b"").decode("latin-1")
        host = header.rsplit(":", 1)[0].strip("[]").lower()  # without the port
        if host not in (*LOCAL, self.config.host):
            message = f"expected a Host header that names this machine, got {host!r}."
            raise Refused(403, message, "wrong_host")

    def _check_post(self, headers: dict[bytes, bytes]) -> None:
        """Raise Refused while the server stops, and for a body that is not JSON."""
        if self.draining:
            message = "this server is stopping: send the request again later."
            refusal = Refused(503, message, "stopping")
            refusal.headers = {"retry-after": "1", "connection": "close"}
            raise refusal
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type != b"application/json":
            shown = content_type.decode("latin-1")
            raise Refused(415, f"expected Content-Type: application/json, got {shown!r}.")

    async def _read_body(self, scope: Any, receive: Any) -> bytes:
        """Return the complete body, or raise Refused at a limit of bytes or seconds."""
        size = dict(scope["headers"]).get(b"content-length", b"0")
        if not size.isdigit() or int(size) > self.config.max_body:
            raise self._body_too_large()
        body = b""
        more_body = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more_body:
                    message = await receive()
                    if message["type"] != "http.request":  # the client has left
                        break
                    body += message.get("body", b"")
                    if len(body) > self.config.max_body:
                        raise self._body_too_large()
                    more_body = message.get("more_body", False)
        except TimeoutError as error:
            text = f"the body did not arrive within {BODY_SECONDS:.0f} seconds."
            raise Refused(408, text, "timeout") from error
        return body

    def _body_too_large(self) -> Refused:
        """Return the refusal of a large body."""
        limit = self.config.max_body
        message = f"the body is larger than the {limit} bytes that this server accepts."
        return Refused(413, message, "too_large")


def _check_token(headers: dict[bytes, bytes], token_hash: bytes) -> None:
    """Raise Refused without the right token; comparing hashes hides the token's length."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    is_equal = hmac.compare_digest(hashlib.sha256(token.strip()).digest(), token_hash)
    if scheme.lower() != b"bearer" or not is_equal:
        message = "expected the server's token in the header Authorization: Bearer TOKEN."
        refusal = Refused(401, message, "invalid_api_key")
        refusal.headers = {"www-authenticate": "Bearer"}
        raise refusal


class _CountedResponse:
    """An ASGI `send` that counts the response and adds a security header."""

    def __init__(self, path: str, send: Any, metrics: Metrics) -> None:
        self.path = path
        self.send = send
        self.metrics = metrics
        self.started = False

    async def __call__(self, message: Any) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.started = True
            status = message["status"]
            route = self.path if status < 400 else "refused"
            self.metrics.requests[route, status] += 1
            message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
        await self.send(message)


def _replay(body: bytes, receive: Any) -> Any:
    """Return an ASGI `receive` that returns `body` first, and then the client's messages."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        if messages:
            return messages.pop()
        return await receive()

    return replay


async def _send_refusal(send: Any, refusal: Refused) -> None:
    """Send the response of a refusal."""
    content = json.dumps(refusal.content).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content))}
    headers |= refusal.headers
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
