"""The engine's rules: who runs, who waits, who yields, and what is left when something goes wrong.

On a scripted core, whose answers and failures are given; test_engine_results.py has a real one.
"""

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable

import numpy
import pytest
from gptoss import Engine, Generation, QueueFull, Request, SamplingParams, _gptoss
from scripted_core import ScriptedCore

V = 300


def answer(prompt: list[int]) -> list[int]:
    """Tells prompts apart, and goes on for as long as anyone asks."""
    return [(7 * sum(prompt) + 3 * i) % V for i in range(2000)]


class Core(ScriptedCore):
    """Also notes the tokens of each item of each step, and can be held up in a step."""

    def __init__(self, **options: object) -> None:
        super().__init__(answer, V, **options)
        self.steps: list[list[int]] = []
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None

    def step(self, items: list, logits: object = None) -> list:
        if self.before:
            self.before()
        samples = super().step(items, logits)
        self.steps.append([len(item[1]) for item in items])
        if self.after:
            self.after()
        return samples


def request(
    prompt: int | list[int], n_new: int = 5, constraint: object = None, **fields: object
) -> Request:
    """A greedy request; a number stands for a prompt of that many tokens."""
    tokens = [prompt % V] * prompt if isinstance(prompt, int) else prompt
    params = SamplingParams(temperature=0, max_new_tokens=n_new, **fields)
    return Request(tokens, params, frozenset(), n_new, constraint)


def finish(engine: Engine) -> None:
    while engine.wait_for_work(0):
        engine.step()


def said(generation: Generation) -> list[int]:
    return [event.token for event in generation.events]


def expected(generation: Generation) -> list[int]:
    return answer(generation.request.tokens)[: generation.request.max_new_tokens]


def test_requests_join_and_leave_between_steps() -> None:
    core = Core()
    engine = Engine(core, None)
    first = engine.submit(request(3, 4))
    assert [event.token for _, event in engine.step()] == expected(first)[:1]
    second = engine.submit(request(5, 2))
    assert {generation for generation, _ in engine.step()} == {first, second}
    assert [generation for generation, _ in engine.step()] == [first, second]
    assert (second.finish_reason, said(second)) == ("length", expected(second))
    assert [generation for generation, _ in engine.step()] == [first]
    assert (first.finish_reason, said(first)) == ("length", expected(first))
    assert engine.step() == []
    assert core.steps == [[3], [1, 5], [1, 1], [1]]
    assert not core.sequences


def test_prompts_come_in_chunks_behind_single_tokens() -> None:
    core = Core()
    engine = Engine(core, None)
    engine.submit(request(700, 1))
    finish(engine)
    assert core.steps == [[512], [188]]  # nobody is held up
    core.steps.clear()
    writer, reader = engine.submit(request([1], 60)), engine.submit(request([5] * 700, 2))
    finish(engine)
    assert core.steps[0] == [1, 511]  # nor here, where both read
    assert core.steps[1][0] == 1 and 1 < core.steps[1][1] <= 64
    assert sum(step[1] for step in core.steps if len(step) > 1) == 700 + 1
    assert said(writer) == expected(writer) and said(reader) == expected(reader)


def test_first_come_first_served() -> None:
    """A short request does not pass a long one that has to wait, nor is any left waiting."""
    core = Core(n_pages=8)
    engine = Engine(core, None)
    running = engine.submit(request(500, 100))  # 5 pages in the end
    engine.step()
    large, small = engine.submit(request(600, 3)), engine.submit(request(2, 3))
    for _ in range(50):
        engine.step()
    assert large.started_at is None and small.started_at is None
    assert engine.stats().waiting == 2
    finish(engine)
    assert running.first_token_at < large.started_at <= small.started_at
    assert all(said(g) == expected(g) for g in (running, large, small))


def test_a_prompt_reused_is_admitted_where_it_would_not_fit() -> None:
    core = Core(n_pages=10)
    engine = Engine(core, None)
    prompt = list(range(256)) + [9] * 400
    first = engine.submit(request(prompt, 40))
    engine.step()
    other, same = engine.submit(request(600, 2)), engine.submit(request(prompt, 2))
    engine.step()
    assert other.started_at is None
    engine.cancel(other)
    engine.step()
    engine.step()
    assert same.reused_tokens == 640
    finish(engine)
    assert said(same) == expected(same) and said(first) == expected(first)
    assert engine.stats().prefix_tokens_reused == 640


