"""One request on its way: what it has said so far, and what the engine needs to go on with it."""

from __future__ import annotations

import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Literal

from .. import _gptoss
from ..sampling import SamplingParams
from .drafts import Lookup
from .text import TextStream
from .types import FinishReason, Request, StreamEvent, Timings, TokenLogprob

if TYPE_CHECKING:  # `tokenizers` is imported only where a checkpoint has a tokenizer
    from ..tokenizer import Tokenizer


class Generation:
    """A request that was submitted. Everything but `events` is to be read only.

    Times are of `time.perf_counter()`.

    Attributes:
        request: what was asked for.
        events: its tokens that nobody has taken yet, oldest first; take them with `popleft`.
        tokens: prompt and output so far.
        finish_reason: None until it has ended: "stop", "length", "cancelled", or "error". The last
            two have no last event.
        error: what ended it, where that is "error".
        queued_at: when it was submitted.
        started_at: when its prompt began to be read; None before.
        first_token_at: when its first new token came; None before.
        reused_tokens: how much of the prompt was in the prefix cache.
    """

    # The rest is for the engine: `number` counts submissions; `sequence` is its cache, None while
    # it waits; `n_read` of its tokens are in there while they are read; `item` is its part of a
    # step once that is done.
    __slots__ = (
        "_next",
        "_text",
        "error",
        "events",
        "finish_reason",
        "first_token_at",
        "item",
        "lookup",
        "n_new",
        "n_read",
        "number",
        "queued_at",
        "request",
        "reused_tokens",
        "sampler",
        "sequence",
        "started_at",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        number: int,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        speculate: int,
    ) -> None:
        self.request = request
        self.events: deque[StreamEvent] = deque()
        self.tokens = list(request.tokens)
        self.finish_reason: FinishReason | Literal["cancelled", "error"] | None = None
        self.error: BaseException | None = None
        self.queued_at = time.perf_counter()
        self.started_at: float | None = None
        self.first_token_at: float | None = None
        self.reused_tokens = 0

        self.number = number
        self.n_new = 0
        self.n_read = 0
        self.sequence: _gptoss.Sequence | None = None
        self.item: tuple[object, ...] | None = None
        self.sampler = make_sampler(vocab_size, request.params)
        self.sampler.observe_prompt(request.tokens)
        # A grammar decides on one token at a time, so there is nothing to guess ahead with.
        drafts = speculate and request.constraint is None
        self.lookup = Lookup(request.tokens, speculate) if drafts else None
        self._text = TextStream(tokenizer, request.params.stop) if tokenizer else None
        self._next = [0]  # the token that was drawn last, in a list that steps can be given again

    def start(self, sequence: _gptoss.Sequence) -> None:
        """Give it an empty cache. It will go on where it was, for its sampler remembers."""
        self.sequence = sequence
        self.item = (sequence, self._next, 1, self.sampler)
        self.n_read = 0

    def reuse(self) -> int:
        """Take what the prefix cache has of its tokens into its empty cache; how many these are."""
        assert self.sequence is not None
        self.n_read = self.sequence.reuse(self.tokens)
        if self.n_new == 0:
            self.reused_tokens = self.n_read
        return self.n_read

    def stop(self) -> None:
        """Take its cache away."""
        if self.sequence is not None:
            self.sequence.close()
            self.sequence = None
            self.item = None

    def end(
        self, reason: FinishReason | Literal["cancelled", "error"], error: BaseException | None
    ) -> None:
        """Nothing more will come."""
        self.error = error
        self.finish_reason = reason

    def guess(self, most: int) -> list[int]:
        """Tokens that may come next: as many as may be drawn before the last, at most `most`."""
        assert self.lookup is not None
        return self.lookup.guess(min(most, self.request.max_new_tokens - self.n_new - 1))

    def item_with(self, drafts: list[int]) -> tuple[object, ...]:
        """Its part of a step that tries these guesses."""
        return (self.sequence, [*self._next, *drafts], 1, self.sampler, len(drafts))

    def allow(self) -> None:
        """Ask the constraint what the next token may be."""
        if self.request.constraint is not None:
            self.sampler.allow(self.request.constraint.mask())

    def accept(self, sample: _gptoss.Sample, now: float) -> StreamEvent:
        """Take a new token; decide whether it is the last."""
        token = sample.token
        self.tokens.append(token)
        self._next[0] = token
        self.n_new += 1
        if self.n_new == 1:
            self.first_token_at = now

        request = self.request
        finish: FinishReason | None = None
        stop_reason: int | str | None = None
        if token in request.stop_tokens:
            finish, stop_reason = "stop", token
        elif self.n_new >= request.max_new_tokens:
            finish = "length"

        text = ""
        if self._text is not None:
            stop = None
            if stop_reason is None:
                text, stop = self._text.push(token)
            if finish and stop is None:
                rest, stop = self._text.flush()
                text += rest
            if stop is not None and stop_reason is None:
                finish, stop_reason = "stop", stop

        if finish is None:
            if request.constraint is not None:
                request.constraint.accept(token)
            if self.lookup is not None:
                self.lookup.extend(token)
        logprob = None
        if request.params.logprobs is not None:
            logprob = TokenLogprob(token, sample.logprob, tuple(sample.top))
        timings = self._timings(now) if finish else None
        event = StreamEvent(token, text, logprob, finish, stop_reason, timings)
        self.events.append(event)
        if finish:
            self.end(finish, None)
        return event

    def _timings(self, now: float) -> Timings:
        assert self.started_at is not None and self.first_token_at is not None
        return Timings(
            prefill_tokens=len(self.request.tokens) - self.reused_tokens,
            prefill_seconds=self.first_token_at - self.started_at,
            decode_tokens=self.n_new - 1,
            decode_seconds=now - self.first_token_at,
            reused_tokens=self.reused_tokens,
        )


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
