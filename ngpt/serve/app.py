"""The application behind the server's addresses: completions, chats, models, health and metrics."""

import asyncio
from dataclasses import dataclass
from typing import cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ngpt.serve.access import Guard
from ngpt.serve.answers import ChatAnswer, CompletionAnswer, TokenTexts
from ngpt.serve.chat import ChatTemplate
from ngpt.serve.delivery import StreamedAnswer, WholeAnswer, error_response
from ngpt.serve.engine import Engine
from ngpt.serve.metrics import Metrics
from ngpt.serve.scheduler import Scheduler, closing
from ngpt.serve.schema import (
    INVALID,
    SERVER,
    ApiError,
    ChatRequest,
    CompletionRequest,
    check_model,
    parse_json,
    read_request,
)
from ngpt.serve.work import Limits, Work, read_prompts

ARRIVAL_SECONDS = 20.0  # for a body to arrive
DISCARDED_BYTES = 1 << 24  # of a body that is too large, so that its sender reads the answer
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWERS = {CompletionRequest: CompletionAnswer, ChatRequest: ChatAnswer}


@dataclass
class Service:
    """What the server has: the model once it is loaded, and in which state it is."""

    name: str
    limits: Limits
    metrics: Metrics
    template: ChatTemplate | None = None
    engine: Engine | None = None
    scheduler: Scheduler | None = None
    texts: TokenTexts | None = None
    created: int = 0  # when the checkpoint was written, in seconds
    closing: bool = False

    @property
    def state(self) -> str:
        """`ok`, or why the server cannot answer: loading, closing or failing."""
        if self.closing:
            return "closing"
        if self.scheduler is None:
            return "loading"
        return "ok" if self.scheduler.is_healthy else "failing"

    def ready(self) -> tuple[Engine, Scheduler, TokenTexts]:
        """The parts that answer requests. ApiError with status 503 if there are none yet, or no longer."""
        if self.closing:
            raise closing()
        if self.engine is None or self.scheduler is None or self.texts is None:
            headers = {"Retry-After": "5"}
            raise ApiError(503, "the model is being loaded", kind=SERVER, code="loading", headers=headers)
        return self.engine, self.scheduler, self.texts


def make_app(service: Service, token: str | None) -> Guard:
    """Returns the ASGI application of a service."""

    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    async def chats(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != service.name:
            message = f"the model {name!r} does not exist; this server has {service.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": service.state}, 200 if service.state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {ApiError: _on_api_error, HTTPException: _on_http_error, ClientDisconnect: _on_gone, Exception: _on_bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, token, service.metrics)


async def _answer(service: Service, request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
    engine, scheduler, texts = service.ready()
    asked = read_request(kind, parse_json(await read_body(request, service.limits.body_bytes)))
    check_model(asked, service.name)
    prompts = await asyncio.to_thread(read_prompts, asked, engine, service.template)
    choices = len(prompts) * (asked.n or 1)
    if choices > scheduler.capacity:
        message = f"{choices} choices are asked for; this server takes at most {scheduler.capacity} at a time"
        raise ApiError(400, message, param="n" if asked.n else "prompt")
    ends = service.template.special.values() if kind is ChatRequest and service.template else ()
    work = Work(asked, prompts, engine, service.limits, ends)
    about = {"model": service.name, "fingerprint": engine.fingerprint, "texts": texts}
    answer = ANSWERS[kind](**about, prompt_tokens=work.prompt_tokens)
    scheduler.submit(work.tasks)
    delivery = StreamedAnswer if asked.stream else WholeAnswer
    return delivery(work, answer, scheduler, seconds=service.limits.seconds)


async def read_body(request: Request, most: int) -> bytes:
    """Reads the body of a request with JSON.

    Raises:
        ApiError: 413 if it is larger than `most` bytes, 408 if it is slow, 415 if it is not plain JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type must be application/json, got {kind or 'none'!r}")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"the content encoding {encoding!r} is not supported")
    length = request.headers.get("content-length", "0")
    announced = int(length) if length.isdigit() and len(length) < 20 else most + 1
    too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large")
    if announced > most and (announced > DISCARDED_BYTES or "expect" in request.headers):
        raise too_large
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(ARRIVAL_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most + DISCARDED_BYTES:
                    raise too_large
                if size <= most:
                    body += part
    except TimeoutError:
        raise ApiError(408, f"the body has not arrived within {ARRIVAL_SECONDS:g} s", code="timeout") from None
    if size > most:
        raise too_large
    return bytes(body)


def _model(service: Service) -> dict[str, object]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "ngpt"}


async def _on_api_error(request: Request, error: Exception) -> Response:
    return error_response(cast(ApiError, error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses: paths that there are not, and methods."""
    found = cast(HTTPException, error)
    message = f"{found.detail}: {request.method} {request.url.path}"
    return error_response(ApiError(found.status_code, message, kind=INVALID, headers=found.headers))


async def _on_gone(request: Request, error: Exception) -> Response:
    """The client has gone before its request was complete; nobody reads this answer."""
    return Response(status_code=400)


async def _on_bug(request: Request, error: Exception) -> Response:
    """An error of ours: uvicorn writes its traceback to the log of the server; the client does not see it."""
    return error_response(ApiError(500, "internal error; the log of the server says why", kind=SERVER))
