"""The routes: OpenAI's endpoints, vLLM's two for adapters, ours, and what operators look at."""

import asyncio
import base64
import hashlib
import re
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from minilora.data.formats import RawText
from minilora.serving.config import ServeConfig
from minilora.serving.engine_client import Desk, Pieces
from minilora.serving.engine_thread import Worker
from minilora.serving.metrics import Metrics
from minilora.serving.middleware import Guard, Refused
from minilora.serving.responses import Shape, Stream, whole
from minilora.serving.schema import Chat, Completion, Error, Generate, Load, Unload

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}


def create_app(worker: Worker, config: ServeConfig, name: str, token: str | None = None) -> Guard:
    """The application, behind its guard; `worker` must run. `name` is the base's, `token` what clients must send."""
    metrics = Metrics()
    desk = Desk(worker, config, name, metrics)
    app = FastAPI(title="minilora", docs_url=None, redoc_url=None, responses=ERRORS)
    _errors(app)
    _answering(app, desk)
    _adapters(app, desk)
    guard = Guard(app, config, token, metrics)
    _operating(app, desk, guard)
    return guard


def _answering(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/chat/completions", responses=STREAM)
    async def chat(body: Chat, request: Request) -> Response:
        given = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(given) > 1:
            raise Refused(400, "max_tokens and max_completion_tokens differ: give one.", param="max_tokens")
        messages = [message.plain() for message in body.messages]
        ask = await desk.ask(messages, desk.adapter(body.model), body, given.pop() if given else None, None)
        return await _answer(request, await desk.begin([ask]), _shape("chat", body), body.stream)

    @app.post("/v1/completions", responses=STREAM)
    async def completions(body: Completion, request: Request) -> Response:
        adapter, prompts = desk.adapter(body.model), body.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        raw = [RawText(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        asks = [await desk.ask(prompt, adapter, body, body.max_tokens, 16) for prompt in raw]  # 16: OpenAI's default
        return await _answer(request, await desk.begin(asks), _shape("completion", body), body.stream)

    @app.post("/generate", responses=STREAM)
    async def generate(body: Generate, request: Request) -> Response:
        adapter = None if body.adapter is None else desk.adapter(body.adapter)
        prompt = body.prompt if isinstance(body.prompt, str) else [message.plain() for message in body.prompt]
        greedy = body if body.temperature is not None else body.model_copy(update={"temperature": 0.0})
        ask = await desk.ask(prompt, adapter, greedy, body.max_new_tokens, 64)  # 64: ml.generate's default
        return await _answer(request, await desk.begin([ask]), Shape("generate", desk.base), body.stream)


def _shape(kind: str, body: Chat | Completion) -> Shape:
    usage = bool(body.stream_options and body.stream_options.include_usage)
    if usage and not body.stream:
        raise Refused(400, "stream_options: only with stream true.", param="stream_options")
    return Shape(kind, body.model, usage)


async def _answer(request: Request, pieces: Pieces, shape: Shape, stream: bool | None) -> Response:
    if stream:
        return Stream(pieces, shape)
    answer, gone = asyncio.ensure_future(whole(pieces, shape)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answer.result()) if answer.done() else Response(status_code=499)  # nobody reads it
    finally:
        answer.cancel()
        gone.cancel()
        pieces.close()


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _adapters(app: FastAPI, desk: Desk) -> None:
    def entry(name: str) -> dict[str, Any]:
        parent = None if desk.adapter(name) is None else desk.base
        return {"id": name, "object": "model", "created": desk.created, "owned_by": "minilora", "parent": parent}

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


def _operating(app: FastAPI, desk: Desk, guard: Guard) -> None:
    page = files("minilora.serving.serve").joinpath("page.html").read_text(encoding="utf-8")
    inline = {kind: re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S) for kind in ("script", "style")}
    policy = "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    for kind, bodies in inline.items():  # what the page holds runs, what an answer holds never does
        hashes = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        policy += f"; {kind}-src " + " ".join(f"'sha256-{value}'" for value in hashes)

    @app.get("/", include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/healthz")
    async def health() -> JSONResponse:
        state = "failed" if desk.worker.failed else "stopping" if guard.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        engine = desk.worker.engine
        gauges = {"requests_running": len(engine.rows), "requests_waiting": len(engine.waiting)}
        gauges |= {"requests_open": guard.open, "adapters": len(desk.names) - 1}
        return PlainTextResponse(desk.metrics.text(gauges), media_type="text/plain; version=0.0.4; charset=utf-8")


def _errors(app: FastAPI) -> None:
    """Everything that is no answer comes in OpenAI's shape."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = []
        for one in error.errors():
            where = ".".join(str(part) for part in one["loc"][1:]) or "the body"
            known = "unknown field, which this server would have to ignore: leave it out"
            found.append((where, known if one["type"] == "extra_forbidden" else one["msg"]))
        text = "; ".join(f"{where}: {message}" for where, message in found[:4])
        return JSONResponse(Refused(400, text, "invalid_request", found[0][0]).content, 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(Refused(error.status_code, str(error.detail)).content, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(Refused(500, "the server has an error, which is in its log.").content, 500)
