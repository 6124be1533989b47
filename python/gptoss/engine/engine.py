"""Continuous batching: many requests over one core, joining and leaving between its steps.

The core's result for a sequence does not depend on what else is in a step, so neither does anything
here: a request's tokens are those it would get alone.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import TYPE_CHECKING

from .. import _gptoss
from .generation import Generation
from .interrupts import HeldInterrupts
from .schedule import Schedule
from .types import EngineStats, QueueFull, Request, StreamEvent

if TYPE_CHECKING:  # `tokenizers` is imported only where a checkpoint has a tokenizer
    from ..tokenizer import Tokenizer

Events = list[tuple[Generation, StreamEvent]]


class Engine:
    """Runs generations together. Any thread may call any method.

    It has no thread of its own. A step is made by whoever calls `step`, `wait` or `run`, for all
    generations; the others wait for it.

    Attributes:
        tokenizer: makes the text of events; None: they have none.
        max_sequences: most generations at a time.
        max_tokens: most tokens of prompt and answer together, by context and cache.
        max_waiting: most that may be in line besides; None: any number. May be changed.
    """

    def __init__(
        self,
        core: _gptoss.Core,
        tokenizer: Tokenizer | None,
        *,
        max_sequences: int | None = None,
        max_waiting: int | None = None,
        speculate: int = 0,
    ) -> None:
        """Take over the core's cache.

        Args:
            core: loaded.
            tokenizer: of its vocabulary.
            max_sequences: None for as many as the core takes.
            max_waiting: see above.
            speculate: most tokens to guess ahead for each sequence (docs/python.md); 0 is off.

        Raises:
            ValueError: a number is too small.
        """
        for name, value, least in (
            ("max_sequences", max_sequences, 1),
            ("max_waiting", max_waiting, 0),
            ("speculate", speculate, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        # A token of every generation fits one step.
        most = min(core.max_batch_tokens, core.max_sequences)
        self.tokenizer = tokenizer
        self.max_sequences = most if max_sequences is None else min(max_sequences, most)
        self.max_waiting = max_waiting
        self.max_tokens = min(core.max_context, core.full_pages * core.page_tokens)
        self._core: _gptoss.Core | None = core
        self._vocab_size = core.config.vocab_size
        self._speculate = speculate
        self._process = os.getpid()
        self._numbers = itertools.count()
        # Guards all that follows, never while the core computes; reentrant for signal handlers.
        self._lock = threading.RLock()
        self._schedule = Schedule(core, self.max_sequences)
        self._stepping = False
        self._ended: list[Generation] = []  # while a step that may hold their sequences runs
        self._guests: list[Callable[[], bool]] = []
        self._sleepers: list[threading.Lock] = []  # each taken: released when the step is over
        self._work = threading.Event()  # set while something runs or waits, and once closed

    @property
    def core(self) -> _gptoss.Core:
        """The core; RuntimeError once closed."""
        if self._core is None:
            raise RuntimeError("the model is closed")
        return self._core

    def close(self) -> None:
        """Let go of the core. What runs or waits ends with a RuntimeError, after the step that is
        under way if there is one."""
        if os.getpid() != self._process:  # who holds the lock is in the parent
            self._core = None
            return
        with HeldInterrupts(), self._lock:
            if self._core is None:
                return
            self._core = None
            if not self._stepping:
                self._end_all_closed()
            self._work.set()

    def check_room(self, n_prompt: int, max_new_tokens: int) -> None:
        """ValueError if a prompt of so many tokens could not run to its end even alone."""
        if n_prompt + max_new_tokens > self.max_tokens:
            whole = self.max_tokens == self.core.max_context
            raise ValueError(
                f"a prompt of {n_prompt} tokens and {max_new_tokens} new ones are more than "
                + (f"max_context {self.max_tokens}" if whole else "")
                + ("" if whole else f"the {self.max_tokens} tokens that the cache has room for")
            )

    def add_guest(self, give_back: Callable[[], bool]) -> None:
        """Name somebody who uses the core beside the engine, over sequences of its own.

        Where the only generation that runs finds too few pages, `give_back` is called, in whatever
        thread: it closes those sequences and says whether there were any. It may call the core, not
        wait for a step of the engine.
        """
        with HeldInterrupts(), self._lock:
            self._guests.append(give_back)

    def submit(self, request: Request) -> Generation:
        """Put a request in line. It starts with one of the next steps.

        Raises:
            ValueError: it could not run to its end even alone.
            QueueFull: `max_sequences` and `max_waiting` together are in line already.
            RuntimeError: closed, or this process was forked from the one that made the engine.
        """
        generation = self._generation(request)
        self._enqueue(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a generation. No event comes any more, and its cache is free at once, or when the
        step under way is over. Harmless when it has ended."""
        if os.getpid() != self._process:  # its cache is the parent's, as is who holds the lock
            return
        with HeldInterrupts(), self._lock:
            if generation.finish_reason is not None:
                return
            generation.end("cancelled", None)
            if self._stepping:
                self._ended.append(generation)
            else:
                self._schedule.release(generation)

    def step(self) -> Events:
        """Make one step for all, after the one under way if there is one.

        Returns:
            What was drawn, also appended to each generation's `events`. Empty where prompts were
            read only, or where there was nothing to do.

        Raises:
            KeyboardInterrupt: Ctrl-C, in the main thread. The step is undone, or its events are
                where they belong; everything can go on.
            RuntimeError: closed; forked; or the core failed: the generations that ran have ended
                with that error then, those that wait can go on. What concerns one generation alone
                (nothing can be drawn from its logits) ends that one and is not raised.
        """
        while True:
            if (events := self._take_turn(lambda: False)) is not None:
                return events

    def wait(self, generations: Collection[Generation]) -> None:
        """Make steps, or wait for those of other threads, until one of these has an event or has
        ended.

        Raises:
            BaseException: the error that one of them ended with and that has no events left.
            KeyboardInterrupt: as `step`.
        """

        def ready() -> bool:
            return any(g.events or g.finish_reason is not None for g in generations)

        while generations and not ready():
            try:
                self._take_turn(ready)
            except Exception:
                if self._core is None or os.getpid() != self._process:
                    raise
                # Otherwise it is for those whom it ended, which may be none of these.
        if not any(generation.events for generation in generations):
            for generation in generations:
                if generation.error is not None:
                    raise generation.error

    def run(self, requests: Sequence[Request]) -> Generator[tuple[int, StreamEvent], None, None]:
        """Yield (index of the request, its next token) until all are finished.

        No more than `max_sequences` of them are in line at a time, so that those of other callers
        get their turn. Whatever ends the iteration, closing it included, cancels the rest.

        Raises:
            Exception: as `submit` and `wait`.
        """
        waiting = deque(enumerate(requests))
        mine: dict[Generation, int] = {}
        try:
            while waiting or mine:
                while waiting and len(mine) < self.max_sequences:
                    index, request = waiting.popleft()
                    generation = self._generation(request)
                    mine[generation] = index  # first, so that an interrupt leaves none behind
                    self._enqueue(generation)
                self.wait(mine)
                for generation, index in list(mine.items()):
                    while generation.events:
                        yield index, generation.events.popleft()
                    if generation.finish_reason is not None and generation.error is None:
                        del mine[generation]
        finally:
            for generation in mine:
                self.cancel(generation)

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Sleep until there is something for `step` to do, or the engine is closed; at most
        `timeout` seconds. Whether there is."""
        return self._work.wait(timeout)

    def stats(self) -> EngineStats:
        """Counts, for monitoring. RuntimeError as `submit`."""
        self._check_usable()
        core = self.core
        pages = core.cache_stats()
        with HeldInterrupts(), self._lock:
            schedule = self._schedule
            return EngineStats(
                running=len(schedule.running()),
                waiting=len(schedule.waiting),
                prompt_tokens=schedule.prompt_tokens,
                generated_tokens=schedule.generated_tokens,
                prefix_tokens_reused=schedule.reused_tokens,
                preemptions=schedule.preemptions,
                draft_tokens=schedule.draft_tokens,
                accepted_draft_tokens=schedule.accepted_draft_tokens,
                full_pages=core.full_pages,
                full_pages_in_use=pages["full_in_use"],
                window_pages=core.window_pages,
                window_pages_in_use=pages["window_in_use"],
                cached_pages=pages["cached_pages"],
            )

    def _generation(self, request: Request) -> Generation:
        self._check_usable()
        self.check_room(len(request.tokens), request.max_new_tokens)
        return Generation(
            request, next(self._numbers), self.tokenizer, self._vocab_size, self._speculate
        )

    def _enqueue(self, generation: Generation) -> None:
        with HeldInterrupts(), self._lock:
            self._check_usable()
            schedule = self._schedule
            in_line = len(schedule.running()) + len(schedule.waiting)
            if self.max_waiting is not None and in_line >= self.max_sequences + self.max_waiting:
                raise QueueFull(f"{in_line} requests run or wait already, which is the most")
            schedule.waiting.append(generation)
            self._work.set()

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "this model was loaded before a fork, and its threads are in the parent process "
                "only: load it again in the child"
            )
        _ = self.core

    def _take_turn(self, ready: Callable[[], bool]) -> Events | None:
        """Make one step, or wait for the end of another thread's; nothing if ready() by now.

        None, or what a step of this thread gave.
        """
        sleeper = None
        self._check_usable()
        with HeldInterrupts() as interrupts:
            with self._lock:
                if ready():
                    return None
                if self._stepping:
                    sleeper = threading.Lock()
                    sleeper.acquire()
                    self._sleepers.append(sleeper)
                else:
                    self._stepping = True
            if sleeper is None:
                try:
                    return self._step(interrupts)
                finally:
                    self._end_turn()
        sleeper.acquire()  # outside: Ctrl-C may end this wait
        return None

    def _end_turn(self) -> None:
        with self._lock:
            self._stepping = False
            self._release_ended()
            if self._core is None:
                self._end_all_closed()
            elif not (self._schedule.waiting or self._schedule.running()):
                self._work.clear()
            sleepers, self._sleepers = self._sleepers, []
        for sleeper in sleepers:
            sleeper.release()

    def _step(self, interrupts: HeldInterrupts) -> Events:
        # No variable holds the core: an error keeps the variables of the frames that it passed.
        with_drafts = self._speculate > 0
        undone = False
        try:
            while True:
                with self._lock:
                    plan = self._schedule.plan(self.core, with_drafts)
                if not plan.items:
                    return []
                sequence = plan.items[0][0]
                length = sequence.length
                interrupts.let_through(sequence)
                try:
                    samples = self.core.step(plan.items)
                except _gptoss.CacheFull:
                    with self._lock:
                        if plan.drafts:
                            with_drafts = False
                        elif not self._make_room():
                            raise
                    continue
                except _gptoss.CannotSample as error:  # one of them; the others go on without it
                    with self._lock:
                        self._schedule.fail(plan.generation(error.item), error)
                    continue
                except BaseException as error:  # Ctrl-C, or what another signal's handler raised
                    undone = not isinstance(error, Exception) and sequence.length == length
                    raise
                finally:
                    interrupts.let_through(None)
                with self._lock:
                    return self._schedule.accept(plan, samples, time.perf_counter())
        except BaseException as error:
            if not undone:
                with self._lock:
                    for generation in self._schedule.running():
                        self._schedule.fail(generation, error)
            raise

    def _make_room(self) -> bool:
        """Take the pages of what has ended, else of the youngest, else of guests; whether there
        were any."""
        if self._release_ended() or self._schedule.preempt():
            return True
        return any([give_back() for give_back in self._guests])

    def _release_ended(self) -> bool:
        """Free what ended while the core was computing; whether there was any."""
        ended, self._ended = self._ended, []
        for generation in ended:
            self._schedule.release(generation)
        return bool(ended)

    def _end_all_closed(self) -> None:
        for generation in [*self._schedule.running(), *self._schedule.waiting]:
            self._schedule.fail(generation, RuntimeError("the model is closed"))
