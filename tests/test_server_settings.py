"""What a server refuses to start with."""

import os
from pathlib import Path

import pytest
from gptoss.server.settings import Settings, is_loopback, read_key_file

KEY = "a-key-that-is-long-enough"


@pytest.mark.parametrize(
    "host, loopback",
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_only_loopback_needs_no_key(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    if loopback:
        Settings(host=host)
    else:
        with pytest.raises(ValueError, match="needs an API key"):
            Settings(host=host)
    Settings(host=host, api_key=KEY)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_name": ""}, "model_name"),
        ({"model_name": "a b"}, "model_name"),
        ({"model_name": "a" * 129}, "model_name"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"api_key": "short"}, "api_key"),
        ({"api_key": "with spaces in between it"}, "api_key"),
        ({"allowed_origins": ("example.org",)}, "example.org"),
        ({"allowed_origins": ("https://example.org/path",)}, "example.org"),
    ],
)
def test_settings_are_checked(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**fields)


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(Settings(api_key=KEY))


def key_file(directory: Path, content: bytes, mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_key_file(tmp_path: Path) -> None:
    assert read_key_file(key_file(tmp_path, KEY.encode() + b"\n")) == KEY
    assert read_key_file(key_file(tmp_path, KEY.encode(), 0o400)) == KEY


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"short\n", b"two words are not a key", b"x" * 600, b"\xff" * 20]
)
def test_key_files_that_hold_no_key(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="16 to 512"):
        read_key_file(key_file(tmp_path, content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_key_files_that_others_can_read(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ValueError, match="chmod 600"):
        read_key_file(key_file(tmp_path, KEY.encode(), mode))


def test_key_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_key_file(tmp_path / "none")
    with pytest.raises(ValueError, match="plain file"):
        read_key_file(os.devnull)
