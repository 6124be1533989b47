"""Steps with guesses (n_drafts): what they give and leave behind is what one token a step does."""

import random
from collections.abc import Callable

import pytest
import torch
from gptoss import _gptoss
from sampling_cases import mask_of, sampler
from small_models import CONFIGS, core_logits, feed, make_core, random_tensors, random_tokens
from torch import Tensor

NAME = "three_layers"
CONFIG = CONFIGS[NAME]
VOCAB = CONFIG.vocab_size
SAMPLERS: tuple[dict, ...] = (
    {"temperature": 0.0},
    {"seed": 1},
    {"seed": 2, "top_p": 0.9, "logprobs": 3},
    {
        "seed": 3,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.9,
        "logprobs": 0,
    },
    {"temperature": 0.0, "frequency_penalty": 3.0, "logprobs": 2, "logit_bias": {5: 3.0}},
)


@pytest.fixture(scope="module")
def core() -> _gptoss.Core:
    return make_core(CONFIG, random_tensors(CONFIG), max_context=1024, max_batch_tokens=2048)


def made(options: dict, prompt: list[int]) -> _gptoss.Sampler:
    one = sampler(VOCAB, **options)
    one.observe_prompt(prompt)
    return one


def plain(samples: list[_gptoss.Sample]) -> list:
    return [(s.token, s.logprob, s.top) for s in samples]


def one_by_one(core: _gptoss.Core, prompt: list[int], drawing: _gptoss.Sampler, n: int) -> list:
    """The samples of n steps without guesses."""
    sequence, pending, samples = core.new_sequence(), prompt, []
    for _ in range(n):
        ((sample,),) = core.step([(sequence, pending, 1, drawing)])
        samples.append(sample)
        pending = [sample.token]
    return plain(samples)


