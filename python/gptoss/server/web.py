"""The built-in chat page: plain files of this package at / and /page/, nothing from elsewhere.

The page talks to the same HTTP API as any other client and has no rights of its own. What a model
writes reaches it as text nodes only; the policy below holds even if that were to fail: no script,
style, picture or connection but this server's, and no text that becomes markup.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from .errors import ApiError

router = APIRouter()

_TYPES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "conversation.css": "text/css",
    "icon.svg": "image/svg+xml",
    "theme.js": "text/javascript",
    "app.js": "text/javascript",
    "api.js": "text/javascript",
    "markdown.js": "text/javascript",
    "settings.js": "text/javascript",
    "view.js": "text/javascript",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)


@router.get("/")
async def page() -> Response:
    """The page itself."""
    return _file("index.html")


@router.get("/page/{name}")
async def asset(name: str) -> Response:
    """A file the page is made of: one of those above, whatever else the name may be."""
    if name not in _TYPES:
        raise ApiError(404, "There is no such URL.")
    return _file(name)


def _file(name: str) -> Response:
    headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
    return Response(_content(name), media_type=_TYPES[name], headers=headers)


@cache
def _content(name: str) -> bytes:
    return (resources.files(__package__) / "page" / name).read_bytes()
