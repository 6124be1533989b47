"""The engine's own time: all of `Engine.step` but the core's.

    python bench/engine_overhead.py --sequences 32

A tiny random model generates with many sequences at once; the time inside `core.step` is taken off
each step. Prints the median and the 99th percentile in milliseconds, one row for each kind of
request (--json: one line of JSON each). Steps that read prompts or end generations are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from gptoss import Model, SamplingParams
from gptoss.engine import Engine
from gptoss.synth import synthesize

KINDS = {
    "plain": {},
    "stop string": {"stop": ["no such text"]},
    "logprobs": {"logprobs": 5},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
}


class TimedCore:
    """A core that adds up the time of its steps."""

    def __init__(self, core: object) -> None:
        self._core = core
        self._step = core.step
        self.seconds = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)

    def step(self, items: list) -> list:
        started = time.perf_counter()
        samples = self._step(items)
        self.seconds += time.perf_counter() - started
        return samples


def measure(model: Model, n_sequences: int, n_steps: int, fields: dict) -> list[float]:
    """Seconds of the engine's own in each of `n_steps` steps."""
    core = TimedCore(model.core)
    engine = Engine(core, model.tokenizer)
    params = SamplingParams(max_new_tokens=n_steps + 50, ignore_eos=True, **fields)
    generations = [engine.submit(model.request([i + 1], params)) for i in range(n_sequences)]
    for _ in range(40):  # prompts, and the first tokens
        engine.step()
    seconds = []
    for _ in range(n_steps):
        core.seconds = 0.0
        started = time.perf_counter()
        events = engine.step()
        seconds.append(time.perf_counter() - started - core.seconds)
        assert len(events) == n_sequences
        for generation in generations:
            generation.events.clear()
    for generation in generations:
        engine.cancel(generation)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = synthesize(f"{directory}/tiny", progress=False)
        with Model.load(
            path, "cpu", max_context=4096, max_sequences=options.sequences, progress=False
        ) as model:
            for kind, fields in KINDS.items():
                seconds = measure(model, options.sequences, options.steps, fields)
                row = {
                    "requests": kind,
                    "sequences": options.sequences,
                    "median_ms": round(1e3 * statistics.median(seconds), 4),
                    "p99_ms": round(1e3 * statistics.quantiles(seconds, n=100)[98], 4),
                }
                if options.json:
                    print(json.dumps(row))
                else:
                    print("{requests:12} {sequences} {median_ms:.3f} {p99_ms:.3f}".format(**row))


if __name__ == "__main__":
    main()
