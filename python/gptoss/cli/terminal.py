"""What a terminal may be sent."""

from __future__ import annotations

import os
import sys
from typing import TextIO

_CONTROL = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def printable(text: str, stream: TextIO | None = None) -> str:
    """Text for `stream`, by default stdout: where that is a terminal, control characters are
    U+FFFD. A model may write anything, and a terminal obeys."""
    terminal = (sys.stdout if stream is None else stream).isatty()
    return text.translate(_CONTROL) if terminal else text


def has_styles(stream: TextIO) -> bool:
    """Whether escape sequences do something good there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def dim(text: str, stream: TextIO) -> str:
    """Text in a fainter colour, where there are colours."""
    return f"\x1b[2m{text}\x1b[22m" if has_styles(stream) else text
