"""One model under several threads, Ctrl-C, and in a forked child."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from gptoss import Model, SamplingParams

PARAMS = SamplingParams(max_new_tokens=30, seed=5, ignore_eos=True)
ENDLESS = SamplingParams(max_new_tokens=None, seed=5, ignore_eos=True)


def test_threads_share_a_model(tiny: Model) -> None:
    prompts = ["one", "two two", [3] * 700, "four"]
    alone = [tiny.generate(prompt, PARAMS).tokens for prompt in prompts]

    def work(i: int) -> None:
        for _ in range(3):
            assert tiny.generate(prompts[i], PARAMS).tokens == alone[i]
            assert [event.token for event in tiny.stream(prompts[i], PARAMS)] == alone[i]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert tiny.core.cache_stats()["full_in_use"] == 0


def test_a_stream_keeps_its_pace_beside_another_thread(tiny: Model) -> None:
    """Steps take turns: a long generation does not keep others out."""
    stop = threading.Event()

    def occupy() -> None:
        for _ in tiny.stream([1], ENDLESS):
            if stop.is_set():
                return

    thread = threading.Thread(target=occupy)
    thread.start()
    try:
        tiny.generate([2], PARAMS)
        assert thread.is_alive()
    finally:
        stop.set()
        thread.join()
    assert tiny.core.cache_stats()["full_in_use"] == 0


@pytest.mark.parametrize(
    "prompts", [[1], [[1], [2, 3], [4]], [1] * 60_000], ids=["decode", "batch", "prefill"]
)
def test_ctrl_c(tiny: Model, prompts: list) -> None:
    main = threading.main_thread().ident
    sent = 0.0

    def interrupt() -> None:
        nonlocal sent
        sent = time.perf_counter()
        signal.pthread_kill(main, signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(prompts, ENDLESS)
    assert time.perf_counter() - sent < 0.5
    assert tiny.core.cache_stats()["full_in_use"] == 0
    assert len(tiny.generate("again", PARAMS).tokens) == 30


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told(tiny_path: Path) -> None:
    """The core's threads live in the parent only: the child gets an error, not a hang."""
    model = Model.load(tiny_path, "cpu", threads=2, progress=False)
    expected = model.generate("Hello", PARAMS).tokens
    stream = model.stream("Hello", PARAMS)
    next(stream)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for use in (
                lambda: model.generate("Hello", PARAMS),
                lambda: next(stream),
                lambda: model.forward([1]),
            ):
                try:
                    use()
                except RuntimeError as error:
                    os.write(writer, f"{error}\n".encode())
            stream.close()
            del stream, use, model  # must not wait for threads that are not there
            os.write(writer, b"done\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read().splitlines()
    os.waitpid(child, 0)
    assert len(said) == 4 and said[-1] == "done", said
    assert all("fork" in line for line in said[:3]), said
    stream.close()
    assert model.generate("Hello", PARAMS).tokens == expected  # the parent goes on


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_can_close(tiny_path: Path) -> None:
    """Also where another thread was in the engine at that moment."""
    model = Model.load(tiny_path, "cpu", threads=1, progress=False)
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with model.engine._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it, where it hangs
        try:
            model.engine.stats()
        except RuntimeError as error:
            model.close()
            os._exit("fork" not in str(error))
        os._exit(2)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert status == 0
    assert len(model.generate("again", PARAMS).tokens) == 30


def test_a_sequence_closed_while_others_wait_for_it(tiny: Model) -> None:
    """Several threads call the same sequence behind a step that keeps them waiting: those that come
    after its end get an error."""

    def call(function: Callable[[], object]) -> None:
        with suppress(ValueError):
            function()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            step = pool.submit(tiny.forward, [1] * 512)
            sequence = tiny.core.new_sequence()
            calls = [sequence.close, lambda s=sequence: s.truncate(0)] * 3
            list(pool.map(call, calls))
            step.result()
            with pytest.raises(ValueError, match="the sequence is closed"):
                sequence.truncate(0)
    assert tiny.core.cache_stats()["full_in_use"] == 0


@pytest.mark.parametrize("pin", ["", "0", "1"])
def test_pinning(tiny_path: Path, pin: str) -> None:
    """Workers get one processor each, and only when asked; the caller's thread stays free."""
    script = f"""
import os
from pathlib import Path
from gptoss import Model
before = {{task.name for task in Path("/proc/self/task").iterdir()}}
with Model.load({str(tiny_path)!r}, "cpu", threads=3, progress=False) as model:
    model.generate([1, 2, 3])
    tasks = {{task.name for task in Path("/proc/self/task").iterdir()}} - before
    masks = [os.sched_getaffinity(int(task)) for task in tasks]
    print(len(masks), sum(len(mask) == 1 for mask in masks), len(os.sched_getaffinity(0)))
"""
    environment = {**os.environ, "GPTOSS_PIN_THREADS": pin}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    workers, pinned, own = map(int, result.stdout.split())
    processors = len(os.sched_getaffinity(0))
    assert own == processors
    assert workers >= 2
    if processors > 1:
        assert pinned == (2 if pin == "1" else 0)