def test_the_same_prompt_at_once_is_read_once() -> None:
    core = Core()
    engine = Engine(core, None)
    generations = [engine.submit(request(1200, 3)) for _ in range(4)]
    finish(engine)
    assert sum(map(sum, core.steps)) < 1200 + 4 * 128 + 16
    assert min(g.reused_tokens for g in generations[1:]) >= 1024
    assert all(said(g) == expected(g) for g in generations)


def test_the_youngest_yields_and_loses_nothing() -> None:
    core = Core(n_pages=8)
    engine = Engine(core, None)
    old, young = (engine.submit(request([k] * 250, 500)) for k in (1, 2))
    finish(engine)
    stats = engine.stats()
    assert stats.preemptions >= 1
    assert said(old) == expected(old) and said(young) == expected(young)
    assert stats.generated_tokens == 1000 and stats.prompt_tokens == 500
    assert stats.prefix_tokens_reused >= 256  # most came back without being computed
    assert (stats.running, stats.waiting, stats.full_pages_in_use) == (0, 0, 0)


def test_many_yield_in_turn() -> None:
    core = Core(n_pages=9, prefix_cache=False)
    engine = Engine(core, None)
    generations = [engine.submit(request([k + 1] * 100, 400)) for k in range(6)]
    ended = []
    while engine.wait_for_work(0):
        ended += [g for g, event in engine.step() if event.finish_reason]
    assert ended == generations  # the oldest goes on, whatever happens
    assert all(said(g) == expected(g) for g in generations)
    assert engine.stats().preemptions >= 3


def test_what_never_fits_is_refused() -> None:
    engine = Engine(Core(n_pages=4, max_context=4096), None)
    engine.submit(request(500, 12))
    with pytest.raises(ValueError, match=r"500 tokens and 13 new ones .* the 512 tokens"):
        engine.submit(request(500, 13))
    engine = Engine(Core(max_context=100), None)
    with pytest.raises(ValueError, match="95 tokens and 6 new ones are more than max_context 100"):
        engine.submit(request(95, 6))


def test_pages_held_by_others() -> None:
    """A sequence that is not the engine's holds nearly all: no loop, but an error."""
    core = Core(n_pages=4)
    core.step([(core.new_sequence(), [1] * 300, 0, None)])
    engine = Engine(core, None)
    generation = engine.submit(request(200))
    with pytest.raises(_gptoss.CacheFull):
        engine.wait([generation])
    assert generation.finish_reason == "error" and len(core.sequences) == 1


def test_guests_give_pages_back() -> None:
    """To the one generation that is left, after the younger ones have yielded."""
    core = Core(n_pages=6)
    guest = core.new_sequence()
    core.step([(guest, [1] * 300, 0, None)])
    engine = Engine(core, None)

    def give_back() -> bool:
        had = not guest.closed
        guest.close()
        return had

    engine.add_guest(give_back)
    generations = [engine.submit(request([k] * 100, 400)) for k in (1, 2)]
    while not guest.closed:
        engine.step()
    assert engine.stats().preemptions == 1 and generations[0].events
    finish(engine)
    assert [said(g) for g in generations] == [expected(g) for g in generations]


def test_the_line_has_an_end() -> None:
    engine = Engine(Core(max_sequences=2), None, max_waiting=1)
    generations = [engine.submit(request([k])) for k in range(1, 4)]
    with pytest.raises(QueueFull, match="3 requests"):
        engine.submit(request(5))
    engine.cancel(generations[2])
    engine.submit(request(5))
    engine.step()
    with pytest.raises(QueueFull):
        engine.submit(request(5))
    finish(engine)
    engine.submit(request(5))


def test_no_more_than_max_sequences() -> None:
    core = Core(max_batch_tokens=64)
    engine = Engine(core, None, max_sequences=3)
    generations = [engine.submit(request([k + 1], 3 + k)) for k in range(8)]
    finish(engine)
    assert max(map(len, core.steps)) == 3
    assert all(said(g) == expected(g) for g in generations)
    assert Engine(core, None, max_sequences=500).max_sequences == 32
    assert Engine(Core(max_batch_tokens=4), None).max_sequences == 4
    for name, value in (("max_sequences", 0), ("max_waiting", -1), ("speculate", -1)):
        with pytest.raises(ValueError, match=name):
            Engine(core, None, **{name: value})


