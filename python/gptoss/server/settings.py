"""What the person who runs the server may set, and its limits."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[\w.\-+:@/]{1,128}", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{16,512}")
_MAX_KEY_FILE = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server. Checked when made: ValueError names the field.

    Attributes:
        model_name: what clients call the model: a label, never a path.
        host, port: where to listen. Any host but a loopback address needs a key.
        api_key: what clients must send, as "Authorization: Bearer KEY" or as the password of HTTP
            Basic (which is what a browser asks for). It covers every route.
        allowed_hosts: names that a request's Host header may have, besides `host`, localhost and IP
            addresses: a web page that a name was rebound for must not reach the server.
        allowed_origins: origins (scheme://host[:port]) of web pages that may call the server,
            besides its own.
        max_body_bytes, max_header_bytes: of one request.
        max_held_bytes: of all request bodies under way together.
        max_json_depth, max_json_values: nesting, and strings, objects and arrays, of a body.
        max_choices: answers of one request: prompts times `n`.
        max_connections: open at once; more are told to come back.
        max_backlog: tokens made and not taken by a client that reads too slowly; past that its
            request ends.
        header_timeout, body_timeout, write_timeout, keep_alive_timeout: seconds for the headers of
            a request, its body, a client that has stopped reading, and between requests.
        drain_timeout: seconds that running requests have when the server shuts down.
        retry_after: seconds, in the header of that name when the queue is full.
    """

    model_name: str = "gpt-oss"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 32 << 10
    max_held_bytes: int = 64 << 20
    max_json_depth: int = 64
    max_json_values: int = 1 << 18
    max_choices: int = 128
    max_connections: int = 1024
    max_backlog: int = 4096
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    keep_alive_timeout: float = 20.0
    drain_timeout: float = 30.0
    retry_after: int = 1

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.model_name):
            raise ValueError(
                "model_name must be 1 to 128 letters, digits or any of _ . - + : @ /, not "
                f"{self.model_name!r}"
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ValueError("api_key must be 16 to 512 printable ASCII characters without spaces")
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host!r} can be reached from other machines: that needs an API key "
                "(--api-key-file)"
            )
        for origin in self.allowed_origins:
            if not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"allowed origin {origin!r} is not like https://example.org")

    def __repr__(self) -> str:
        """Without the key."""
        return f"Settings(model_name={self.model_name!r}, host={self.host!r}, port={self.port})"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_key_file(path: str | os.PathLike[str]) -> str:
    """The API key in a file of one line that only its owner can read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plain file, others may read it, or it holds no usable key.
    """
    path = Path(path)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: an API key file must be a plain file")
        if status.st_mode & 0o077:
            raise ValueError(
                f"{path}: others than its owner have rights on this API key file: chmod 600 it"
            )
        content = file.read(_MAX_KEY_FILE)
    key = content.decode("ascii", errors="replace").strip()
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{path}: an API key must be one line of 16 to 512 printable ASCII characters"
        )
    return key
