"""Ctrl-C at a moment where nothing is lost.

Python runs signal handlers between any two instructions of the main thread, so a KeyboardInterrupt
could fall between the core's step and the place where its tokens are written down, and those of
other threads' generations would be gone. Hence an interrupt is held back, but for the time that the
core computes, when the core undoes what it began.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from .. import _gptoss


class HeldInterrupts:
    """A context in which SIGINT waits for the end. Does nothing outside the main thread, or where
    Python has no handler for SIGINT."""

    def __init__(self) -> None:
        self._previous: object = None
        self._pending: tuple[int, FrameType | None] | None = None
        self._sequence: _gptoss.Sequence | None = None
        self._length = 0

    def __enter__(self) -> HeldInterrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if callable(self._previous):
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)
            if self._pending is not None:
                self._previous(*self._pending)

    def let_through(self, sequence: _gptoss.Sequence | None) -> None:
        """From now on an interrupt counts at once, as long as `sequence` does not grow: once it
        has, the step that feeds it is done and cannot be undone. None: no longer."""
        if sequence is not None:
            self._length = sequence.length
        self._sequence = sequence

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._sequence is not None and self._sequence.length == self._length:
            assert callable(self._previous)
            self._sequence = None  # the next one waits until this one is dealt with
            self._previous(number, frame)
        else:
            self._pending = number, frame
