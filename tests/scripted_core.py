"""A stand-in for the compiled core whose "model" says what a script gives it.

Everything above it is real: engine, sampler, tokenizer, harmony, server. At the end of a prompt the
script is asked for the answer's tokens; each row of logits then has one very likely token, the
answer's next, so that masks, biases, penalties and log probabilities act as they always do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy
from gptoss import _gptoss

Script = Callable[[list[int]], Sequence[int]]

LIKELY = 30.0  # the logit of the next token; all others have 0, but the one of `neighbour`
SECOND = 12.0  # its logit: even at temperature 1 it comes once in 65 million tokens


def neighbour(token: int, vocab_size: int) -> int:
    """The token that comes second, where `token` is the likeliest."""
    return (token + 1) % vocab_size


class ScriptedSequence:
    """The cache of one sequence: its tokens."""

    def __init__(self, core: ScriptedCore) -> None:
        self._core: ScriptedCore | None = core  # None: closed
        self.tokens: list[int] = []
        self.n_prompt: int | None = None  # once the answer has begun
        self.n_pages = 0
        core.sequences.add(self)

    @property
    def closed(self) -> bool:
        return self._core is None

    @property
    def length(self) -> int:
        return len(self.tokens)

    def reuse(self, tokens: Sequence[int]) -> int:
        """Whole pages that some earlier sequence began with."""
        assert not self.tokens and self._core is not None
        page = self._core.page_tokens
        n_pages = 0
        while (n_pages + 1) * page < len(tokens):
            if tuple(tokens[: (n_pages + 1) * page]) not in self._core.known_prefixes:
                break
            n_pages += 1
        self.tokens = list(tokens[: n_pages * page])
        self.n_pages = n_pages
        return self.length

    def truncate(self, length: int) -> None:
        del self.tokens[length:]

    def close(self) -> None:
        core, self._core = self._core, None
        self.n_pages = 0
        if core is not None:
            core.sequences.discard(self)


class ScriptedCore:
    """In place of _gptoss.Core.

    Attributes:
        sequences: those that are open.
        n_steps: steps so far.
        delay: seconds a step takes.
        fail: an exception that the next step raises instead.
    """

    page_tokens = 128
    device = "cpu"

    def __init__(
        self,
        script: Script,
        vocab_size: int,
        *,
        max_context: int = 4096,
        max_sequences: int = 32,
        max_batch_tokens: int = 512,
        n_pages: int = 4096,
        prefix_cache: bool = True,
        delay: float = 0.0,
    ) -> None:
        self.config = _config(vocab_size, max_context)
        self.max_context = max_context
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.full_pages = self.window_pages = n_pages
        self.sequences: set[ScriptedSequence] = set()
        self.known_prefixes: set[tuple[int, ...]] = set()
        self.n_steps = 0
        self.delay = delay
        self.fail: Exception | None = None
        self._prefix_cache = prefix_cache
        self._lock = threading.Lock()
        self.play(script)

    def play(self, script: Script) -> None:
        """Answer by another script from now on."""
        self._script = script
        self._answers: dict[tuple[int, ...], list[int]] = {}  # by prompt

    def new_sequence(self) -> ScriptedSequence:
        return ScriptedSequence(self)

    def free_pages(self) -> tuple[int, int]:
        free = self.full_pages - sum(s.n_pages for s in list(self.sequences))
        return free, free

    def cache_stats(self) -> dict[str, int]:
        used = self.full_pages - self.free_pages()[0]
        return {
            "full_in_use": used,
            "window_in_use": used,
            "cached_pages": 0,
            "prefix_tokens_asked": 0,
            "prefix_tokens_reused": 0,
        }

    def step(
        self, items: Sequence[tuple], logits: numpy.ndarray | None = None
    ) -> list[list[_gptoss.Sample]]:
        if self.delay:
            time.sleep(self.delay)
        with self._lock:
            if self.fail is not None:
                error, self.fail = self.fail, None
                raise error
            assert len({id(item[0]) for item in items}) == len(items)
            assert sum(len(item[1]) for item in items) <= self.max_batch_tokens
            self._take_pages(items)
            self.n_steps += 1
            n_rows = 0
            lengths = [item[0].length for item in items]
            results = []
            for index, (sequence, tokens, want, sampler, *n_drafts) in enumerate(items):
                assert not sequence.closed and not any(n_drafts)
                self._append(sequence, list(tokens))
                if want == 2 and logits is not None:
                    for token in tokens:
                        logits[n_rows] = self.row(neighbour(token, self.config.vocab_size))
                        n_rows += 1
                try:
                    results.append([] if sampler is None else [self._draw(sequence, sampler)])
                except _gptoss.CannotSample as error:
                    error.item = index
                    for (other, *_), length in zip(items, lengths, strict=True):
                        other.truncate(length)
                    raise
            for (_, _, _, sampler, *_), drawn in zip(items, results, strict=True):
                for sample in drawn:
                    sampler.record(sample.token)
            return results

    def row(self, token: int) -> numpy.ndarray:
        """Logits float32 [vocab_size] that make `token` all but certain."""
        row = numpy.zeros(self.config.vocab_size, numpy.float32)
        row[neighbour(token, len(row))] = SECOND
        row[token] = LIKELY
        return row

    def _take_pages(self, items: Sequence[tuple]) -> None:
        wanted = {}
        for sequence, tokens, *_ in items:
            wanted[sequence] = -(-(sequence.length + len(tokens)) // self.page_tokens)
        missing = sum(n - sequence.n_pages for sequence, n in wanted.items())
        if missing > self.free_pages()[0]:
            raise _gptoss.CacheFull(f"{missing} pages are missing")
        for sequence, n in wanted.items():
            sequence.n_pages = n

    def _append(self, sequence: ScriptedSequence, tokens: list[int]) -> None:
        begin = sequence.length
        sequence.tokens += tokens
        if self._prefix_cache:
            page = self.page_tokens
            for end in range((begin // page + 1) * page, sequence.length + 1, page):
                self.known_prefixes.add(tuple(sequence.tokens[:end]))

    def _draw(self, sequence: ScriptedSequence, sampler: _gptoss.Sampler) -> _gptoss.Sample:
        return sampler.sample(self.row(self._next(sequence)), sequence.length)

    def _next(self, sequence: ScriptedSequence) -> int:
        """The token that the script wants next; past its end, the last again."""
        tokens = sequence.tokens
        if sequence.n_prompt is None:
            # One that was preempted comes back with a part of its answer behind its prompt. A next
            # turn begins like that, too, but goes on behind the answer.
            for end in range(len(tokens) - 1, 0, -1):
                answer = self._answers.get(tuple(tokens[:end]))
                if answer is not None and tokens[end:] == answer[: len(tokens) - end]:
                    sequence.n_prompt = end
        if sequence.n_prompt is None:
            sequence.n_prompt = len(tokens)
            self._answers[tuple(tokens)] = list(self._script(list(tokens)))
        answer = self._answers[tuple(tokens[: sequence.n_prompt])]
        return answer[min(len(tokens) - sequence.n_prompt, len(answer) - 1)]


def _config(vocab_size: int, max_context: int) -> _gptoss.Config:
    return _gptoss.Config(
        hidden_size=64,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=64,
        n_experts=4,
        experts_per_token=4,
        intermediate_size=32,
        vocab_size=vocab_size,
        max_context=max_context,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_factor=32.0,
        rope_original_context=4096,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        rope_truncate=False,
        rope_attention_factor=1.3465735902799727,
        swiglu_limit=7.0,
        layer_windows=[128],
    )