def test_cancel() -> None:
    core = Core(max_sequences=2)
    engine = Engine(core, None)
    writing, reading, waiting = (engine.submit(request(n, 9)) for n in (1, 2000, 4))
    engine.step()
    assert len(core.sequences) == 2
    for generation in (waiting, reading, writing, writing):
        engine.cancel(generation)
        assert generation.finish_reason == "cancelled"
    assert not core.sequences
    assert engine.step() == [] and not engine.wait_for_work(0)
    ended = engine.submit(request(1, 1))
    finish(engine)
    engine.cancel(ended)
    assert ended.finish_reason == "length"


def test_cancel_in_the_middle_of_a_step() -> None:
    core = Core()
    engine = Engine(core, None)
    gone, stays = engine.submit(request(1, 9)), engine.submit(request(2, 9))
    engine.step()
    core.before = lambda: engine.cancel(gone)
    assert [generation for generation, _ in engine.step()] == [stays]
    assert len(gone.events) == 1 and len(core.sequences) == 1
    finish(engine)
    assert said(stays) == expected(stays)


def test_a_failing_step_ends_those_that_ran() -> None:
    core = Core(max_sequences=2)
    engine = Engine(core, None)
    ran = [engine.submit(request([k], 9)) for k in (1, 2)]
    waits = engine.submit(request(3, 9))
    engine.step()
    core.fail = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()
    assert {g.finish_reason for g in ran} == {"error"} and not core.sequences
    for generation in ran:
        assert len(generation.events) == 1  # what it had said is still there
        engine.wait([generation])
        generation.events.clear()
        with pytest.raises(RuntimeError, match="the device is gone"):
            engine.wait([generation])
    finish(engine)
    assert said(waits) == expected(waits)


@pytest.mark.parametrize("kind", [RuntimeError, _gptoss.CannotSample])
def test_a_failed_generation_does_not_keep_the_core(kind: type[Exception]) -> None:
    """Its error stays with it, the core goes with the engine, no garbage collector needed."""
    core = Core()
    engine = Engine(core, None)
    failed, goes_on = engine.submit(request(1)), engine.submit(request(2))
    core.fail = kind("no")
    core.fail.item = 0  # which, for CannotSample
    with pytest.raises(kind):
        engine.wait([failed])
    assert (goes_on.error is None) == (kind is _gptoss.CannotSample)
    gone = weakref.ref(core)
    gc.disable()
    try:
        engine.close()
        del core
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_drawn_ends_one() -> None:
    """A penalty makes the logits of a prompt's tokens infinite: as the third and the first token
    that are to be drawn, beside others."""
    core = Core()
    engine = Engine(core, None)
    fields = {"repetition_penalty": 1e-45}
    others = [engine.submit(request([k], 20)) for k in (1, 2)]
    late = engine.submit(request([49], 20, **fields))
    assert answer([49])[2] == 49 and answer([50])[0] == 50
    engine.step()
    at_once = engine.submit(request([50], 20, **fields))
    others.append(engine.submit(request([3], 20)))
    finish(engine)
    assert [said(g) for g in others] == [expected(g) for g in others]
    for generation in (late, at_once):
        assert isinstance(generation.error, _gptoss.CannotSample)
    assert (len(late.events), len(at_once.events)) == (2, 0)
    assert not core.sequences


def test_pages_that_only_the_core_counts() -> None:
    """Where free pages are no help, the one that yielded waits for the other, not for itself."""
    core = Core()
    engine = Engine(core, None)
    generations = [engine.submit(request([k], 20)) for k in (1, 2)]
    tries = iter(range(1000))

    def only_one() -> None:
        next(tries)
        if len(core.sequences) > 1:
            raise _gptoss.CacheFull("the window layers have room for one")

    core.before = only_one
    finish(engine)
    assert [said(g) for g in generations] == [expected(g) for g in generations]
    assert engine.stats().preemptions == 1


def test_an_error_is_for_those_it_ended() -> None:
    core = Core(max_sequences=1)
    engine = Engine(core, None)
    failing, mine = engine.submit(request(1)), engine.submit(request(2, 3))
    core.fail = RuntimeError("the device is gone")
    engine.wait([mine])
    assert failing.error is not None and mine.events


