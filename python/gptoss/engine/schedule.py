"""Who takes part in the next step, and with how many tokens.

A generation waits, then reads its prompt, then writes: every step takes one token and gives the
next. Nothing here knows of threads; `Engine` calls it under its lock.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .. import _gptoss
from .generation import Generation
from .types import StreamEvent

# Tokens of prompts in a step that also writes. A step's time on a CPU grows with its tokens, so
# this is a compromise between the pace of those that write and how soon a prompt is read; measured
# in docs/architecture.md. A card reads hundreds of tokens in little more than the time of one.
_CPU_CHUNK = 32
# Rows of a step up to which guesses are worth their time: below, the step waits for memory, and
# more rows share what is read; above, it computes, and wrong guesses cost as much as right ones.
_DRAFT_ROWS = 16
MAX_DRAFTS = _DRAFT_ROWS - 1  # of one sequence


@dataclass(slots=True)
class Plan:
    """One step: the core's items, and whose they are in the same order: writers, then readers."""

    items: list[tuple[Any, ...]] = field(default_factory=list)
    writers: list[Generation] = field(default_factory=list)
    drafts: dict[Generation, int] = field(default_factory=dict)  # how many, of those with any
    readers: list[tuple[Generation, int]] = field(default_factory=list)  # and tokens of each

    def generation(self, item: int) -> Generation:
        """Whose item that is."""
        n_writers = len(self.writers)
        return self.writers[item] if item < n_writers else self.readers[item - n_writers][0]


