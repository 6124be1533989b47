"""The core's sampler against the plain formula, and its stop strings against a plain search."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gptoss import _gptoss
from sampling_cases import VOCAB, assert_drawn_from, mask_of, probabilities, sampler
from small_models import CONFIGS, make_core, random_tensors, random_tokens
from torch import Tensor

DRAWS = 20_000


def random_logits(seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """float32 [vocab], some of them negative."""
    return 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


FILTERS = (
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB + 5},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.7, "min_p": 0.05, "temperature": 1.5},
    {"logit_bias": {3: 4.0, 5: -100.0, 59: 1.5}},
)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_distribution_is_the_formula(options: dict) -> None:
    logits, drawing = random_logits(), sampler(seed=1, **options)
    draws = [drawing.sample(logits, position).token for position in range(DRAWS)]
    assert_drawn_from(probabilities(logits, **options), draws)


PENALTIES = (
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 1.5},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "logit_bias": {7: 2.0},
        "temperature": 0.8,
        "top_p": 0.9,
    },
)


@pytest.mark.parametrize("options", PENALTIES, ids=str)
def test_penalties_are_the_formula(options: dict) -> None:
    """Repetition counts the prompt and the output, presence and frequency the output alone.

    Every draw changes the odds of the next, so the counts are compared with the sum of the
    probabilities that the formula gave before each.
    """
    prompt, output, logits = [0, 1, 2, 2, 58], [], random_logits()
    drawing = sampler(seed=2, **options)
    drawing.observe_prompt(prompt)
    config = {**options, "prompt": prompt, "output": output}
    expected, observed = torch.zeros(VOCAB).double(), torch.zeros(VOCAB).double()
    variance = torch.zeros(VOCAB).double()
    for position in range(1000):
        if position % 20 == 0:  # start anew, so that the penalties stay small
            drawing, output = sampler(seed=2, **options), []
            drawing.observe_prompt(prompt)
        p = probabilities(logits, **{**config, "output": output})
        token = drawing.sample(logits, position).token
        assert p[token] > 0
        output.append(token)
        drawing.record(token)
        observed[token] += 1
        expected += p
        variance += p * (1 - p)
    assert ((observed - expected).abs() <= 5 * variance.sqrt() + 1).all()


def test_greedy_takes_the_largest() -> None:
    logits = random_logits()
    assert sampler(temperature=0.0).sample(logits, 0).token == logits.argmax()
    logits[[11, 40]] = 50.0
    assert sampler(temperature=0.0).sample(logits, 0).token == 11
    assert sampler(temperature=0.0, logit_bias={40: 1.0}).sample(logits, 0).token == 40


def test_ties_go_to_the_lower_id() -> None:
    """In top_k and top_p, over a whole vocabulary of equal logits."""
    vocab = 201088
    logits = torch.zeros(vocab)
    drawn = {sampler(vocab, top_k=3).sample(logits, position).token for position in range(100)}
    assert drawn == {0, 1, 2}
    half = [sampler(vocab, top_p=0.5).sample(logits, position).token for position in range(50)]
    assert max(half) < vocab // 2
    assert max(half) > vocab // 4


def test_extreme_logits() -> None:
    """No overflow: a token of probability 1, and tokens that cannot be drawn."""
    logits = torch.full((VOCAB,), -torch.inf)
    logits[9] = 1e30
    for options in ({}, {"temperature": 0.01}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.5}):
        assert sampler(**options).sample(logits, 0).token == 9
    two = torch.full((VOCAB,), -1e30)
    two[[4, 8]] = 3.0
    tokens = {sampler(temperature=100.0).sample(two, position).token for position in range(100)}
    assert tokens == {4, 8}


@pytest.mark.parametrize("broken", (torch.nan, torch.inf))
def test_logits_that_are_no_numbers_are_an_error(broken: float) -> None:
    logits = random_logits()
    logits[5] = broken
    with pytest.raises((ValueError, RuntimeError), match="logits"):
        sampler().sample(logits, 0)
    with pytest.raises((ValueError, RuntimeError), match="logits"):
        sampler().sample(torch.full((VOCAB,), -torch.inf), 0)


# --- seeds ---------------------------------------------------------------------------------------


def test_draw_depends_on_seed_and_position_alone() -> None:
    logits = random_logits()
    positions = list(range(500))
    forwards = sampler(seed=7)
    tokens = {position: forwards.sample(logits, position).token for position in positions}
    for position in reversed(positions):
        assert sampler(seed=7).sample(logits, position).token == tokens[position]


def test_seeds_and_positions_are_independent() -> None:
    """Neighbouring positions, neighbouring seeds, and seeds that differ in their high bits only:
    pairs of draws from a uniform distribution over 8 are uniform over 64."""
    logits, n = torch.zeros(8), 8000
    seeds = (0, 1, 2**32, 2**63, 2**64 - 1)
    draws = {
        seed: [sampler(8, seed=seed).sample(logits, position).token for position in range(n + 1)]
        for seed in seeds
    }
    uniform = torch.full((64,), 1 / 64).double()
    for seed in seeds:
        pairs = zip(draws[seed][:-1], draws[seed][1:], strict=True)
        assert_drawn_from(uniform, [8 * a + b for a, b in pairs])
        if seed:
            pairs = zip(draws[0], draws[seed], strict=True)
            assert_drawn_from(uniform, [8 * a + b for a, b in pairs])


MASKED = (
    {},
    {"temperature": 0.5, "top_k": 3},
    {"top_k": 40},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"logit_bias": {0: 9.0, 33: 3.0}, "top_p": 0.9},
)


@pytest.mark.parametrize("allowed", (range(0, VOCAB, 3), range(30, 35), [59]), ids=str)
@pytest.mark.parametrize("options", MASKED, ids=str)
def test_mask_leaves_the_formula_of_what_it_allows(options: dict, allowed: Sequence[int]) -> None:
    logits, drawing = random_logits(), sampler(seed=2, **options)
    drawing.allow(mask_of(allowed))
    draws = [drawing.sample(logits, position).token for position in range(DRAWS // 4)]
    assert_drawn_from(probabilities(logits, allowed=allowed, **options), draws)


def test_mask_comes_before_penalties_and_leaves_logprobs() -> None:
    """The best of what is allowed, after its penalty; log probabilities are the model's."""
    logits = random_logits()
    logits[[4, 9, 20]] = torch.tensor([30.0, 20.0, 19.5])
    greedy = sampler(temperature=0.0, presence_penalty=1.0, logprobs=2)
    greedy.record(9)
    log_probabilities = logits.double().log_softmax(-1)
    for mask, token in ((None, 4), (mask_of([9, 20, 33]), 20), (mask_of([33]), 33), (None, 4)):
        greedy.allow(mask)
        got = greedy.sample(logits, 0)
        assert got.token == token
        assert got.logprob == pytest.approx(log_probabilities[token].item(), abs=1e-6)
        assert [id for id, _ in got.top] == [4, 9]


