"""The HTTP routes of the server.

OpenAI     POST /v1/chat/completions, POST /v1/completions, GET /v1/models
vLLM       POST /v1/load_lora_adapter, POST /v1/unload_lora_adapter
minilora   POST /generate
operators  GET /, GET /health (also /healthz), GET /metrics
"""

import asyncio
import base64
import hashlib
import re
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from minilora.data.formats import RawText
from minilora.generation.sequence import Ask
from minilora.serving.config import ServeConfig
from minilora.serving.engine_client import Desk, Pieces
from minilora.serving.engine_thread import Worker
from minilora.serving.errors import invalid_fields
from minilora.serving.metrics import Metrics
from minilora.serving.middleware import Guard, Refused
from minilora.serving.responses import EventStream, ResponseFormat, collect
from minilora.serving.schema import (
    Chat,
    Completion,
    Error,
    Generate,
    Load,
    Message,
    Sampling,
    StreamOptions,
    Unload,
)
from minilora.serving.structured import ToolUse, grammar_of

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
GENERATE_TOKENS = 64  # the default of ml.generate
# The bodies in which a misspelt field gets a suggestion.
BODIES: dict[str, type[Sampling]] = {
    "v1/chat/completions": Chat,
    "v1/completions": Completion,
    "generate": Generate,
}
CLIENT_LEFT = 499  # nginx's status of a request whose client closed the connection


def create_app(worker: Worker, config: ServeConfig, name: str, token: str | None = None) -> Guard:
    """Return the ASGI application, wrapped in the middleware that checks each request.

    Args:
        worker: the engine thread; it must run when the first request arrives.
        config: the options of the server.
        name: the model name of the base.
        token: the token that clients must send; None accepts requests without one.

    Returns:
        The application.
    """
    metrics = Metrics()
    desk = Desk(worker, config, name, metrics)
    app = FastAPI(title="minilora", docs_url=None, redoc_url=None, responses=ERRORS)
    _add_error_handlers(app)
    _add_answer_routes(app, desk)
    _add_model_routes(app, desk)
    guard = Guard(app, config, token, metrics)
    _add_page(app)
    _add_operator_routes(app, desk, guard)
    return guard


def _add_answer_routes(app: FastAPI, desk: Desk) -> None:
    """Add the three routes that answer prompts."""

    @app.post("/v1/chat/completions", responses=STREAM)
    async def chat(body: Chat, request: Request) -> Response:
        max_tokens = _chat_limit(body)
        messages = _plain_messages(body.messages)
        adapter = desk.adapter_of(body.model)
        logprobs = _chat_logprobs(body)
        response_format = _response_format("chat", body)
        if logprobs is not None:
            response_format.token_texts = desk.token_texts()
        engine = desk.worker.engine
        tools = ToolUse.of(body, engine.tokenizer)
        response_format.tools = tools
        grammar = await grammar_of(body.response_format, tools, engine)
        fields = {"logprobs": logprobs, "grammar": grammar, "shown": tools.shown}
        ask = await desk.prepare(tools.prompt(messages), adapter, body, max_tokens, **fields)
        pieces = await desk.begin(_several([tools.opened(ask, engine.max_length)], body.n))
        return await _answer(request, pieces, response_format, body.stream)

    @app.post("/v1/completions", responses=STREAM)
    async def completions(body: Completion, request: Request) -> Response:
        adapter = desk.adapter_of(body.model)
        logprobs = None if body.logprobs is False else body.logprobs
        score_prompt = bool(body.echo) and logprobs is not None
        grammar = await grammar_of(body.response_format, None, desk.worker.engine)
        scores = {"logprobs": logprobs, "score_prompt": score_prompt, "grammar": grammar}
        prompts = _prompts(body)
        asks = []
        for prompt in prompts:
            limit = body.max_tokens
            asks.append(
                await desk.prepare(prompt, adapter, body, limit, COMPLETION_TOKENS, **scores)
            )
        n = _answers_to_each(body)
        response_format = _response_format("completion", body)
        if logprobs is not None:
            response_format.token_texts = desk.token_texts()
        if body.echo:
            response_format.echoes = _several_of(desk.echoes(prompts, asks), n)
        pieces = await desk.begin(_several(asks, n))
        return await _answer(request, pieces, response_format, body.stream)

    @app.post("/generate", responses=STREAM)
    async def generate(body: Generate, request: Request) -> Response:
        adapter = None
        if body.adapter is not None:
            adapter = desk.adapter_of(body.adapter)
        prompt: Any = body.prompt
        if not isinstance(prompt, str):
            prompt = _plain_messages(prompt, "prompt")
        if body.temperature is None:
            body = body.model_copy(update={"temperature": 0.0})
        ask = await desk.prepare(prompt, adapter, body, body.max_new_tokens, GENERATE_TOKENS)
        pieces = await desk.begin([ask])
        return await _answer(request, pieces, ResponseFormat("generate", desk.base), body.stream)


def _answers_to_each(body: Completion) -> int | None:
    """Return the number of answers to each prompt of a completion."""
    if body.best_of not in (None, body.n or 1):
        message = "best_of: expected the value of n: this server does not rank answers."
        raise Refused(400, message, "invalid_request", "best_of")
    return body.n


def _several(asks: list[Ask], n: int | None) -> list[Ask]:
    """Return n requests for each request; with one seed, they have different random numbers."""
    several = _several_of(asks, n)
    return [replace(ask, row=number % (n or 1)) for number, ask in enumerate(several)]