def guesses_of(chance: random.Random, true: list[int], n: int) -> list[int]:
    """n guesses of which some first ones are true."""
    n_right = chance.choice((0, 1, n // 2, n))
    right = true[:n_right][:n]
    return right + [chance.randrange(VOCAB) for _ in range(n - len(right))]


def run_with_guesses(
    core: _gptoss.Core,
    prompts: list[list[int]],
    samplers: list[_gptoss.Sampler],
    expected: list[list],
    guess: Callable[[list[int]], list[int]],
) -> tuple[list[_gptoss.Sequence], list[list[int]], int]:
    """All prompts together, guesses from the first step on, until each has all expected samples;
    compares those, and what is kept. Returns sequences, their tokens, and the number of steps."""
    sequences = [core.new_sequence() for _ in prompts]
    pending, given = [list(prompt) for prompt in prompts], [0] * len(prompts)
    kept: list[list[int]] = [[] for _ in prompts]
    for steps in range(10_000):
        active = [i for i, samples in enumerate(expected) if given[i] < len(samples)]
        if not active:
            return sequences, kept, steps
        items = []
        for i in active:
            guesses = guess([token for token, _, _ in expected[i][given[i] :]])
            items.append((sequences[i], pending[i] + guesses, 1, samplers[i], len(guesses)))
        logits = torch.empty(sum(1 + item[4] for item in items), VOCAB)
        row = 0
        for i, item, drawn in zip(active, items, core.step(items, logits), strict=True):
            got, n_drafts = plain(drawn), item[4]
            assert 1 <= len(got) <= n_drafts + 1
            true = expected[i][given[i] : given[i] + len(got)]  # guesses may go on behind its end
            assert got[: len(true)] == true
            guesses = item[1][len(pending[i]) :]
            right = [token for token, _, _ in got[:-1]]
            assert guesses[: len(right)] == right
            assert len(right) == n_drafts or guesses[len(right)] != got[-1][0]
            kept[i] += pending[i] + right
            assert sequences[i].length == len(kept[i])
            if row == 0:  # the logits are those of the rows before and behind the guesses
                logprobs = logits[: len(got)].double().log_softmax(-1)
                for j, (token, logprob, _) in enumerate(got):
                    assert not logprob or logprob == pytest.approx(
                        logprobs[j, token].item(), abs=1e-5
                    )
            row += 1 + n_drafts
            given[i] += len(got)
            pending[i] = [got[-1][0]]
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(3))
def test_same_samples_as_one_by_one(core: _gptoss.Core, seed: int) -> None:
    """Sequences with all kinds of samplers, and guesses right and wrong, over the ends of pages."""
    chance = random.Random(seed)
    prompts = [random_tokens(n, CONFIG, n).tolist() for n in (3, 100, 120, 127, 250)]
    expected = [
        one_by_one(core, prompt, made(options, prompt), 40)
        for prompt, options in zip(prompts, SAMPLERS, strict=True)
    ]
    samplers = [made(options, prompt) for prompt, options in zip(prompts, SAMPLERS, strict=True)]

    def guess(true: list[int]) -> list[int]:
        return guesses_of(chance, true, chance.randrange(9))

    before = core.cache_stats()["full_in_use"]
    sequences, kept, steps = run_with_guesses(core, prompts, samplers, expected, guess)
    assert steps < 40
    for i, sequence in enumerate(sequences):  # what is in the cache is the cache of these tokens
        more = random_tokens(20, CONFIG, i)
        alone = core_logits(core, torch.cat((torch.tensor(kept[i]), more)))[len(kept[i]) :]
        got = feed(core, [(sequence, more)])[0]
        assert torch.equal(got.view(torch.int32), alone.view(torch.int32))
        sequence.close()
    assert core.cache_stats()["full_in_use"] == before


@pytest.mark.parametrize("n_drafts", (1, 13, 63))
def test_right_guesses_all_count_and_wrong_ones_leave_nothing(
    core: _gptoss.Core, n_drafts: int
) -> None:
    """Of eight sequences, so that rows of logits are more than fit at once."""
    prompts = [random_tokens(90 + i, CONFIG, i).tolist() for i in range(8)]
    options = [{"seed": i, "presence_penalty": i % 2 / 2, "logprobs": 1} for i in range(8)]
    pairs = list(zip(prompts, options, strict=True))
    expected = [one_by_one(core, p, made(o, p), n_drafts + 1) for p, o in pairs]
    drawing = [made(o, p) for p, o in pairs]
    step = run_with_guesses(core, prompts[:3], drawing[:3], expected[:3], lambda t: t[:n_drafts])
    assert step[2] == 1
    drawing = [made(o, p) for p, o in pairs]

    def wrong(true: list[int]) -> list[int]:
        return [(token + 1) % VOCAB for token in true[:n_drafts]][:40]

    sequences, kept, steps = run_with_guesses(core, prompts, drawing, expected, wrong)
    assert steps == n_drafts + 1
    pages = sum(-(-len(tokens) // 128) for tokens in kept)
    del step
    assert core.cache_stats()["full_in_use"] == pages
    del sequences
    assert core.cache_stats()["full_in_use"] == 0


def test_mask_binds_every_row(core: _gptoss.Core) -> None:
    prompt, options = random_tokens(20, CONFIG).tolist(), {"seed": 4, "logprobs": 1}
    samplers = [made(options, prompt) for _ in range(2)]
    for one in samplers:
        one.allow(mask_of(range(0, VOCAB, 50), VOCAB))
    expected = one_by_one(core, prompt, samplers[0], 12)
    assert {token % 50 for token, _, _ in expected} == {0}
    run_with_guesses(core, [prompt], samplers[1:], [expected], lambda true: [*true[:4], 7])


def test_what_follows_a_wrong_guess_does_not_matter() -> None:
    """Behind a token whose embedding is NaN nothing can be drawn; as a wrong guess it does no harm,
    as a right one it is the error that it is without guesses, and nothing changes."""
    tensors = random_tensors(CONFIG)
    tensors["model.embed_tokens.weight"][0] = torch.nan
    core = make_core(CONFIG, tensors)
    prompt = random_tokens(126, CONFIG).clamp(min=1).tolist()
    never = {"temperature": 0.0, "logit_bias": {0: -torch.inf}}
    expected = one_by_one(core, prompt, made(never, prompt), 10)
    run_with_guesses(core, [prompt], [made(never, prompt)], [expected], lambda t: [*t[:2], 0, 0])

    always = made({"logit_bias": {0: 1000.0}}, prompt)
    sequence = core.new_sequence()
    with pytest.raises(RuntimeError, match="not a number"):
        core.step([(sequence, [*prompt, 0], 1, always, 1)])
    assert sequence.length == 0
    ((sample,),) = core.step([(sequence, prompt, 1, always)])
    assert sample.token == 0


def test_failed_steps_change_nothing(core: _gptoss.Core) -> None:
    """Bad numbers of guesses, and a step that fails for another sequence's sake."""
    prompt, options = random_tokens(130, CONFIG).tolist(), SAMPLERS[3]
    expected = one_by_one(core, prompt, made(options, prompt), 12)
    drawing, sequence = made(options, prompt), core.new_sequence()
    other = core.new_sequence()
    impossible = sampler(VOCAB, logit_bias=dict.fromkeys(range(VOCAB), -torch.inf))
    right = [token for token, _, _ in expected]
    before = core.cache_stats(), core.free_pages()
    for items, error, message in (
        ([(sequence, prompt, 1, drawing, -1)], ValueError, "between 0 and 63"),
        ([(sequence, prompt, 1, drawing, 64)], ValueError, "between 0 and 63"),
        ([(sequence, prompt[:3], 1, drawing, 3)], ValueError, "between 0 and 2"),
        ([(sequence, prompt, 1, None, 1)], ValueError, "must have a sampler"),
        ([(sequence, prompt, 2, drawing, 1)], ValueError, "sampler"),
        ([(sequence, prompt, 1)], ValueError, "an item must be"),
        (
            [(sequence, prompt + right[:3], 1, drawing, 3), (other, [1, 2], 1, impossible, 1)],
            RuntimeError,
            "nothing can be sampled",
        ),
    ):
        with pytest.raises(error, match=message):
            core.step(items)
        assert (sequence.length, other.length) == (0, 0)
        assert (core.cache_stats(), core.free_pages()) == before
    run_with_guesses(core, [prompt], [drawing], [expected], lambda true: true[:3])


def test_guesses_that_do_not_fit_are_an_error() -> None:
    core = make_core(CONFIG, random_tensors(CONFIG), max_context=256, max_sequences=2)
    sequences = [core.new_sequence() for _ in range(3)]
    for sequence, n in zip(sequences, (256, 127, 1), strict=True):
        core.step([(sequence, [1] * n, 0, None)])
    drawing = sampler(VOCAB, temperature=0.0)
    with pytest.raises(_gptoss.CacheFull, match="of the full layers are in use, and 1 more"):
        core.step([(sequences[1], [1, 2], 1, drawing, 1)])
    ((sample,),) = core.step([(sequences[1], [1], 1, drawing)])
    assert sequences[1].length == 128
    with pytest.raises(ValueError, match="max_context"):
        core.step([(sequences[0], [sample.token], 1, drawing)])


def test_prefix_cache_holds_only_what_came_true() -> None:
    """Wrong guesses over the end of a page are not registered with it."""
    core = make_core(CONFIG, random_tensors(CONFIG), max_context=1024, prefix_cache=True)
    prompt = random_tokens(120, CONFIG).tolist()
    expected = one_by_one(core, prompt, sampler(VOCAB, seed=3), 150)
    tokens = prompt + [token for token, _, _ in expected]
    chance = random.Random(0)

    def guess(true: list[int]) -> list[int]:
        return guesses_of(chance, true, 20)

    core = make_core(CONFIG, random_tensors(CONFIG), max_context=1024, prefix_cache=True)
    samplers, ids = [sampler(VOCAB, seed=3)], torch.tensor(tokens)
    sequences, _, _ = run_with_guesses(core, [prompt], samplers, [expected], guess)
    assert core.cache_stats()["cached_pages"] == 2
    again = core.new_sequence()
    assert again.reuse(tokens) == 256
    got: Tensor = feed(core, [(again, ids[256:])])[0]
    alone = core_logits(core, ids)[256:]
    assert torch.equal(got.view(torch.int32), alone.view(torch.int32))
    for sequence in (*sequences, again):
        sequence.close()
    assert core.cache_stats()["full_in_use"] == 0


def test_pages_of_wrong_guesses_come_back_at_once(core: _gptoss.Core) -> None:
    prompt, drawing = random_tokens(100, CONFIG).tolist(), sampler(VOCAB, temperature=0.0)
    ((true, *_),) = one_by_one(core, prompt, drawing, 1)
    sequence = core.new_sequence()
    core.step([(sequence, prompt + [(true + 1) % VOCAB] * 60, 1, drawing, 60)])
    assert sequence.length == 100
    stats = core.cache_stats()
    assert (stats["full_in_use"], stats["window_in_use"]) == (1, 1)
