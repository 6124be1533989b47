"""What every request must pass before it reaches a route, and what is told about it afterwards.

In this order: the size of the headers, Host, Origin, the key, the declared size of the body; then,
while it is read, its size, the time it takes, and what all bodies under way hold together. Every
error is OpenAI's error object; every request has an id and a line in the log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import logging
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, ClientGone, internal_error, unavailable
from .logs import log, log_failure
from .metrics import Metrics
from .settings import Settings

logger = logging.getLogger(__name__)

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_GONE = 499  # the status in log and metrics when the client left without an answer


class Safety:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._held = 0  # bytes of all bodies under way
        self._hosts = {name.lower() for name in (*settings.allowed_hosts, settings.host)}
        self._hosts.add("localhost")
        self._origins = {origin.lower() for origin in settings.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()

    async def handle(self, exchange: _Exchange) -> None:
        """Check the head of a request, then hand it on."""
        headers = Headers(scope=exchange.scope)
        self._check_head(exchange.scope)
        self._check_host(headers)
        self._check_origin(headers)
        if not self._is_preflight(exchange.scope, headers):  # which never carries a key
            self._check_key(headers)
        self._check_length(headers)
        await self._app(exchange.scope, exchange.receive, exchange.send)

    def _check_head(self, scope: Scope) -> None:
        """What came in one piece; the HTTP parser bounds what comes in several."""
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum([len(name) + len(value) + 4 for name, value in scope["headers"]])
        if size > self._settings.max_header_bytes:
            most = self._settings.max_header_bytes
            raise ApiError(431, f"The headers may have {most} bytes.", code="headers_too_large")

    def _check_host(self, headers: Headers) -> None:
        """A name other than ours means that some page's name now points here (DNS rebinding)."""
        values = headers.getlist("host")
        if len(values) != 1 or not self._is_our_host(values[0]):
            raise ApiError(421, "The Host header is not a name of this server.", code="wrong_host")

    def _is_our_host(self, value: str) -> bool:
        name = _host_name(value)
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True

    def _check_origin(self, headers: Headers) -> None:
        """Pages of other origins must not use a visitor's browser to call this server."""
        for origin in headers.getlist("origin"):
            own = origin.lower() in {f"{scheme}://{headers['host']}".lower() for scheme in _SCHEMES}
            if not own and origin.lower() not in self._origins:
                raise ApiError(403, "This origin may not call this server.", code="wrong_origin")

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        return scope["method"] == "OPTIONS" and headers.get("origin", "").lower() in self._origins

    def _check_key(self, headers: Headers) -> None:
        key = self._settings.api_key
        if key is None:
            return
        values = headers.getlist("authorization")
        given = _given_key(values[0]) if len(values) == 1 else None
        if given is None or not hmac.compare_digest(given, key.encode()):
            challenge = "Bearer"
            if "text/html" in headers.get("accept", ""):  # a browser asks for it
                challenge = 'Basic realm="gptoss"'
            raise ApiError(
                401,
                "An API key is needed: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": challenge},
            )

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ApiError(400, "The Content-Length is not a number.")
        if len(length) > 18 or int(length) > self._settings.max_body_bytes:
            raise self.too_large()

    def too_large(self) -> ApiError:
        """The error for a body that is longer than allowed."""
        most = self._settings.max_body_bytes
        return ApiError(413, f"The body may have {most} bytes.", code="body_too_large")

    def hold(self, size: int) -> None:
        """Count bytes of a body as held.

        Raises:
            ApiError: 503: all bodies together would be too much.
        """
        if self._held + size > self._settings.max_held_bytes:
            raise unavailable("The server holds too many requests.", self._settings.retry_after)
        self._held += size

    def release(self, size: int) -> None:
        """The bytes are not held any more."""
        self._held -= size

    @property
    def settings(self) -> Settings:
        """The server's settings."""
        return self._settings

    def finished(self, exchange: _Exchange) -> None:
        """Count and log a request."""
        route = getattr(exchange.scope.get("route"), "path", "none")
        self._metrics.requests.labels(route, str(exchange.status)).inc()
        log(
            logger,
            "request",
            request_id=exchange.id,
            method=exchange.scope["method"] if route != "none" else "",
            route=route,
            status=exchange.status,
            seconds=round(time.perf_counter() - exchange.started, 4),
            **exchange.fields,
        )


class _Exchange:
    """One request and its answer."""

    def __init__(self, safety: Safety, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = f"req_{secrets.token_hex(12)}"
        self.started = time.perf_counter()
        self.status = _GONE
        self.fields: dict[str, Any] = {}  # routes put numbers for the log here
        self.scope = scope
        self._safety = safety
        self._receive = receive
        self._send = send
        self._size = 0
        self._complete = False  # the body has been read
        self._answering = False
        self._deadline = time.monotonic() + safety.settings.body_timeout
        scope.setdefault("state", {})["exchange"] = self

    async def run(self) -> None:
        """Let the request through and answer whatever goes wrong."""
        try:
            await self._safety.handle(self)
        except ClientGone:
            self.status = _GONE
        except ApiError as error:
            await self._answer(error)
        except Exception as error:
            log_failure(logger, "request failed", error, request_id=self.id)
            await self._answer(internal_error())
        finally:
            self._safety.release(self._size)
            self._safety.finished(self)

    async def receive(self) -> Message:
        """The next message of the client; the body must come within its time and size."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "The body took too long.", code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        size = len(message.get("body", b""))
        if self._size + size > self._safety.settings.max_body_bytes:
            raise self._safety.too_large()
        self._safety.hold(size)
        self._size += size
        self._complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self._answering = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            if not self._complete and self.status >= 400:
                headers["connection"] = "close"  # do not read what is left of the body
        await self._send(message)

    async def _answer(self, error: ApiError) -> None:
        if self._answering:  # too late for a status: the connection ends without its last chunk
            raise ClientGone from error
        await error.response()(self.scope, self._receive, self.send)


_SCHEMES = ("http", "https")


def _host_name(value: str) -> str | None:
    """The name or address in a Host header, without its port; None if it is neither."""
    try:
        parts = urlsplit(f"//{value}")
        if parts.port is None and value.endswith(":"):
            return None
    except ValueError:
        return None
    plain = parts.netloc == value and not parts.username and "@" not in value
    return parts.hostname if plain else None


def _given_key(value: str) -> bytes | None:
    """The key in an Authorization header."""
    scheme, _, rest = value.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("latin-1", errors="replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
