"""Answers that end when the client leaves: server-sent events, or one object at the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, ClientGone, internal_error
from .logs import log_failure

DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Closable(Protocol):
    """Something to let go of."""

    def close(self) -> None:
        """Harmless when repeated."""
        ...


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


async def until_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled as soon as the client closes its connection.

    Raises:
        ClientGone: the client left first.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def answer(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """`until_gone` for a route: the body of `request` has been read."""
    return await until_gone(request.receive, work)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends server-sent events from a generator, and closes `source` at the end, whatever comes.

    What goes wrong after the first byte becomes a last event with OpenAI's error object.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], source: Closable | None) -> None:
        """`source`: what the events are made from; closed even if none was ever asked for."""
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        try:
            async with aclosing(self._events):
                await until_gone(receive, self._send(send))
        finally:
            if self._source is not None:
                self._source.close()

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        try:
            async for data in self._events:
                await send(_body(data, more=True))
        except ApiError as error:
            await send(_body(event(error.body()), more=True))
        except Exception as error:
            log_failure(logger, "stream failed", error)
            await send(_body(event(internal_error().body()), more=True))
        await send(_body(b"", more=False))


def _body(data: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
