"""From the bytes of a request to a checked request model."""

from __future__ import annotations

import json
import re
from typing import Any, Never, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from .errors import ApiError, invalid
from .schemas import Body
from .settings import Settings

# A string (or what is left of one), or a bracket. Possessive, so that no input is read twice.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

AnyBody = TypeVar("AnyBody", bound=Body)


async def read_request(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Read and check the body of a request, which may name no model but the one that is served.

    Sizes and times of the raw body are the middleware's business (safety.py).

    Raises:
        ApiError: 400, naming the field; 404 for another model; 415 if it is not declared as JSON.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(415, "The content type must be application/json.")
    body = parse(await request.body(), kind, request.app.state.settings)
    request.app.state.served.check_name(body.model)
    return body


def parse(data: bytes, kind: type[AnyBody], settings: Settings) -> AnyBody:
    """Check `data` as a JSON object with the fields of `kind`.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _parse_object(data, settings)
    known = {field.alias or name for name, field in kind.model_fields.items()}
    for name in fields:
        if name not in known:
            raise ApiError(
                400,
                f"Unknown parameter: {name[:64]!r}.",
                code="unknown_parameter",
                param=name[:64],
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from None


def _parse_object(data: bytes, settings: Settings) -> dict[str, Any]:
    _check_shape(data, settings)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _bad_json("it is not valid UTF-8") from None
    except (ValueError, RecursionError):  # of numbers with too many digits, too
        raise _bad_json("it does not parse") from None
    if not isinstance(value, dict):
        raise _bad_json("it must be an object")
    if _SURROGATE.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _bad_json("it holds half a surrogate pair") from None
    return value


def _check_shape(data: bytes, settings: Settings) -> None:
    """Bound what parsing will take, before it takes it."""
    depth = 0
    for count, match in enumerate(_TOKEN.finditer(data)):
        if count >= settings.max_json_values:
            raise _bad_json(f"it has more than {settings.max_json_values} parts")
        first = data[match.start()]
        if first in b"[{":
            depth += 1
            if depth > settings.max_json_depth:
                raise _bad_json(f"it is nested deeper than {settings.max_json_depth}")
        elif first in b"]}":
            depth -= 1


def _no_constant(name: str) -> Never:
    raise ValueError(f"{name} is not JSON")


def _bad_json(why: str) -> ApiError:
    return ApiError(400, f"The body is not a usable JSON object: {why}.", code="invalid_json")
