"""Whatever the engine does to a request, what comes out is what it gets alone, to the last bit."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from gptoss import Engine, Generation, Model, SamplingParams, StreamEvent, _gptoss
from gptoss.engine.drafts import Lookup
from small_models import DEVICE

LIMITS = {"max_context": 1024, "max_sequences": 6, "invariant": True, "progress": False}


@pytest.fixture(scope="module")
def alone(tiny_path: Path) -> Iterator[Model]:
    """The model without prefix cache and guesses; it gets one request at a time."""
    with Model.load(tiny_path, DEVICE, prefix_cache=False, **LIMITS) as model:
        yield model


def facts(event: StreamEvent) -> tuple:
    """All but the times."""
    return event.token, event.text, event.logprob, event.finish_reason, event.stop_reason


def some_requests(draw: random.Random, n: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of which many begin alike, of all kinds of parameters."""
    beginning = [draw.randrange(500) for _ in range(256)]
    requests = []
    for i in range(n):
        tail = [draw.randrange(500) for _ in range(draw.randrange(1, 120))]
        prompt = beginning[: draw.choice([0, 0, 0, 130, 256])] + tail
        fields = draw.choice(
            [
                {"temperature": 0},
                {"logprobs": 3},
                {"top_p": 0.9, "top_k": 40},
                {"repetition_penalty": 1.3, "temperature": 0.5},
                {"frequency_penalty": 0.7, "presence_penalty": -0.5, "logprobs": 0},
                {"stop": ["a", "zz"], "stop_token_ids": [3, 4]},
            ]
        )
        n_new = draw.randrange(1, 500)
        params = SamplingParams(max_new_tokens=n_new, seed=i, ignore_eos=i % 8 > 0, **fields)
        requests.append((prompt, params))
    return requests


def occupy(model: Model, n_tokens: int) -> list:
    """Sequences that hold the pages of so many tokens, so that the engine runs short of them."""
    sequences = []
    for i in range(n_tokens // 1024):  # unlike one another, or they would share
        sequences.append(model.core.new_sequence())
        for _ in range(2):
            model.core.step([(sequences[-1], [i] * 512, 0, None)])
    return sequences


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_changes_a_result(tiny_path: Path, alone: Model, seed: int, speculate: int) -> None:
    """Requests come, go and are cancelled at random, while pages are short."""
    draw = random.Random(seed)
    requests = some_requests(draw, 20)
    expected = [
        [facts(event) for event in alone.stream(prompt, params)] for prompt, params in requests
    ]
    with Model.load(tiny_path, DEVICE, speculate=speculate, **LIMITS) as model:
        engine = model.engine
        held = occupy(model, 5 * 1024)
        generations: list[Generation] = []
        got: dict[Generation, list[tuple]] = {}
        while len(generations) < len(requests) or engine.wait_for_work(0):
            if len(generations) < len(requests) and draw.random() < 0.5:
                generations.append(engine.submit(model.request(*requests[len(generations)])))
                got[generations[-1]] = []
            if generations and draw.random() < 0.01:
                engine.cancel(draw.choice(generations))
            for generation, event in engine.step():
                got[generation].append(facts(event))
        stats = engine.stats()
        for sequence in held:
            sequence.close()
        assert engine.stats().full_pages_in_use == engine.stats().window_pages_in_use == 0
    for generation, whole in zip(generations, expected, strict=True):
        if generation.finish_reason == "cancelled":
            assert got[generation] == whole[: len(got[generation])]
        else:
            assert got[generation] == whole
    assert sum(g.finish_reason == "cancelled" for g in generations) < 12
    assert stats.prefix_tokens_reused > 0
    if DEVICE == "cpu":  # elsewhere prompts are cut otherwise, and the random requests meet less
        assert stats.preemptions > 0
    assert bool(stats.accepted_draft_tokens) == bool(speculate)


def test_yielding_changes_nothing(tiny_path: Path, alone: Model) -> None:
    """Three sequences of two pages each, and two more pages where all three need one."""
    params = SamplingParams(max_new_tokens=20, seed=3, logprobs=1, ignore_eos=True)
    prompts = [[k] * 250 for k in (11, 12, 13)]
    with Model.load(tiny_path, DEVICE, **LIMITS) as model:
        held = occupy(model, 5 * 1024)
        results = model.generate(prompts, params)
        assert model.engine.stats().preemptions == 1
        for sequence in held:
            sequence.close()
    for prompt, result in zip(prompts, results, strict=True):
        expected = alone.generate(prompt, params)
        assert (result.tokens, result.logprobs) == (expected.tokens, expected.logprobs)


def test_guesses_save_steps(tiny_path: Path, alone: Model) -> None:
    """A greedy model of random weights soon goes round in circles: most guesses are right."""
    params = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)
    prompt = [5, 6, 7] * 20
    with Model.load(tiny_path, DEVICE, speculate=8, **LIMITS) as model:
        assert model.generate(prompt, params).tokens == alone.generate(prompt, params).tokens
        stats = model.engine.stats()
        assert stats.generated_tokens == 200
        assert 0 < stats.accepted_draft_tokens <= stats.draft_tokens
        for result in model.generate([prompt, prompt[1:]], params):
            assert result.tokens == alone.generate(result.prompt_tokens, params).tokens