def _several_of(values: list[Any], n: int | None) -> list[Any]:
    """Return each value n times."""
    result = []
    for value in values:
        result += [value] * (n or 1)
    return result


def _chat_logprobs(body: Chat) -> int | None:
    """Return the number of likeliest tokens to list; None without log-probabilities."""
    if body.top_logprobs and not body.logprobs:
        message = "top_logprobs: allowed only with logprobs true."
        raise Refused(400, message, "invalid_request", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _plain_messages(messages: list[Message], field: str = "messages") -> list[dict[str, Any]]:
    """Return messages in the form of chat templates, or raise Refused."""
    plain = []
    for number, message in enumerate(messages):
        try:
            plain.append(message.plain())
        except ValueError as error:
            place = f"{field}[{number}]"
            raise Refused(400, f"{place}.{error}", "invalid_request", f"{place}.content") from error
    return plain


def _chat_limit(body: Chat) -> int | None:
    """Return the token limit of a chat, which has two names: the old one and the new one."""
    if body.max_tokens is None:
        return body.max_completion_tokens
    if body.max_completion_tokens not in (None, body.max_tokens):
        message = "max_tokens and max_completion_tokens differ: give one."
        raise Refused(400, message, param="max_tokens")
    return body.max_tokens


def _prompts(body: Completion) -> list[RawText | list[int]]:
    """Return the prompts of a completion as a list of raw texts or lists of token ids."""
    prompts: Any = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    result = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = RawText(prompt)
        result.append(prompt)
    return result


def _response_format(kind: str, body: Chat | Completion) -> ResponseFormat:
    """Return the format of an answer to one of OpenAI's endpoints."""
    options = body.stream_options
    options = options or StreamOptions()
    include_usage = bool(options.include_usage)
    if include_usage and not body.stream:
        message = "stream_options: allowed only with stream true."
        raise Refused(400, message, param="stream_options")
    continuous = include_usage and bool(options.continuous_usage_stats)
    return ResponseFormat(kind, body.model, include_usage, continuous)


async def _answer(
    request: Request, pieces: Pieces, response_format: ResponseFormat, stream: bool | None
) -> Response:
    """Return a stream, or wait for the complete answer or for the client to leave."""
    if stream:
        return EventStream(pieces, response_format)
    answer = asyncio.ensure_future(collect(pieces, response_format))
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(answer.result())
    finally:
        answer.cancel()
        disconnect.cancel()
        pieces.close()


async def _wait_for_disconnect(request: Request) -> None:
    """Return when the client has closed the connection."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def _add_model_routes(app: FastAPI, desk: Desk) -> None:
    """Add the routes that list, load and unload models: the base and its adapters."""

    def entry(name: str) -> dict[str, Any]:
        parent = None if desk.adapter_of(name) is None else desk.base
        return {
            "id": name,
            "object": "model",
            "created": desk.created,
            "owned_by": "minilora",
            "parent": parent,
        }

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [entry(name) for name in desk.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(entry(name))

    @app.post("/v1/load_lora_adapter")
    async def load(body: Load) -> JSONResponse:
        await desk.load(body.lora_name, body.lora_path)
        return JSONResponse(entry(body.lora_name))

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: Unload) -> JSONResponse:
        await desk.unload(body.lora_name)
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})


def _add_page(app: FastAPI) -> None:
    """Add the page that compares two models."""
    page = files("minilora.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": _content_security_policy(page),
        "referrer-policy": "no-referrer",
    }

    @app.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _content_security_policy(page: str) -> str:
    """Return a policy that runs the page's own script and style, and nothing inside an answer."""
    policy = (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    for tag in ("script", "style"):
        hashes = []
        for source in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S):
            digest = hashlib.sha256(source.encode()).digest()
            hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
        policy += f"; {tag}-src " + " ".join(hashes)
    return policy


def _add_operator_routes(app: FastAPI, desk: Desk, guard: Guard) -> None:
    """Add the health check and the metrics."""

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> JSONResponse:
        if desk.worker.failed:
            return JSONResponse({"status": "failed"}, 503)
        if guard.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"}, 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        engine = desk.worker.engine
        gauges = {
            "requests_running": len(engine.rows),
            "requests_waiting": len(engine.waiting),
            "requests_open": guard.open,
            "adapters": len(desk.names) - 1,  # without the base
        }
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return PlainTextResponse(desk.metrics.text(gauges), media_type=media_type)


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error the form of OpenAI's errors."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_invalid_request(request, error).content, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = _not_served(request)
        content = Refused(error.status_code, message).content
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        content = Refused(500, "the server has an internal error: see its log.").content
        return JSONResponse(content, 500)


def _not_served(request: Request) -> str:
    """Return the message for a route that does not exist, which lists those that do."""
    served = []
    for route in request.app.routes:
        if getattr(route, "include_in_schema", False):
            path = re.sub(r"\{.*\}", "NAME", route.path)
            served.append(f"{' '.join(route.methods)} {path}")
    asked = f"{request.method} {request.url.path}"
    return f"{asked} is not served here. This server has {', '.join(served)}."


def _invalid_request(request: Request, error: RequestValidationError) -> Refused:
    """Return a refusal that names the first four invalid fields of a body."""
    route = request.url.path.strip("/")
    model = BODIES.get(route)
    known = [] if model is None else [*model.model_fields]
    fields = invalid_fields(error.errors(), error.body, known, route)
    sentences = [sentence for _, sentence in fields[:4]]
    return Refused(400, " ".join(sentences), "invalid_request", fields[0][0])