class Schedule:
    """The generations of an engine, by what they do.

    Attributes:
        waiting: without cache. They are admitted in this order, never past one another.
        reading: whose tokens are not all in the cache, in the order of their admission.
        writing: which draw a token in each step.
    """

    def __init__(self, core: _gptoss.Core, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._step_tokens = core.max_batch_tokens
        self._busy_chunk = _CPU_CHUNK if core.device == "cpu" else core.max_batch_tokens
        self._page_tokens = core.page_tokens
        self._refused = False  # the first in line did not fit, and nothing was freed since
        self.waiting: deque[Generation] = deque()
        self.reading: list[Generation] = []
        self.writing: list[Generation] = []
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.reused_tokens = 0
        self.preemptions = 0
        self.draft_tokens = 0
        self.accepted_draft_tokens = 0

    def running(self) -> list[Generation]:
        """Those that hold cache."""
        return self.writing + self.reading

    def plan(self, core: _gptoss.Core, with_drafts: bool) -> Plan:
        """Admit whom there is room for, and divide the next step's tokens: first one for each that
        writes, then the prompts', the oldest first."""
        if self.waiting:
            self._admit(core)
        plan = Plan()
        if self.writing:
            self._plan_writers(plan, with_drafts)
        if self.reading:
            self._plan_readers(plan)
        return plan

    def accept(
        self, plan: Plan, samples: list[list[_gptoss.Sample]], now: float
    ) -> list[tuple[Generation, StreamEvent]]:
        """Take what a step drew. Those that ended while it ran get nothing."""
        events: list[tuple[Generation, StreamEvent]] = []
        for generation, drawn in zip(plan.writers, samples, strict=False):
            self._take(generation, drawn, now, events)
        for generation, n_guessed in plan.drafts.items():
            n_true = len(samples[plan.writers.index(generation)]) - 1
            self.draft_tokens += n_guessed
            self.accepted_draft_tokens += n_true
            assert generation.lookup is not None
            generation.lookup.learn(n_guessed, n_true)
        for (generation, count), drawn in zip(
            plan.readers, samples[len(plan.writers) :], strict=True
        ):
            generation.n_read += count
            if drawn:
                if generation.n_new == 0:
                    self.prompt_tokens += len(generation.request.tokens)
                self.reading.remove(generation)
                self.writing.append(generation)
                self._take(generation, drawn, now, events)
        self.generated_tokens += len(events)
        return events

    def release(self, generation: Generation) -> None:
        """Take it out of everything. Harmless when it is nowhere."""
        for place in (self.writing, self.reading, self.waiting):
            if generation in place:
                place.remove(generation)
                break
        generation.stop()
        self._refused = False

    def fail(self, generation: Generation, error: BaseException) -> None:
        """End it with an error."""
        if generation.finish_reason is None:
            traceback.clear_frames(error.__traceback__)  # what they held must not stay with it
            generation.end("error", error)
        self.release(generation)

    def preempt(self) -> bool:
        """Where pages are short: the youngest gives its cache to the others, and is the first to
        come back; its tokens are then read again like a prompt. False if it is the only one."""
        running = self.running()
        if len(running) < 2:
            return False
        youngest = max(running, key=lambda generation: generation.number)
        self.release(youngest)
        self._refused = True  # until another lets go: what it gave is for those that go on
        self.waiting.appendleft(youngest)
        self.preemptions += 1
        return True

    def _admit(self, core: _gptoss.Core) -> None:
        while self.waiting and not self._refused:
            if len(self.writing) + len(self.reading) == self._max_sequences:
                return
            generation = self.waiting[0]
            generation.start(core.new_sequence())
            n_reused = generation.reuse()
            if not self._fits(core, generation):
                generation.stop()
                self._refused = True
                return
            self.waiting.popleft()
            self.reading.append(generation)
            self.reused_tokens += n_reused

    def _fits(self, core: _gptoss.Core, generation: Generation) -> bool:
        """Whether its tokens and the next fit, beside what the prompts before it will take and a
        page more for each that runs: else it would soon be sent away again.

        The window layers have room for `max_sequences` by their plan. Where nothing runs there is
        nobody to wait for.
        """
        n_running = len(self.writing) + len(self.reading)
        if n_running == 0:
            return True
        needed = n_running + sum(self._pages_to_come(other) for other in self.reading)
        n_free, _ = core.free_pages()
        return needed + self._pages_to_come(generation) <= n_free

    def _pages_to_come(self, generation: Generation) -> int:
        page = self._page_tokens
        return -(-(len(generation.tokens) + 1) // page) - -(-generation.n_read // page)

    def _plan_writers(self, plan: Plan, with_drafts: bool) -> None:
        items, writers = plan.items, plan.writers
        most = 0
        if with_drafts:
            rows = min(_DRAFT_ROWS, self._step_tokens - len(self.reading))
            most = rows // len(self.writing) - 1
        for generation in self.writing.copy():
            if generation.request.constraint is not None and not self._allow(generation):
                continue
            writers.append(generation)
            if most > 0 and generation.lookup is not None:
                drafts = generation.guess(most)
                if drafts:
                    plan.drafts[generation] = len(drafts)
                    items.append(generation.item_with(drafts))
                    continue
            items.append(generation.item)

    def _plan_readers(self, plan: Plan) -> None:
        budget = self._step_tokens - len(plan.items) - sum(plan.drafts.values())
        if plan.items:
            budget = min(budget, self._busy_chunk)
        for generation in self.reading.copy():
            if budget == 0:
                break
            if generation.n_read == 0:  # another may have read the same beginning meanwhile
                self.reused_tokens += generation.reuse()
            if generation.started_at is None:
                generation.started_at = time.perf_counter()
            begin, n_tokens = generation.n_read, len(generation.tokens)
            count = min(budget, n_tokens - begin)
            last = begin + count == n_tokens
            if last and generation.request.constraint is not None and not self._allow(generation):
                continue
            sampler = generation.sampler if last else None
            chunk = generation.tokens[begin : begin + count]
            plan.items.append((generation.sequence, chunk, int(last), sampler))
            plan.readers.append((generation, count))
            budget -= count

    def _allow(self, generation: Generation) -> bool:
        """Ask its constraint what may come; False if that failed, and with it the generation."""
        try:
            generation.allow()
        except Exception as error:
            self.fail(generation, error)
            return False
        return True

    def _take(
        self,
        generation: Generation,
        drawn: list[_gptoss.Sample],
        now: float,
        events: list[tuple[Generation, StreamEvent]],
    ) -> None:
        for sample in drawn:
            if generation.finish_reason is not None:
                return
            try:
                event = generation.accept(sample, now)
            except Exception as error:
                self.fail(generation, error)
                return
            events.append((generation, event))
            if event.finish_reason is not None:
                self.release(generation)
