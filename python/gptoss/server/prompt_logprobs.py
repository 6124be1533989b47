"""Log probabilities of a prompt's own tokens: what `echo` with `logprobs` asks for.

This needs the logits of every row of the prompt, which no generation does, so it goes beside the
engine: over a sequence of its own, in small chunks. The core's callers take turns, so generations
go on in between; where pages are short they come first.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from .. import _gptoss
from ..model import Model

_CHUNK = 64  # rows of logits at a time: 51 MB with gpt-oss's vocabulary
_SLICE = 8  # rows whose probabilities are computed at a time
_WAIT = 0.05  # seconds, when the cache has no page free


@dataclass(slots=True)
class PromptScore:
    """For each token of a prompt its log probability, and the likeliest tokens at its place with
    theirs, best first. None and () for the first, which nothing predicts."""

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=lambda: [()])


class PromptScorer:
    """Scores prompts, one at a time, however many ask."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._turn = asyncio.Lock()
        self._sequence: _gptoss.Sequence | None = None  # the engine's thread may take it away
        model.engine.add_guest(self._give_back)

    async def score(self, prompts: Sequence[list[int]], n_top: int) -> list[PromptScore]:
        """Score checked prompts. When cancelled, it stops after at most one chunk."""
        scores = []
        for tokens in prompts:
            async with self._turn:
                stop = threading.Event()
                work = asyncio.create_task(asyncio.to_thread(self._score, tokens, n_top, stop))
                try:
                    scores.append(await asyncio.shield(work))
                finally:  # the next one's turn comes when this one's sequence is closed
                    stop.set()
                    await asyncio.wait({work})
        return scores

    def _score(self, tokens: list[int], n_top: int, stop: threading.Event) -> PromptScore:
        core = self._model.core
        score = PromptScore()
        rows = min(_CHUNK, core.max_batch_tokens, len(tokens) - 1)
        logits = numpy.empty((rows, core.config.vocab_size), numpy.float32)
        try:
            for start in range(0, len(tokens) - 1, max(rows, 1)):
                part = tokens[start : min(start + rows, len(tokens) - 1)]
                out = logits[: len(part)]
                if not self._feed(tokens, start, out, stop):
                    break
                nexts = tokens[start + 1 : start + 1 + len(part)]
                for low in range(0, len(part), _SLICE):
                    _add(score, out[low : low + _SLICE], nexts[low : low + _SLICE], n_top)
        finally:
            self._give_back()
        return score

    def _feed(
        self, tokens: list[int], start: int, logits: numpy.ndarray, stop: threading.Event
    ) -> bool:
        """Logits [n, vocab_size] of the n tokens from `start` on, those before it being in the
        cache, or computed again where that was taken away. False: nobody wants it any more."""
        core = self._model.core
        while not stop.is_set():
            sequence = self._sequence
            try:
                if sequence is None:
                    if core.free_pages()[0] * core.page_tokens < len(tokens):
                        raise _gptoss.CacheFull
                    sequence = self._sequence = core.new_sequence()
                    sequence.reuse(tokens[: start + 1])
                begin = sequence.length
                if begin < start:
                    part = tokens[begin : min(start, begin + len(logits))]
                    core.step([(sequence, part, 0, None)])
                    continue
                core.step([(sequence, tokens[start : start + len(logits)], 2, None)], logits)
                return True
            except _gptoss.CacheFull:
                time.sleep(_WAIT)
            except ValueError:
                if self._sequence is sequence:  # else it was closed
                    raise
        return False

    def _give_back(self) -> bool:
        """Let go of the cache; whether there was any."""
        sequence, self._sequence = self._sequence, None
        if sequence is not None:
            sequence.close()
        return sequence is not None


def _add(score: PromptScore, logits: numpy.ndarray, tokens: list[int], n_top: int) -> None:
    """Score `tokens` by the rows before them; logits float32 [len(tokens), vocab_size]."""
    most = logits.max(axis=1, keepdims=True)
    total = numpy.exp(logits - most).sum(axis=1, dtype=numpy.float64)
    shift = most[:, 0] + numpy.log(total)
    for row, norm, token in zip(logits, shift, tokens, strict=True):
        score.logprobs.append(float(row[token] - norm))
        likeliest: list[int] = []
        if n_top:
            likeliest = numpy.argpartition(row, -n_top)[-n_top:].tolist()
            likeliest.sort(key=lambda other: (-row[other], other))
        score.top.append(tuple([(other, float(row[other] - norm)) for other in likeliest]))
