"""Errors as OpenAI's API has them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer that is no success.

    Attributes:
        status: HTTP status.
        message: for the client: what was wrong with the request, never how this server works.
        kind, code, param: `type`, `code` and `param` of OpenAI's error object.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The JSON object that clients get."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def internal_error() -> ApiError:
    """For whatever goes wrong in here. The log has the rest."""
    return ApiError(500, "The server had an error.", kind="server_error", code="internal_error")


def queue_full(retry_after: int) -> ApiError:
    """As many requests wait as may."""
    return ApiError(
        429,
        "The server has as many requests as it takes. Try again later.",
        kind="rate_limit_error",
        code="queue_full",
        headers={"retry-after": str(retry_after)},
    )


def unavailable(message: str, retry_after: int) -> ApiError:
    """The server cannot take this request now."""
    return ApiError(
        503,
        message,
        kind="server_error",
        code="unavailable",
        headers={"retry-after": str(retry_after)},
    )


def invalid(error: ValidationError) -> ApiError:
    """The first mistake that a request model found."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message = first["msg"].removeprefix("Value error, ")
    param = str(first["loc"][0])[:64] if first["loc"] else None
    return ApiError(400, f"{path[:200]}: {message}" if path else message, param=param)
