"""Guesses at the next tokens, from the sequence's own n-grams.

Prompt lookup decoding (Saxena 2023): where the last few tokens stood before, what followed them may
follow again. The core checks guesses as it checks a prompt, several rows in one step, and keeps
those that it would have drawn itself; so what comes out is the same with and without them.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

_NGRAMS = (3, 2)  # longer ones first: they mislead less


class Lookup:
    """The tokens of one sequence, and what to guess behind them.

    How many guesses it makes follows how the last ones fared, between 1 and `most`: twice as many
    after all came true, half as many after none did.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        self._history = bytearray(array("i", tokens).tobytes())  # of int32: searched as bytes
        self._most = most
        self._length = min(2, most)

    def extend(self, token: int) -> None:
        """One more token of the sequence."""
        self._history += token.to_bytes(4, sys.byteorder)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; none if the last n-grams are new."""
        wanted = min(most, self._length)
        if wanted < 1:
            return []
        history = self._history
        for n in _NGRAMS:
            begin = len(history) - 4 * n
            if begin <= 0:
                continue
            found = self._find(bytes(history[begin:]), begin)
            if found < 0:
                continue
            # What followed it there. Where that runs into the end it is a loop: it goes round.
            tokens = array("i", bytes(history[found + 4 * n : found + 4 * (n + wanted)])).tolist()
            return (tokens * (1 + wanted // len(tokens)))[:wanted]
        return []

    def learn(self, n_guessed: int, n_true: int) -> None:
        """How many of the last guesses came true."""
        if n_true == n_guessed:
            self._length = min(self._most, 2 * self._length)
        elif n_true == 0:
            self._length = max(1, self._length // 2)

    def _find(self, ngram: bytes, end: int) -> int:
        """Where the n-gram last began before the byte `end`, or -1."""
        last = end + len(ngram) - 4  # it may overlap the one at the end
        while True:
            found = self._history.rfind(ngram, 0, last)
            if found < 0 or found % 4 == 0:
                return found
            last = found + len(ngram) - 1  # not at the beginning of a token
