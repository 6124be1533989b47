"""Text to token ids and back, over a checkpoint's tokenizer.json.

gpt-oss uses a byte-level BPE: every token stands for a string of bytes, and one character may be
spread over several tokens. Text is therefore put together from bytes, so that a stream never shows
half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Protocol

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@cache
def byte_of_character() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: which byte each character of a token's name stands for.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


class Detokenizer(Protocol):
    """Turns a stream of token ids into text, holding back characters that are not complete yet."""

    def push(self, token: int) -> str:
        """Add one token; return the text that is now certain (possibly empty)."""
        ...

    def flush(self) -> str:
        """Return what is still held; bytes that never became a character are U+FFFD."""
        ...


class Tokenizer:
    """A tokenizer.json. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Text is only ever text: "<|start|>" in a prompt must not become the control token. The
        # first line marks every added token as special, the second makes encode() skip special
        # tokens in its input.
        backend.add_special_tokens(list(backend.get_added_tokens_decoder().values()))
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added = {id: t.content for id, t in backend.get_added_tokens_decoder().items()}
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for
        self._byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a tokenizer.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from error
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that have a meaning, the special ones included."""
        return self._backend.get_vocab_size()

    @property
    def max_id(self) -> int:
        """The largest token id that has a meaning."""
        return max(self._backend.get_vocab().values())

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that are no text, such as <|return|>."""
        return frozenset(self._added)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. Nothing is added, and no text becomes a special token.

        Raises:
            ValueError: the text holds a lone surrogate, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error}") from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; special tokens appear by name, ids without a token as nothing.

        Bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative or above 2**32 - 1.
        """
        stream = self.detokenizer()
        try:
            return "".join([stream.push(token) for token in tokens]) + stream.flush()
        except OverflowError:
            raise ValueError("token ids must be from 0 to 2**32 - 1") from None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<|return|>"; None if there is none."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token of a byte-level tokenizer stands for (a special token: its name)."""
        found = self._bytes.get(token)
        if found is None:
            found = self._spelled(token)
            if found:  # else it may be any number
                self._bytes[token] = found
        return found

    def _spelled(self, token: int) -> bytes:
        name = self._added.get(token)
        if name is not None:
            return name.encode()
        name = self._backend.id_to_token(token) or ""
        table = byte_of_character()
        return b"".join([bytes((table[c],)) if c in table else c.encode() for c in name])

    def detokenizer(self) -> Detokenizer:
        """A fresh stream decoder."""
        return _ByteDetokenizer(self) if self._byte_level else _PrefixDetokenizer(self._backend)


class _ByteDetokenizer:
    """For byte-level tokenizers: joins the tokens' bytes and decodes them as UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._bytes_of(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _PrefixDetokenizer:
    """For any other tokenizer: the text a token adds is how much longer the decoded text becomes.

    Decoding starts a few tokens back, not at the beginning, so each push costs the same.
    """

    _MAX_HELD = 8  # tokens; a character never spreads over more

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._shown: list[int] = []  # tokens whose text is out, kept as context for the next
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held) < self._MAX_HELD:
            return ""
        if text:
            self._shown = self._held
        self._held = []
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._shown, self._held = [], []
        return text

    def _new_text(self) -> str:
        before = self._backend.decode(self._shown, skip_special_tokens=False)
        return self._backend.decode(self._shown + self._held, skip_special_tokens=False)[
            len(before) :
        ]
