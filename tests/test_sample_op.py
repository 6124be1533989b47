"""The backend's `sample` (on the CPU, or the CUDA kernels: GPTOSS_TEST_DEVICE) against a sampler's.

Both follow the order of csrc/sampling.h. The kernels add probabilities in less precision, so a draw
within 1e-6 of the boundary between two tokens may fall on its other side, and so may the end of
top_p: `assert_drawn` allows for that alone.
"""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from gptoss import _gptoss
from sampling_cases import assert_drawn_from, mask_of, probabilities, sampler
from small_models import CONFIGS, make_core, make_ops, random_tensors, random_tokens
from torch import Tensor

SLACK = 1e-6
VOCABS = (1, 2, 37, 256, 257, 512, 5000)


@pytest.fixture(scope="module")
def ops() -> _gptoss.Ops:
    return make_ops("scalar")


def sample(
    ops: _gptoss.Ops, logits: Tensor, samplers: list, positions: Sequence[int] | None = None
) -> list:
    """One sample a row; checks that the logits are what they were, bit for bit."""
    before = logits.clone()
    samples = ops.sample(logits, samplers, list(positions or range(len(samplers))))
    assert torch.equal(logits.view(torch.int32), before.view(torch.int32))
    return samples


def philox_uniform(seed: int, position: int) -> float:
    """Philox4x32-10 (Salmon et al., SC 2011): the number in [0, 1) of csrc/sampling.cpp."""
    low = 2**32 - 1
    c, k = [position & low, position >> 32, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return ((c[0] << 32 | c[1]) >> 11) * 2.0**-53


def assert_drawn(token: int, logits: Tensor, seed: int, position: int, options: dict) -> None:
    """`token` is the one at the random number's place in the formula's distribution, or next to it
    by rounding, with the nucleus a little smaller or larger."""
    u = philox_uniform(seed, position)
    top_p = options.get("top_p", 1.0)
    off = []
    for slack in (0.0, -SLACK, SLACK) if 0 < top_p < 1 else (0.0,):
        p = probabilities(logits, **{**options, "top_p": max(top_p + slack * top_p, 1e-300)})
        end = p.cumsum(0)
        off.append(max((end[token] - p[token]).item() - u, u - end[token].item()))
        if p[token] > 0 and off[-1] < SLACK:
            return
    pytest.fail(f"token {token} is {off} from the random number {u}: {options}")


def random_options(chance: random.Random, vocab: int) -> dict:
    """Sampling options, each off in some of them."""
    options = {
        "temperature": chance.choice((1.0, 1.0, 0.1, 0.7, 2.5)),
        "top_k": chance.choice((0, 0, 2, 3, 40, vocab // 2, vocab - 1, vocab, 2 * vocab)),
        "top_p": chance.choice((1.0, 1.0, 1e-9, 0.3, 0.9, 0.999)),
        "min_p": chance.choice((0.0, 0.0, 0.02, 0.5)),
        "repetition_penalty": chance.choice((1.0, 1.0, 1.4, 0.7)),
        "presence_penalty": chance.choice((0.0, 0.0, 0.8, -1.0)),
        "frequency_penalty": chance.choice((0.0, 0.0, 0.3)),
    }
    if chance.random() < 0.3:
        tokens = chance.sample(range(vocab), min(vocab, 20))
        options["logit_bias"] = {token: chance.gauss(0, 3) for token in tokens}
    return options


def random_row(chance: random.Random, vocab: int) -> Tensor:
    """float32 [vocab]: wide, narrow, with ties, or with tokens that cannot be drawn."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    row = chance.choice((0.01, 1.0, 4.0)) * torch.randn(vocab, generator=generator)
    kind = chance.randrange(4)
    if kind == 1:
        row = row.round()
    if kind == 2:
        banned = torch.rand(vocab, generator=generator) < 0.5
        banned[chance.randrange(vocab)] = False
        row[banned] = -torch.inf
    return row + chance.choice((0.0, -20.0, 15.0))


def random_allowed(chance: random.Random, row: Tensor) -> list[int]:
    """Few, many or almost all tokens, one of them possible."""
    possible = row.isfinite().nonzero().flatten().tolist()
    share = chance.choice((0.01, 0.5, 0.99))
    return sorted(
        {chance.choice(possible)} | {i for i in range(len(row)) if chance.random() < share}
    )


@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_the_formulas(ops: _gptoss.Ops, vocab: int) -> None:
    """Rows of all kinds in one batch, with and without penalties over a prompt and an output."""
    chance = random.Random(vocab)
    for n in (1, 3, 20):
        logits = torch.stack([random_row(chance, vocab) for _ in range(n)])
        samplers, settings = [], []
        for row in range(n):
            options = random_options(chance, vocab)
            prompt = [chance.randrange(vocab) for _ in range(chance.choice((0, 5, 300)))]
            output = [chance.randrange(vocab) for _ in range(chance.choice((0, 1, 100)))]
            samplers.append(sampler(vocab, seed=row, **options))
            samplers[-1].observe_prompt(prompt)
            for token in output:
                samplers[-1].record(token)
            settings.append(options | {"prompt": prompt, "output": output})
            if chance.random() < 0.4:
                settings[-1]["allowed"] = random_allowed(chance, logits[row])
                samplers[-1].allow(mask_of(settings[-1]["allowed"], vocab))
        positions = [chance.randrange(2**17) for _ in range(n)]
        for row, got in enumerate(sample(ops, logits, samplers, positions)):
            assert_drawn(got.token, logits[row], row, positions[row], settings[row])


@pytest.mark.parametrize("vocab", (201_088, 300_001))
def test_large_vocabulary(ops: _gptoss.Ops, vocab: int) -> None:
    """A peak over a flat rest, filters that leave few and many, ties everywhere."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(vocab, generator=generator)
    peaked = logits.clone()
    peaked[torch.randperm(vocab, generator=generator)[:200]] += 9.0
    cases = [
        (logits, {}),
        (logits, {"top_p": 0.9}),
        (logits, {"top_k": 150_000}),
        (logits, {"top_k": 60_000, "top_p": 0.5, "temperature": 2.0}),
        (peaked, {}),
        (peaked, {"top_k": 50}),
        (peaked, {"top_p": 0.8}),
        (peaked, {"min_p": 0.05}),
        (peaked, {"top_k": 100, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7}),
        (torch.zeros(vocab), {"top_k": 3}),
        (torch.zeros(vocab), {"top_p": 0.5}),
        (torch.zeros(vocab), {"top_k": 1000, "top_p": 0.25}),
    ]
    samplers = [sampler(vocab, seed=i, **options) for i, (_, options) in enumerate(cases)]
    samples = sample(ops, torch.stack([row for row, _ in cases]), samplers)
    for i, (row, options) in enumerate(cases):
        assert_drawn(samples[i].token, row, i, i, options)


def test_greedy(ops: _gptoss.Ops) -> None:
    """The largest, of equals the lowest id, after adjustments; -0 and 0 are equal."""
    for vocab in VOCABS:
        generator = torch.Generator().manual_seed(vocab)
        logits = torch.randn(4, vocab, generator=generator).round(decimals=1)
        logits[3] = torch.where(torch.arange(vocab) > vocab // 2, 0.0, -0.0)
        kinds = ({"temperature": 0.0}, {"top_k": 1}, {"top_k": 1, "temperature": 5.0})
        for options in kinds:
            samples = sample(ops, logits, [sampler(vocab, **options) for _ in range(4)])
            assert [s.token for s in samples] == [*logits.argmax(-1).tolist()[:3], 0]
        forced = sampler(vocab, temperature=0.0, logit_bias={vocab - 1: 1e30})
        banned = sampler(vocab, temperature=0.0, logit_bias={vocab - 1: -math.inf, 0: 100.0})
        samples = sample(ops, logits[:2], [forced, banned])
        assert [s.token for s in samples] == [vocab - 1, 0]


def test_ties_at_a_threshold_go_to_the_lower_id(ops: _gptoss.Ops) -> None:
    """Few values, many ids each: top_k ends among equals, and top_p among what top_k left."""
    vocab = 1000
    logits = (torch.arange(vocab) * 7919 % 5).float()
    order = logits.argsort(descending=True, stable=True)
    for options, kept in (
        ({"top_k": 50}, 50),
        ({"top_k": 250, "temperature": 9.0}, 250),
        ({"top_k": 300, "top_p": 0.5, "temperature": 1e9}, 150),
        ({"top_k": 250, "top_p": 0.999, "temperature": 1e9}, 250),
        ({"top_p": 0.3, "temperature": 1e9}, 300),
        ({"top_k": 203, "top_p": 0.25, "min_p": 1.0}, 51),
    ):
        n = 100
        samplers = [sampler(vocab, seed=seed, **options) for seed in range(n)]
        samples = sample(ops, logits.expand(n, -1).contiguous(), samplers)
        for seed, got in enumerate(samples):
            assert got.token in order[:kept]
            assert_drawn(got.token, logits, seed, seed, options)


DISTRIBUTIONS = (
    {},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"logit_bias": {3: 2.0, 299: 4.0, 5: -math.inf}, "top_p": 0.95},
)


@pytest.mark.parametrize("options", DISTRIBUTIONS, ids=str)
def test_distribution_is_the_formula(ops: _gptoss.Ops, options: dict) -> None:
    """Over positions of one seed; chi-square over the tokens that are expected often enough."""
    vocab, n = 300, 600
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    samplers = [sampler(vocab, seed=5, **options)] * n
    draws = [s.token for s in sample(ops, logits.expand(n, -1).contiguous(), samplers)]
    p = probabilities(logits, **options)
    assert_drawn_from(p, draws)
    counts, expected = torch.bincount(torch.tensor(draws), minlength=vocab), n * p
    often = expected >= 4
    chi = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum())
    assert freedom > 5
    assert chi < freedom + 5 * math.sqrt(2 * freedom)


def test_extreme_logits(ops: _gptoss.Ops) -> None:
    """No overflow, at any temperature."""
    vocab = 300
    sure = torch.full((vocab,), -torch.inf)
    sure[299] = 1e30
    two = torch.full((vocab,), -1e30)
    two[[4, 270]] = 3.0
    filters = ({}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.5}, {"top_p": 1e-9})
    for temperature in (1e-300, 0.01, 1.0, 100.0, 1e300):
        samplers = [sampler(vocab, temperature=temperature, **f) for f in filters]
        rows = sure.expand(len(filters), -1).contiguous()
        assert {s.token for s in sample(ops, rows, samplers)} == {299}
        if temperature <= 100:
            samplers = [sampler(vocab, temperature=temperature, seed=i) for i in range(40)]
            tokens = {s.token for s in sample(ops, two.expand(40, -1).contiguous(), samplers)}
            assert tokens == {4, 270}


# --- errors --------------------------------------------------------------------------------------


def message_of(call: object, *arguments: object) -> str:
    with pytest.raises(RuntimeError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "options", ({}, {"temperature": 0.0}, {"top_k": 3, "logprobs": 2}), ids=str
)
def test_errors_are_the_samplers(ops: _gptoss.Ops, options: dict) -> None:
    """NaN anywhere, no finite maximum before or after the adjustments: the same words."""
    vocab = 300
    good = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    broken, adjust = [], {}
    for place in (0, 131, vocab - 1):
        broken.append(good.clone())
        broken[-1][[place, 77]] = torch.nan
    broken.append(torch.full((vocab,), torch.nan))
    broken.append(torch.full((vocab,), -torch.inf))
    broken.append(good.clone())
    broken[-1][5] = torch.inf
    for row in broken:
        one = sampler(vocab, **options)
        message = message_of(one.sample, row, 3)
        assert "logits" in message
        rows = torch.stack([good, row])
        assert message_of(sample, ops, rows, [one, one], [3, 3]) == message
    adjust = {token: -math.inf for token in range(vocab)}
    one = sampler(vocab, logit_bias=adjust, **options)
    assert message_of(sample, ops, good[None], [one]) == message_of(one.sample, good, 0)
    huge = sampler(vocab, repetition_penalty=1e-300, **options)
    huge.observe_prompt([int(good.argmax())])
    assert message_of(sample, ops, good[None], [huge]) == message_of(huge.sample, good, 0)
    assert sample(ops, good[None], [sampler(vocab, **options)])[0].token >= 0  # and goes on


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_are_the_samplers(ops: _gptoss.Ops, vocab: int) -> None:
    """Of the given logits, whatever is done to them before the draw; ties to the lower id; more
    than the kernels give; some rows with, some without."""
    chance = random.Random(vocab)
    rows, samplers, prompt = [], [], list(range(0, vocab, 3))
    for n_top in (-1, 0, 1, 2, 20, 32, 33, 100):
        for options in ({}, {"temperature": 0.0}, random_options(chance, vocab)):
            rows.append(random_row(chance, vocab))
            samplers.append(sampler(vocab, **(options | {"logprobs": min(n_top, vocab)})))
            samplers[-1].observe_prompt(prompt)
            samplers[-1].record(vocab - 1)
    for i, got in enumerate(sample(ops, torch.stack(rows), samplers)):
        expected = samplers[i].sample(rows[i], i)
        logprobs = rows[i].double().log_softmax(-1)
        assert [token for token, _ in got.top] == [token for token, _ in expected.top]
        values = [value for _, value in expected.top]
        assert [value for _, value in got.top] == pytest.approx(values, abs=1e-5)
        wants = i >= 3
        assert got.logprob == pytest.approx(logprobs[got.token].item() if wants else 0, abs=1e-5)


# --- the same every time -------------------------------------------------------------------------


def mixed_batch(vocab: int, n: int) -> tuple[Tensor, list]:
    """Rows and samplers of all kinds."""
    chance = random.Random(n)
    rows = torch.stack([random_row(chance, vocab) for _ in range(n)])
    samplers = [
        sampler(vocab, seed=i, logprobs=i % 7 - 1, **random_options(chance, vocab))
        for i in range(n)
    ]
    for one in samplers:
        one.observe_prompt([chance.randrange(vocab) for _ in range(30)])
        one.record(chance.randrange(vocab))
    for i in range(0, n, 3):
        samplers[i].allow(mask_of(random_allowed(chance, rows[i]), vocab))
    return rows, samplers


def plain(samples: list) -> list:
    return [(s.token, s.logprob, s.top) for s in samples]


def test_row_does_not_depend_on_its_batch(ops: _gptoss.Ops) -> None:
    rows, samplers = mixed_batch(700, 21)
    together = plain(sample(ops, rows, samplers))
    assert plain(sample(ops, rows, samplers)) == together
    backwards = plain(sample(ops, rows.flip(0), samplers[::-1], range(20, -1, -1)))
    assert backwards[::-1] == together
    for i in range(21):
        assert (
            plain(sample(ops, rows[i : i + 1].clone(), [samplers[i]], [i])) == together[i : i + 1]
        )


@pytest.mark.parametrize("seed", ("1", "2", "3"))
def test_order_of_threads_does_not_matter(
    ops: _gptoss.Ops, seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the emulator, threads and blocks run in another order; elsewhere, simply again."""
    rows, samplers = mixed_batch(900, 12)
    rows[5:] = rows[5:].round()
    first = plain(sample(ops, rows, samplers))
    monkeypatch.setenv("GPTOSS_EMULATOR_SEED", seed)
    assert plain(sample(ops, rows, samplers)) == first


def test_bad_arguments_are_refused(ops: _gptoss.Ops) -> None:
    one = sampler(10)
    with pytest.raises(ValueError, match="samplers, positions"):
        ops.sample(torch.zeros(2, 10), [one], [0])
    with pytest.raises(ValueError, match="vocabulary of 10, not 11"):
        ops.sample(torch.zeros(1, 11), [one], [0])


def test_model_samples_as_its_logits_say() -> None:
    """Through Core.step: several sequences in a step, logits copied out beside the samples."""
    config = CONFIGS["one_layer"]
    core = make_core(config, random_tensors(config))
    vocab, settings = config.vocab_size, ({}, {"temperature": 0.0}, {"top_p": 0.7, "logprobs": 3})
    sequences = [core.new_sequence() for _ in settings]
    samplers = [
        sampler(vocab, **({"seed": i, "presence_penalty": 0.7} | options))
        for i, options in enumerate(settings)
    ]
    tokens = [random_tokens(3 + i, config, i).tolist() for i in range(3)]
    outputs: list[list[int]] = [[], [], []]
    lengths = [0, 0, 0]
    for step in range(8):
        # Masks come, change and go between steps that are replays of one another.
        allowed = [
            None if (step + i) % 3 == 0 else list(range((step + 5 * i) % 7, vocab, 7))
            for i in range(3)
        ]
        for one, tokens_allowed in zip(samplers, allowed, strict=True):
            one.allow(None if tokens_allowed is None else mask_of(tokens_allowed, vocab))
        logits = torch.empty(3, vocab)
        items = [(sequences[i], tokens[i], 1, samplers[i]) for i in range(3)]
        for i, (got,) in enumerate(core.step(items, logits)):
            lengths[i] += len(tokens[i])
            options = {k: v for k, v in settings[i].items() if k != "logprobs"}
            options |= {"presence_penalty": 0.7, "output": list(outputs[i]), "allowed": allowed[i]}
            if options.get("temperature") == 0:
                options |= {"temperature": 1.0, "top_k": 1}
            assert_drawn(got.token, logits[i], i, lengths[i], options)
            assert len(got.top) == (3 if i == 2 else 0)
            outputs[i].append(got.token)
            tokens[i] = [got.token]
