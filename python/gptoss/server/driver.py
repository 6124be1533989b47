"""The engine's thread on one side, asyncio on the other.

One thread steps the engine for everybody. What a step brings is announced to the event loop once,
and each HTTP request takes its own tokens out of its generations.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING

from ..engine import Engine, Generation, QueueFull, Request, StreamEvent
from ..grammar import GrammarError
from .errors import ApiError, internal_error, queue_full, unavailable
from .logs import log_failure
from .metrics import Metrics
from .settings import Settings

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_IDLE = 0.1  # seconds between looks at whether to stop
_MAX_FAILURES = 3  # steps in a row, then the server calls itself unhealthy

logger = logging.getLogger(__name__)


class Driver:
    """Runs an engine in a thread of its own for the requests of one event loop.

    Everything but `start` and `stop` is called in the loop's thread.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine = engine
        self.steps = 0
        self.draining = False  # set once no new requests are taken
        self._settings = settings
        self.metrics = metrics
        self._batches: dict[int, Batch] = {}  # by the id of each generation under way
        self._cancels: deque[Generation] = deque()  # for the engine's thread to do
        self._failures = 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: AbstractEventLoop | None = None

    @property
    def healthy(self) -> bool:
        """Whether the engine runs and its last steps did not all fail."""
        return self._thread is not None and self._failures < _MAX_FAILURES

    def start(self) -> None:
        """Begin to step, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End what is under way, then the thread."""
        self.end_all()
        self._stopping.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def end_all(self) -> None:
        """End what is under way with an error that says so."""
        for batch in set(self._batches.values()):
            batch.fail(unavailable("The server is shutting down.", self._settings.retry_after))

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Queue all of them, or none.

        Raises:
            ApiError: 429 if they do not fit the queue; 503 if the server stops or the engine fails.
        """
        if self.draining:
            raise unavailable("The server is shutting down.", self._settings.retry_after)
        if not self.healthy:
            raise unavailable("The model does not run.", self._settings.retry_after)
        generations: list[Generation] = []
        try:
            for request in requests:
                generations.append(self.engine.submit(request))
        except QueueFull:
            self._withdraw(generations)
            raise queue_full(self._settings.retry_after) from None
        except ValueError as error:  # could not run to its end even alone
            self._withdraw(generations)
            raise ApiError(400, str(error), code="context_length_exceeded") from None
        batch = Batch(self, generations)
        for generation in generations:
            self._batches[id(generation)] = batch
        return batch

    def _withdraw(self, generations: list[Generation]) -> None:
        for generation in generations:
            self.engine.cancel(generation)

    def forget(self, generations: Iterable[Generation]) -> None:
        """Nobody waits for these any more: cancel what is not finished."""
        for generation in generations:
            if self._batches.pop(id(generation), None) is None:
                continue
            if generation.finish_reason is None:
                self.metrics.cancelled()
                self._cancels.append(generation)

    def _run(self) -> None:
        """The engine's thread."""
        assert self._loop is not None
        while not self._stopping.is_set():
            try:
                self._cancel()
                if not self.engine.wait_for_work(_IDLE):
                    continue
                changed = self.engine.step()
                self.steps += 1
            except Exception as error:
                self._failures += 1
                log_failure(logger, "engine step failed", error, with_message=True)
                self._tell(self._deliver, {})
                self._stopping.wait(0.1 * min(self._failures, 10))  # not in a tight loop
                continue
            self._failures = 0
            self._tell(self._deliver, {id(g): g for g, _ in changed})

        self._cancel()

    def _cancel(self) -> None:
        """End what nobody waits for, between two steps: the loop never waits for the engine's lock
        and the next step is without them."""
        while self._cancels:
            self.engine.cancel(self._cancels.popleft())

    def _tell(self, function: object, *arguments: object) -> None:
        """Call a function in the loop's thread, unless the loop is gone."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, changed: dict[int, Generation]) -> None:
        """After a step: wake those that have tokens, end those that will get none."""
        for key, batch in list(self._batches.items()):
            generation = batch.by_id[key]
            if generation.finish_reason == "error":
                batch.fail(_failure(generation.error))
            elif key not in changed:
                continue
            elif len(generation.events) > self._settings.max_backlog:
                batch.fail(ApiError(408, "The answer was not read fast enough.", code="slow_read"))
            else:
                batch.wake()


def _failure(error: BaseException | None) -> ApiError:
    """What the client of a generation that failed is told."""
    if isinstance(error, GrammarError):  # the schema was too much for the parser's limits
        return ApiError(400, str(error), param="response_format", code="schema_too_complex")
    if error is not None:
        log_failure(logger, "generation failed", error)
    return internal_error()


class Batch:
    """The generations of one HTTP request. Iterating gives (index, its new events) as they come.

    `close` it in the end, whatever happens: that frees what is not finished.
    """

    def __init__(self, driver: Driver, generations: list[Generation]) -> None:
        self.generations = generations
        self.by_id = {id(generation): generation for generation in generations}
        self._driver = driver
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._open = set(range(len(generations)))
        self._begun: set[int] = set()  # those whose first token was taken

    async def __aiter__(self) -> AsyncIterator[tuple[int, list[StreamEvent]]]:
        """All there is for one index at once: a slow reader gets fewer, larger pieces.

        Raises:
            ApiError: the engine failed, the server stops, or the reader is far too slow.
        """
        while self._open:
            await self._changed.wait()
            self._changed.clear()
            for index in sorted(self._open):
                events = self._take(index)
                if events:
                    yield index, events
            if self._error is not None:
                raise self._error

    def _take(self, index: int) -> list[StreamEvent]:
        generation = self.generations[index]
        events = []
        while generation.events:
            events.append(generation.events.popleft())
        if events and index not in self._begun:
            self._begun.add(index)
            self._driver.metrics.first_token(generation)
        if events and events[-1].finish_reason:
            self._driver.metrics.finished(events[-1].timings)
            self.end(index)
        return events

    def end(self, index: int) -> None:
        """No more of this generation is wanted: cancel it if it still runs."""
        self._open.discard(index)
        self._driver.forget([self.generations[index]])

    def wake(self) -> None:
        """There is something to take."""
        self._changed.set()

    def fail(self, error: ApiError) -> None:
        """End the whole batch with an error."""
        self._error = self._error or error
        self._driver.forget(self.generations)
        self.wake()

    def close(self) -> None:
        """Free what is not finished. Harmless when repeated."""
        self._open.clear()
        self._driver.forget(self.generations)
