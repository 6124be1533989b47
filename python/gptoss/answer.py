"""One answer of a chat in the making: tokens in, what a client is shown out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from . import _gptoss
from .engine import StreamEvent, TokenLogprob
from .harmony import Delta, StreamParser
from .harmony.vocabulary import START_OF_TEXT


@dataclass(slots=True)
class Piece:
    """What a client is shown next, and the log probabilities of the tokens it came from."""

    delta: Delta
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Answer:
    """Takes the tokens of one generation. Parsed as harmony; ended by stop strings in its content.

    Attributes:
        finish_reason: None until it ends: "stop", "length" or "tool_calls".
        stopped: a stop string came: cancel the generation.
        n_tokens, n_reasoning_tokens: taken so far; those of the channel "analysis" among them.
    """

    def __init__(self, parser: StreamParser, stop: Sequence[str] = ()) -> None:
        self.finish_reason: Literal["stop", "length", "tool_calls"] | None = None
        self.stopped = False
        self.n_tokens = 0
        self.n_reasoning_tokens = 0
        self.n_calls = 0
        self._parser = parser
        self._matcher = _gptoss.StopMatcher(list(stop)) if stop else None
        self._pending: list[StreamEvent] = []  # plain tokens that have shown nothing yet

    def push(self, events: Sequence[StreamEvent]) -> list[Piece]:
        """Take new tokens, the last ones included; return what they show, in order."""
        pieces: list[Piece] = []
        for event in events:
            if self.stopped:
                break
            self.n_tokens += 1
            logprobs = self._logprobs(event, deltas := self._parser.push(event.token))
            self._add(pieces, deltas, logprobs)
            if event.finish_reason is not None and not self.stopped:
                self._add(pieces, self._parser.finish(), [])
                self._finish(pieces, event.finish_reason)
        return pieces

    def _logprobs(self, event: StreamEvent, deltas: list[Delta]) -> list[TokenLogprob]:
        """Of the tokens that `deltas` came from, if they are content. A character of several
        tokens, or an answer without a header, shows only with the last of them."""
        if event.token >= START_OF_TEXT:
            self._pending.clear()
            return []
        self._pending.append(event)
        if not deltas:
            return []
        shown, self._pending = self._pending, []
        if deltas[-1].kind == "reasoning":
            self.n_reasoning_tokens += len(shown)
        if deltas[-1].kind != "content":
            return []
        return [each.logprob for each in shown if each.logprob is not None]

    def _add(self, pieces: list[Piece], deltas: list[Delta], logprobs: list[TokenLogprob]) -> None:
        for delta in deltas:
            if delta.kind == "content" and self._matcher is not None:
                text, self.stopped = self._matcher.push(delta.text)
                delta = replace(delta, text=text)
            elif delta.kind != "content":
                self._flush(pieces)
            if delta.name is not None:
                self.n_calls += 1
            _append(pieces, delta, logprobs if delta.kind == "content" else [])
            if self.stopped:
                self.finish_reason = "stop"
                return

    def _flush(self, pieces: list[Piece]) -> None:
        """The content is over: what might have been a stop string is none."""
        if self._matcher is not None:
            _append(pieces, Delta("content", self._matcher.flush()), [])

    def _finish(self, pieces: list[Piece], reason: Literal["stop", "length"]) -> None:
        self._flush(pieces)
        self.finish_reason = "tool_calls" if reason == "stop" and self.n_calls else reason


def _append(pieces: list[Piece], delta: Delta, logprobs: list[TokenLogprob]) -> None:
    """Add a delta, joined to the one before where they are of a kind."""
    if not delta.text and not logprobs and delta.name is None:
        return
    last = pieces[-1].delta if pieces else None
    joins = last is not None and delta.name is None and last.name is None
    if joins and (last.kind, last.index) == (delta.kind, delta.index):
        pieces[-1].delta = replace(last, text=last.text + delta.text)
        pieces[-1].logprobs += logprobs
    else:
        pieces.append(Piece(delta, list(logprobs)))