def test_bad_masks_are_refused() -> None:
    """And the one before stays. Bits past the vocabulary allow nothing."""
    one, logits = sampler(temperature=0.0), random_logits()
    one.allow(mask_of([17]))
    outside = np.zeros(2, np.uint32)
    outside[1] = 0xF0000000
    for mask, message in (
        (mask_of([]), "allows none"),
        (outside, "allows none"),
        (np.ones(1, np.uint32), "of 2 words"),
        (np.ones(3, np.uint32), "of 2 words"),
        (np.ones(2, np.int64), "uint32"),
        (np.ones((2, 1), np.uint32), "one-dimensional"),
        (np.ones(4, np.uint32)[::2], "contiguous"),
        ([1, 1], "uint32"),
    ):
        with pytest.raises(ValueError, match=message):
            one.allow(mask)
        assert one.sample(logits, 0).token == 17
    logits[17] = -torch.inf
    with pytest.raises(RuntimeError, match="nothing can be sampled"):
        one.sample(logits, 0)


def test_sequence_repeats_whatever_it_is_batched_with() -> None:
    config = CONFIGS["one_layer"]
    core = make_core(config, random_tensors(config))
    prompts = [random_tokens(n, config, n).tolist() for n in (5, 130, 40)]

    def generate(chosen: Sequence[int]) -> dict[int, list[int]]:
        """30 tokens for each of the chosen prompts, all in the same steps."""
        drawing = {i: sampler(config.vocab_size, seed=i, presence_penalty=0.5) for i in chosen}
        sequences = {i: core.new_sequence() for i in chosen}
        pending, tokens = {i: prompts[i] for i in chosen}, {i: [] for i in chosen}
        for _ in range(30):
            samples = core.step([(sequences[i], pending[i], 1, drawing[i]) for i in chosen])
            for i, (sample,) in zip(chosen, samples, strict=True):
                tokens[i].append(sample.token)
                pending[i] = [sample.token]
        return tokens

    together = generate((2, 0, 1))
    assert all(generate((i,))[i] == together[i] for i in together)


