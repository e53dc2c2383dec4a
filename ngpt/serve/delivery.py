"""Answers to requests that run: whole, or as a stream of server-sent events. Whoever hangs up frees the slots."""

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ngpt.serve.answers import Answer, Json
from ngpt.serve.choice import Piece
from ngpt.serve.scheduler import Event, Scheduler
from ngpt.serve.schema import SERVER, ApiError
from ngpt.serve.work import Work

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes events on at once
}
DONE = b"data: [DONE]\n\n"


class Delivery(Response, ABC):
    """An answer that waits for its tasks. When it ends for whatever reason, so do they."""

    def __init__(self, work: Work, answer: Answer, scheduler: Scheduler, *, seconds: float) -> None:
        self._work, self._answer, self._scheduler, self._seconds = work, answer, scheduler, seconds
        self._with_logprobs = work.request.logprob_count() is not None
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(self._deliver(scope, receive, send), receive)
        finally:
            self._scheduler.cancel(self._work.tasks)

    @abstractmethod
    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; what it raises ends the connection."""

    async def _next(self) -> Event:
        """The next event; raises ApiError if a task has failed."""
        event = await self._work.events.get()
        if isinstance(event.what, ApiError):
            raise event.what
        return event

    def _too_slow(self) -> ApiError:
        message = f"the answer has taken longer than {self._seconds:g} s"
        return ApiError(504, message, kind=SERVER, code="timeout", headers={"x-should-retry": "false"})

    def _echoed(self, event: Event) -> Piece | None:
        """The piece that repeats the prompt, if the answer has one; the scores come before any generated text."""
        if isinstance(event.what, list):
            return Piece(self._work.prompt_of(event.choice).text, tuple(event.what))
        return None


class WholeAnswer(Delivery):
    """An answer in one JSON object."""

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                response = JSONResponse(await self._collect())
        except TimeoutError:
            response = error_response(self._too_slow())
        except ApiError as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _collect(self) -> Json:
        work = self._work
        pieces: list[list[Piece]] = [[] for _ in work.tasks]
        if work.echo and not self._with_logprobs:
            pieces = [[Piece(work.prompt_of(task.index).text)] for task in work.tasks]
        remaining = len(pieces)
        while remaining:
            event = await self._next()
            piece = self._echoed(event) or event.what
            assert isinstance(piece, Piece)
            pieces[event.choice].append(piece)
            remaining -= piece.finish_reason is not None
        choices = [
            self._answer.choice(index, found, with_logprobs=self._with_logprobs) for index, found in enumerate(pieces)
        ]
        return self._answer.whole(choices, work.generated_tokens)


class StreamedAnswer(Delivery):
    """An answer in server-sent events; an error after the start is an event, too."""

    async def _deliver(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with asyncio.timeout(self._seconds):
                await self._stream(send)
            end = DONE
        except TimeoutError:
            end = server_event(self._too_slow().body())
        except ApiError as error:
            end = server_event(error.body())
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _stream(self, send: Send) -> None:
        work, answer = self._work, self._answer
        with_usage = bool(work.request.stream_options)
        more: Json = {"usage": None} if with_usage else {}

        async def tell(choices: list[Json], **changed: Any) -> None:
            data = server_event(answer.chunk(choices, **more | changed))
            await send({"type": "http.response.body", "body": data, "more_body": True})

        for task in work.tasks:
            if (first := answer.first_delta(task.index)) is not None:
                await tell([first])
            if work.echo and not self._with_logprobs:
                echoed = Piece(work.prompt_of(task.index).text)
                await tell([answer.delta(task.index, echoed, with_logprobs=False)])
        remaining = len(work.tasks)
        while remaining:
            event = await self._next()
            piece = self._echoed(event) or event.what
            assert isinstance(piece, Piece)
            await tell([answer.delta(event.choice, piece, with_logprobs=self._with_logprobs)])
            remaining -= piece.finish_reason is not None
        if with_usage:
            await tell([], usage=answer.usage(work.generated_tokens))


async def unless_disconnected(answering: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Runs `answering` to its end, or cancels it once the client has gone."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(answering), asyncio.create_task(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


def server_event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


def error_response(error: ApiError) -> JSONResponse:
    """An error as OpenAI's error object."""
    return JSONResponse(error.body(), error.status, headers=error.headers)
