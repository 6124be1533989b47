"""One model under several threads, Ctrl-C, and in a forked child."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
    assert tiny.core.memory()["cache_used"] == 0


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
    assert tiny.core.memory()["cache_used"] == 0


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
    assert tiny.core.memory()["cache_used"] == 0
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
