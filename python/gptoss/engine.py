"""Runs requests over the core: prompts in chunks, several sequences at once, each to its end.

One step of the core takes a ragged batch: a chunk of one prompt beside single tokens of other
sequences. The core's result for a sequence does not depend on what else is in the batch, so neither
does anything here.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from . import _gptoss
from .sampling import SamplingParams

if TYPE_CHECKING:  # `tokenizers` is imported only where a checkpoint has a tokenizer
    from .tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural) of a token, and the likeliest tokens at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall time of one generation, from the moment its prompt starts to be read.

    The first new token comes out of the prompt's last chunk, so it counts as neither prompt nor
    decode token.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 if nothing was timed."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """0 if nothing was timed."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One new token.

    Attributes:
        token: its id. A token that ends the generation is reported too.
        text: text that became certain with it: often this token's, sometimes none (half a
            character, or the possible beginning of a stop string) and then more later. Always empty
            without a tokenizer.
        logprob: None unless asked for.
        finish_reason: None but for the last token: "stop" (a stop token or string) or "length".
        stop_reason: the token id or string that ended the generation, if one did.
        timings: with the last token only.
    """

    token: int
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A checked prompt: its token ids, how to sample, and which and how many tokens end it."""

    tokens: list[int]
    params: SamplingParams
    stop_tokens: frozenset[int]
    max_new_tokens: int


class Engine:
    """Runs any number of requests, up to `max_sequences` of one call at the same time.

    Several threads may call `run` at once: their steps take turns in the core.
    """

    def __init__(
        self, core: _gptoss.Core, tokenizer: Tokenizer | None, max_sequences: int = 8
    ) -> None:
        self._core: _gptoss.Core | None = core
        self.tokenizer = tokenizer
        # Every decode fits one step.
        self.max_sequences = min(max_sequences, core.max_batch_tokens, core.max_sequences)

    @property
    def core(self) -> _gptoss.Core:
        """The core; RuntimeError once closed."""
        if self._core is None:
            raise RuntimeError("the model is closed")
        return self._core

    def close(self) -> None:
        """Let go of the core. Iterations under way end with a RuntimeError at their next step."""
        self._core = None

    def run(self, requests: Sequence[Request]) -> Generator[tuple[int, StreamEvent], None, None]:
        """Yield (index of the request, its next token) until all are finished.

        Whatever ends the iteration, closing it included, gives back the cache of every sequence.

        Raises:
            KeyboardInterrupt: Ctrl-C, within a step.
            RuntimeError: closed; the core failed; or this process was forked from the one that made
                it.
        """
        waiting = deque(enumerate(requests))
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.max_sequences:
                    running.append(_Running(self.core, self.tokenizer, *waiting.popleft()))
                batch = self._plan(running)
                samples = self.core.step([job.item(count) for job, count in batch])
                for (job, count), drawn in zip(batch, samples, strict=True):
                    job.fed(count)
                    for sample in drawn:
                        event = job.accept(sample)
                        if event.finish_reason:
                            job.close()
                            running.remove(job)
                        yield job.index, event
        finally:
            for job in running:
                job.close()

    def _plan(self, running: list[_Running]) -> list[tuple[_Running, int]]:
        """Which sequences take part in the next step, and with how many tokens each.

        Single tokens go first, so that a long prompt does not hold up those already writing.
        """
        budget = self.core.max_batch_tokens
        batch = []
        for job in sorted(running, key=lambda job: len(job.pending) > 1):
            count = min(budget, len(job.pending))
            if count:
                batch.append((job, count))
                budget -= count
        return batch


class _Running:
    """One admitted request: its cache, its sampler, and what it has said so far."""

    def __init__(
        self, core: _gptoss.Core, tokenizer: Tokenizer | None, index: int, request: Request
    ) -> None:
        self.index = index
        self.pending = request.tokens  # not in the cache yet
        self._request = request
        self._started = time.perf_counter()
        self._first_token = 0.0  # when it came
        self._n_new = 0
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._stops = _StopStrings(request.params.stop)
        self._sampler = make_sampler(core.config.vocab_size, request.params)
        self._sampler.observe_prompt(request.tokens)
        self._sequence = core.new_sequence()

    def item(self, count: int) -> tuple[_gptoss.Sequence, list[int], int, _gptoss.Sampler | None]:
        """This sequence's part of a step that takes `count` of its pending tokens."""
        last = count == len(self.pending)
        return self._sequence, self.pending[:count], int(last), self._sampler if last else None

    def fed(self, count: int) -> None:
        """The cache now holds `count` more tokens."""
        self.pending = self.pending[count:]

    def accept(self, sample: _gptoss.Sample) -> StreamEvent:
        """Take a new token; decide whether it is the last."""
        now = time.perf_counter()
        self._n_new += 1
        if self._n_new == 1:
            self._first_token = now
        self.pending = [sample.token]

        finish: FinishReason | None = None
        stop_reason: int | str | None = None
        if sample.token in self._request.stop_tokens:
            finish, stop_reason = "stop", sample.token
        elif self._n_new == self._request.max_new_tokens:
            finish = "length"

        text = ""
        if self._detokenizer:
            if stop_reason is None:
                text = self._detokenizer.push(sample.token)
            if finish:
                text += self._detokenizer.flush()
            text, stop = self._stops.push(text)
            if stop is not None and stop_reason is None:
                finish, stop_reason = "stop", stop
            if finish and stop is None:
                text += self._stops.flush()
        return StreamEvent(
            sample.token,
            text,
            self._logprob(sample),
            finish,
            stop_reason,
            self._timings(now) if finish else None,
        )

    def close(self) -> None:
        """Free the cache. Harmless when repeated."""
        self._sequence.close()

    def _logprob(self, sample: _gptoss.Sample) -> TokenLogprob | None:
        if self._request.params.logprobs is None:
            return None
        return TokenLogprob(sample.token, sample.logprob, tuple(sample.top))

    def _timings(self, now: float) -> Timings:
        return Timings(
            prefill_tokens=len(self._request.tokens),
            prefill_seconds=self._first_token - self._started,
            decode_tokens=self._n_new - 1,
            decode_seconds=now - self._first_token,
        )


class _StopStrings:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._matcher = _gptoss.StopMatcher(list(stops)) if stops else None
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return (the text that is safe to show, the stop string found right behind it)."""
        if self._matcher is None:
            return text, None
        safe, hit = self._matcher.push(text)
        self._held = (self._held + text)[len(safe) :]
        if not hit:
            return safe, None
        return safe, min((s for s in self._stops if self._held.startswith(s)), key=len)

    def flush(self) -> str:
        """Text held back that turned out to be no stop string."""
        return self._matcher.flush() if self._matcher else ""


def make_sampler(vocab_size: int, params: SamplingParams) -> _gptoss.Sampler:
    """The core's sampler for these parameters, with a fresh seed if they name none."""
    return _gptoss.Sampler(
        vocab_size,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        logprobs=-1 if params.logprobs is None else params.logprobs,
    )