@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_loses_no_token(late: bool) -> None:
    """Whether it comes before the core is done, which then undoes the step, or right behind that:
    other generations go on as if nothing had been."""
    core = Core()
    engine = Engine(core, None)
    mine, other = engine.submit(request(1, 9)), engine.submit(request(2, 9))
    engine.step()

    def interrupt() -> None:
        core.before = core.after = None
        signal.raise_signal(signal.SIGINT)

    if late:
        core.after = interrupt
    else:
        core.before = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(other.events) == (2 if late else 1)
    engine.cancel(mine)
    finish(engine)
    assert said(other) == expected(other)
    assert not core.sequences


def test_ctrl_c_ends_only_its_callers_own() -> None:
    core = Core(delay=0.001)
    engine = Engine(core, None)
    other = engine.submit(request(2, 40))

    def interrupt() -> None:
        if len(core.steps) == 10:
            signal.raise_signal(signal.SIGINT)

    core.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        for _ in engine.run([request(1, 1000), request(4, 1000)]):
            pass
    core.before = None
    assert len(core.sequences) == 1
    finish(engine)
    assert said(other) == expected(other)


class OnlyEven:
    """A constraint: even tokens only, until it fails."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.accepted: list[int] = []
        self.fails_at = fails_at

    def mask(self) -> numpy.ndarray | None:
        if len(self.accepted) == self.fails_at:
            raise RuntimeError("no such rule")
        if len(self.accepted) == 3:
            return None
        return numpy.full(-(-V // 32), 0x55555555, numpy.uint32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_constraints() -> None:
    core = Core()
    engine = Engine(core, None)
    rules, broken = OnlyEven(), OnlyEven(fails_at=2)
    held = engine.submit(request([1], 8, rules))
    failing, free = engine.submit(request([1], 8, broken)), engine.submit(request([1], 8))
    finish(engine)
    tokens = said(held)
    assert [token % 2 for token in tokens] == [0, 0, 0, said(free)[3] % 2, 0, 0, 0, 0]
    assert said(free)[0] % 2 == 1  # else the mask has done nothing
    assert rules.accepted == tokens[:-1]
    assert (failing.finish_reason, str(failing.error)) == ("error", "no such rule")
    assert len(failing.events) == 2
    assert said(free) == expected(free)
    assert not core.sequences


def test_threads_run_in_the_same_steps() -> None:
    core = Core(delay=0.002)
    engine = Engine(core, None)
    together = threading.Barrier(8)
    results: dict[int, list[int]] = {}

    def work(k: int) -> None:
        together.wait()
        results[k] = [event.token for _, event in engine.run([request([k], 50)])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[k] == answer([k])[:50] for k in range(1, 9))
    assert len(core.steps) < 4 * 50
    assert not core.sequences


def test_one_thread_steps_for_another() -> None:
    """A server's loop, and a caller that waits beside it."""
    core = Core(delay=0.001)
    engine = Engine(core, None)

    def serve() -> None:
        while engine.wait_for_work():
            try:
                engine.step()
            except RuntimeError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    for k in range(1, 5):
        assert [e.token for _, e in engine.run([request([k], 9)])] == answer([k])[:9]
    generation = engine.submit(request(9, 500))
    engine.wait([generation])
    engine.close()
    thread.join(10)
    assert not thread.is_alive()
    assert str(generation.error) == "the model is closed" and not core.sequences
    with pytest.raises(RuntimeError, match="the model is closed"):
        engine.submit(request(1))


def test_a_long_list_leaves_room_for_others() -> None:
    """A call with many prompts does not put them all in line before everybody else."""
    core = Core(max_sequences=4)
    engine = Engine(core, None)
    many = engine.run([request([k + 1], 6) for k in range(40)])
    next(many)
    late = engine.submit(request([99], 6))
    n_events = 0
    while late.finish_reason is None:
        next(many)
        n_events += 1
    assert n_events < 60
    assert len(list(many)) + n_events + 1 == 240
    assert said(late) == expected(late)


def test_times() -> None:
    core = Core(max_sequences=1)
    engine = Engine(core, None)
    before = time.perf_counter()
    first, second = engine.submit(request(600, 3)), engine.submit(request(2, 3))
    finish(engine)
    for g in (first, second):
        assert before <= g.queued_at <= g.started_at <= g.first_token_at
    assert first.events[-1].timings.decode_tokens == 2
    assert second.started_at >= first.first_token_at
    assert [event.timings is None for event in first.events] == [True, True, False]
