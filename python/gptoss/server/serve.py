"""uvicorn around the application: what a connection may do, and how the server stops."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from .driver import Driver
from .errors import ApiError, unavailable
from .logs import log
from .settings import Settings

_LAST_WORDS = 5.0  # seconds that requests have to say that they were ended

logger = logging.getLogger(__name__)


def bind(settings: Settings) -> socket.socket:
    """A socket at the server's address, which refuses connections until the server runs.

    Raises:
        OSError: the address cannot be used; names it.
    """
    host = settings.host.strip("[]")
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{settings.port}: {error.strerror}") from None
    return bound


def make_server(
    app: FastAPI, settings: Settings, on_start: Callable[[], None] | None = None
) -> uvicorn.Server:
    """A uvicorn server for the application, to be run with the socket of `bind`."""
    config = uvicorn.Config(
        app,
        http=_bounded_protocol(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_timeout,
        timeout_graceful_shutdown=settings.drain_timeout + _LAST_WORDS,
        h11_max_incomplete_event_size=settings.max_header_bytes,
    )
    return _Server(config, app, on_start)


def serve(app: FastAPI, settings: Settings, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then end what runs within the drain timeout.

    Raises:
        SystemExit: 0 after SIGTERM.
        KeyboardInterrupt: after SIGINT.
    """

    def started() -> None:
        host, port = bound.getsockname()[:2]
        log(logger, "serving", host=host, port=port, key=settings.api_key is not None)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)  # uvicorn raises it again once everything has ended
    make_server(app, settings, started).run([bound])


class _Server(uvicorn.Server):
    """Tells the driver when to drain, and a caller when it listens."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, on_start: Callable[[], None] | None
    ) -> None:
        super().__init__(config)
        self._app = app
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        driver: Driver = self._app.state.driver
        driver.draining = True
        limit = self._app.state.settings.drain_timeout
        timer = asyncio.get_running_loop().call_later(limit, driver.end_all)
        await super().shutdown(sockets)
        timer.cancel()


class _BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with times for slow clients, a limit on connections, and JSON errors."""

    limits: Settings
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            error = unavailable("The server has too many connections.", self.limits.retry_after)
            self._refuse(error)
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self.conn.trailing_data[0] and not self.transport.is_closing():
            self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.pause_writing()  # whoever does not read the end must not keep the connection

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout, self._abort_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "This is not a valid HTTP request.", code="bad_request"))

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.limits.header_timeout, self._slow_head)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _slow_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, "The request took too long.", code="timeout"))

    def _abort_unread(self) -> None:
        self._write_timer = None
        self.transport.abort()

    def _stop_timers(self) -> None:
        self._head_came()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer before there is a request, and close. A request under way only ends."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body))}
            headers |= {"connection": "close", **(error.headers or {})}
            response = h11.Response(status_code=error.status, headers=list(headers.items()))
            for part in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
            self._write_timer = self.loop.call_later(self.limits.write_timeout, self._abort_unread)
        self.transport.close()


def _bounded_protocol(settings: Settings) -> type[H11Protocol]:
    """The class with its limits, since uvicorn makes the objects: one for each connection."""

    class BoundedProtocol(_BoundedProtocol):
        limits = settings

    return BoundedProtocol
