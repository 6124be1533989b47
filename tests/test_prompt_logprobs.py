"""Scores of prompts, computed beside the engine."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gptoss import Model, SamplingParams

pytest.importorskip("fastapi")

from gptoss.server.prompt_logprobs import PromptScore, PromptScorer


def test_generations_come_first(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that fills the cache gives way to a generation that grows, and is scored behind it,
    to the same bits."""
    prompt = [7 * i % 500 for i in range(1000)]
    params = SamplingParams(max_new_tokens=500, seed=1, ignore_eos=True)
    limits = {"max_context": 1024, "max_sequences": 1, "progress": False}
    with Model.load(tiny_path, "cpu", **limits) as model, ThreadPoolExecutor(1) as pool:
        scorer = PromptScorer(model)

        def score() -> list[PromptScore]:
            return asyncio.run(scorer.score([prompt], 2))

        expected, answer = score(), model.generate([5] * 300, params).tokens
        far, go_on, feed = threading.Event(), threading.Event(), PromptScorer._feed

        def waiting(scorer: PromptScorer, tokens: list[int], start: int, *rest: object) -> bool:
            if start >= 640:
                far.set()
                go_on.wait()
            return feed(scorer, tokens, start, *rest)

        monkeypatch.setattr(PromptScorer, "_feed", waiting)
        scored = pool.submit(score)
        far.wait()
        try:
            tokens = model.generate([5] * 300, params).tokens
        finally:
            go_on.set()
        assert tokens == answer
        assert scored.result() == expected
        assert model.engine.stats().full_pages_in_use == 0