# --- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_the_models() -> None:
    """Of the logits as the model gave them, before bias, penalties, temperature and filters."""
    logits = random_logits()
    expected = logits.double().log_softmax(-1)
    changed = dict(temperature=0.5, top_k=2, logit_bias={4: 9.0}, repetition_penalty=1.5)
    for options in ({}, changed):
        sample = sampler(logprobs=5, **options).sample(logits, 0)
        assert sample.logprob == pytest.approx(expected[sample.token].item(), abs=1e-12)
        best = logits.argsort(descending=True)[:5].tolist()
        assert [token for token, _ in sample.top] == best
        assert [value for _, value in sample.top] == pytest.approx(expected[best].tolist())


def test_number_of_logprobs() -> None:
    logits = random_logits()
    assert sampler(logprobs=0).sample(logits, 0).top == []
    assert sampler(logprobs=-1).sample(logits, 0).top == []
    assert len(sampler(logprobs=VOCAB).sample(logits, 0).top) == VOCAB
    tied = sampler(logprobs=3).sample(torch.zeros(VOCAB), 0).top
    assert tied == [(token, pytest.approx(-math.log(VOCAB))) for token in range(3)]


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    (
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {0: math.nan}),
        ("logprobs", -2),
        ("logprobs", VOCAB + 1),
    ),
)
def test_bad_option_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        sampler(**{field: value})


def test_bad_arguments_are_refused() -> None:
    for tokens in ([VOCAB], [-1], [0, 2**31 - 1]):
        with pytest.raises(ValueError, match="token"):
            sampler(repetition_penalty=2.0).observe_prompt(tokens)
    for logits in (
        torch.zeros(VOCAB + 1),
        torch.zeros(VOCAB - 1),
        torch.zeros(VOCAB).double(),
        torch.zeros(2, VOCAB),
        torch.zeros(2 * VOCAB)[::2],
    ):
        with pytest.raises(ValueError, match="logits"):
            sampler().sample(logits, 0)


# --- stop strings --------------------------------------------------------------------------------


def plainly_stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first (of several: the longest)."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def could_become_a_stop(text: str, stops: list[str]) -> int:
    """Length of the longest end of the text that is a beginning of a stop string."""
    ends = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(ends, default=0)


def test_stop_strings_by_example() -> None:
    matcher = _gptoss.StopMatcher(["\n\n", "END"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two EN") == ("\ntwo ", False)
    assert matcher.push("OUGH") == ("ENOUGH", False)
    assert matcher.push("\n") == ("", False)
    assert matcher.push("\nthree") == ("", True)


def test_flush_gives_what_was_held_back() -> None:
    matcher = _gptoss.StopMatcher(["stop"])
    assert matcher.push("non-sto") == ("non-", False)
    assert matcher.flush() == "sto"
    assert matcher.flush() == ""


def test_no_stops_hold_nothing_back() -> None:
    assert _gptoss.StopMatcher([]).push("anything") == ("anything", False)
    with pytest.raises(ValueError, match="stop"):
        _gptoss.StopMatcher(["a", ""])


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_in_any_pieces(seed: int) -> None:
    """However the text is cut: the same text is shown, and as much of it as is safe at once."""
    chance = random.Random(seed)
    letters = "abé" if seed % 2 else "ab€\n"
    for _ in range(100):
        stops = [
            "".join(chance.choices(letters, k=chance.randint(1, 5)))
            for _ in range(chance.randint(1, 3))
        ]
        text = "".join(chance.choices(letters, k=30))
        matcher, shown, read, stopped = _gptoss.StopMatcher(stops), "", "", False
        while len(read) < len(text) and not stopped:
            piece = text[len(read) : len(read) + chance.randint(0, 6)]
            read += piece
            safe, stopped = matcher.push(piece)
            shown += safe
            if not stopped:
                assert shown == read[: len(read) - could_become_a_stop(read, stops)]
        shown += "" if stopped else matcher.flush()
        assert (shown, stopped) == plainly_stopped(text, stops), (text, stops)
