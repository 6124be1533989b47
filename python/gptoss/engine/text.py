"""The text of a generation: tokens to characters, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import _gptoss

if TYPE_CHECKING:  # `tokenizers` is imported only where a checkpoint has a tokenizer
    from ..tokenizer import Tokenizer


class TextStream:
    """Text that is certain, token by token: no half characters, no beginnings of stop strings."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stops = stops
        self._matcher = _gptoss.StopMatcher(list(stops)) if stops else None
        self._held = ""  # by the matcher

    def push(self, token: int) -> tuple[str, str | None]:
        """Return (the text that is safe to show, the stop string found right behind it)."""
        text = self._detokenizer.push(token)
        return (text, None) if self._matcher is None else self._match(text)

    def flush(self) -> tuple[str, str | None]:
        """When no more comes: what is still held back, and the stop string that it ends at."""
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text, None
        text, stop = self._match(text)
        return (text, stop) if stop else (text + self._matcher.flush(), None)

    def _match(self, text: str) -> tuple[str, str | None]:
        assert self._matcher is not None
        safe, hit = self._matcher.push(text)
        self._held = (self._held + text)[len(safe) :]
        if not hit:
            return safe, None
        return safe, min((s for s in self._stops if self._held.startswith(s)), key=len)