@pytest.mark.parametrize("speculate", (0, 4))
def test_what_cannot_be_drawn_ends_one(tiny: Model, speculate: int) -> None:
    """The core says whose logits they are, in a step of prompts and one of single tokens."""
    params = SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True)
    hopeless = SamplingParams(max_new_tokens=20, repetition_penalty=1e-45, ignore_eos=True)
    prompts = [[1, 2] * 9, [5], [6] * 300]
    expected = [tiny.generate(prompt, params).tokens for prompt in prompts]
    engine = Engine(tiny.core, tiny.tokenizer, speculate=speculate)
    generations = [engine.submit(tiny.request(prompt, params)) for prompt in prompts[:2]]
    ended = [engine.submit(tiny.request([7], hopeless))]
    engine.step()
    ended.append(engine.submit(tiny.request(range(100), hopeless)))
    generations.append(engine.submit(tiny.request(prompts[2], params)))
    while engine.wait_for_work(0):
        engine.step()
    assert [[event.token for event in g.events] for g in generations] == expected
    assert all(isinstance(g.error, _gptoss.CannotSample) for g in ended)
    assert engine.stats().full_pages_in_use == 0


def test_lookup() -> None:
    def guess(tokens: list[int], most: int) -> list[int]:
        lookup = Lookup(tokens[:2], 8)
        for token in tokens[2:]:
            lookup.extend(token)
        lookup.learn(1, 1)
        lookup.learn(1, 1)
        return lookup.guess(most)

    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], 3) == [4, 5, 6]
    assert guess([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == [5]  # the last place counts
    assert guess([7, 2, 3, 4, 1, 2, 3], 2) == [4, 1]  # two tokens will do
    assert guess([7, 2, 8, 2, 3, 4, 7, 2, 3], 1) == [4]
    assert guess([1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]  # a loop goes on
    assert guess([3] * 4, 3) == [3, 3, 3]
    assert guess([0, 256, 1, 0, 65536, 0], 4) == []  # a match within tokens is none
    assert guess([1, 2, 3, 4], 4) == []
    assert guess([1, 1], 4) == [] and guess([1, 1, 1], 2) == [1, 1]
    assert guess([1, 2, 3, 1, 2, 3], 0) == []


def test_lookup_learns_how_far() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, 8)
    assert len(lookup.guess(20)) == 2
    lengths = []
    for n_true in (2, 4, 8, 3, 0, 0, 0, 0, 1):
        lookup.learn(len(lookup.guess(20)), n_true)
        lengths.append(len(lookup.guess(20)))
    assert lengths == [4, 8, 8, 8, 4, 2, 1, 1, 2]
