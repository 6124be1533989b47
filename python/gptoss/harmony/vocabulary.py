"""openai-harmony, set up with the vocabulary of a checkpoint's own tokenizer.

The library reads its vocabulary from a file, o200k_base.tiktoken, which it otherwise downloads. A
tokenizer.json holds the same tokens: written out by rank they are that file, byte for byte. It is
made once in the user's cache, and the library is told to look there.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding

START_OF_TEXT = 199998  # the first of the special tokens
END_OF_TEXT = 199999
RETURN = 200002
CONSTRAIN = 200003
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
CALL = 200012

_SPECIAL = {
    "<|startoftext|>": START_OF_TEXT,
    "<|endoftext|>": END_OF_TEXT,
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}
_FILE = "o200k_base.tiktoken"
_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_DIRECTORY_VARIABLE = "TIKTOKEN_ENCODINGS_BASE"
_lock = threading.Lock()


def load_encoding(tokenizer: Tokenizer) -> HarmonyEncoding:
    """openai-harmony's encoding, once it is certain that `tokenizer` has the same vocabulary.

    Raises:
        ValueError: it has another one.
        ImportError: openai-harmony is not installed; names the extra.
    """
    try:
        import openai_harmony  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the harmony format needs openai-harmony: pip install 'gptoss[chat]'"
        ) from error
    content = vocabulary_file(tokenizer)
    with _lock:
        return _encoding() if _encoding.cache_info().currsize else _load(content)


def vocabulary_file(tokenizer: Tokenizer) -> bytes:
    """The content of o200k_base.tiktoken: a line "base64 rank" for each token but special ones.

    Raises:
        ValueError: the tokenizer is not gpt-oss's.
    """
    for name, expected in _SPECIAL.items():
        if (token := tokenizer.token_id(name)) != expected:
            raise ValueError(
                f"this checkpoint's tokenizer ({tokenizer.vocab_size} tokens) is not that of "
                f"gpt-oss (o200k_harmony), so it cannot chat: {name} is {token}, not {expected}"
            )
    content = b"".join(
        b"%s %d\n" % (base64.b64encode(tokenizer.token_bytes(token)), token)
        for token in range(START_OF_TEXT)
    )
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise ValueError(
            "this checkpoint's tokenizer is not that of gpt-oss (o200k_harmony), so it cannot "
            "chat: the special tokens are the same, others are not"
        )
    return content


def cache_directory() -> Path:
    """Where the file is kept: $XDG_CACHE_HOME/gptoss, by default ~/.cache/gptoss."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gptoss"


def _load(content: bytes) -> HarmonyEncoding:
    """Load the encoding from the cache, or where no cache can be written from a temporary file."""
    try:
        directory = cache_directory()
        _write(directory / _FILE, content)
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        with tempfile.TemporaryDirectory(prefix="gptoss-") as temporary:
            (Path(temporary) / _FILE).write_bytes(content)
            return _load_from(temporary)
    return _load_from(str(directory))


def _write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, unless it is there already."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _load_from(directory: str) -> HarmonyEncoding:
    """Load with the library pointed at `directory`; the environment is as it was afterwards."""
    before = os.environ.get(_DIRECTORY_VARIABLE)
    os.environ[_DIRECTORY_VARIABLE] = directory
    try:
        return _encoding()
    finally:
        if before is None:
            del os.environ[_DIRECTORY_VARIABLE]
        else:
            os.environ[_DIRECTORY_VARIABLE] = before


@cache
def _encoding() -> HarmonyEncoding:
    """One for the whole process: there is only one vocabulary that the library takes."""
    from openai_harmony import load_harmony_encoding

    return load_harmony_encoding("HarmonyGptOss")
