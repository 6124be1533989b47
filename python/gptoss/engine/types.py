"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..sampling import SamplingParams

if TYPE_CHECKING:  # numpy takes long to import
    import numpy

FinishReason = Literal["stop", "length"]


class QueueFull(RuntimeError):
    """As many requests wait as may: try again later."""


class Constraint(Protocol):
    """What the next token may be, a grammar say. One object serves one generation.

    An exception in either method ends that generation with it, and no other.
    """

    def mask(self) -> numpy.ndarray | None:
        """Tokens that may be drawn next: uint32 [ceil(V / 32)], bit t % 32 of word t // 32 for
        token t; None: any. May be asked more than once before a token is drawn."""
        ...

    def accept(self, token: int) -> None:
        """Take the token that was drawn. Not called for the one that ends the generation."""
        ...


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
    decode token. `reused_tokens` of the prompt were in the prefix cache already: they are not among
    the `prefill_tokens` that were read.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    reused_tokens: int = 0

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
    """A checked prompt: its token ids, how to sample, and what ends it. `Model.request` makes it.

    The lists are not copied: leave them as they are while the request runs.
    """

    tokens: list[int]
    params: SamplingParams
    stop_tokens: frozenset[int]
    max_new_tokens: int
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine was made, but for those that say "now".

    Attributes:
        running: generations that hold cache now.
        waiting: generations that wait for a place now.
        prompt_tokens: of all prompts that were read, reused ones included.
        generated_tokens: tokens drawn.
        prefix_tokens_reused: tokens that came out of the prefix cache instead of being computed.
        preemptions: how often a generation gave its cache to older ones.
        draft_tokens: guesses made by speculation.
        accepted_draft_tokens: those that came true.
        full_pages: pages of the cache for layers that see everything.
        full_pages_in_use: of those, held by sequences now.
        window_pages: pages of the cache for window layers.
        window_pages_in_use: of those, held by sequences now.
        cached_pages: pages that the prefix cache knows now, held by sequences or not.
    """

    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    prefix_tokens_reused: int
    preemptions: int
    draft_tokens: int
    accepted_draft_tokens: int
    full_pages: int
    full_pages_in_use: int
    window_pages: int
    window_pages_in_use: int
    cached_pages: int
