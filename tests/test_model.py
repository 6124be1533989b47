"""The whole model: against transformers and float64, and the same bits however it is fed."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from errors import assert_same_bits, mean_kl, median_error
from gptoss import Model, _gptoss
from mutations import MUTATIONS, broken
from reference import ENGINE, EXACT, SINGLE, Config
from small_models import (
    CONFIGS,
    DEVICE,
    core_logits,
    feed,
    make_core,
    mutation_config,
    random_tensors,
    random_tokens,
    small,
    transformers_logits,
    transformers_model,
    untrained_tensors,
    write_checkpoint,
)
from torch import Tensor

LENGTHS = (1, 127, 128, 129, 300)
PAGE = 128  # tokens to a page of the cache
ROUNDING_SLACK = 1.25  # how much more than plain torch's own the engine's error may be by chance


def cache_bytes_per_token(config: Config) -> int:
    """Of one layer: a bfloat16 key and value of each key/value head."""
    return 2 * 2 * config.n_kv_heads * config.head_dim


# --- against transformers ------------------------------------------------------------------------


def short_prompts(config: Config, n: int) -> list[Tensor]:
    """Single tokens come many at once: what one token's rounding does is chance."""
    return [random_tokens(n, config, seed) for seed in range(32 if n == 1 else 1)]


@cache
def short_prompt_logits(name: str, n: int) -> tuple[Tensor, float]:
    """transformers' logits in float32, and the error of torch with the engine's roundings."""
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    model = transformers_model(config, tensors, torch.float32)
    prompts = short_prompts(config, n)
    theirs = torch.cat([transformers_logits(model, tokens) for tokens in prompts])
    plain = torch.cat([reference.forward(tokens, tensors, config, ENGINE) for tokens in prompts])
    return theirs, median_error(plain, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(forced_isa: str, name: str) -> None:
    """As near to transformers in float32 as torch with the engine's roundings is."""
    config = CONFIGS[name]
    core = make_core(config, random_tensors(config), invariant=False)
    errors = {}
    for n in LENGTHS:
        theirs, plain_error = short_prompt_logits(name, n)
        ours = torch.cat([core_logits(core, tokens) for tokens in short_prompts(config, n)])
        errors[n] = median_error(ours, theirs), ROUNDING_SLACK * plain_error
    assert all(error <= bound for error, bound in errors.values()), errors


def test_long_prompt_is_transformers() -> None:
    """4097 tokens: beyond YaRN's original context, in steps of 512, over 33 pages."""
    config = small(4, n_heads=2, n_kv_heads=1)
    tensors, tokens = random_tensors(config), random_tokens(4097, config)
    model = transformers_model(config, tensors, torch.float32)
    theirs = transformers_logits(model, tokens)
    plain = reference.forward(tokens, tensors, config, ENGINE)
    ours = core_logits(make_core(config, tensors, invariant=False), tokens)
    for part in (slice(0, 128), slice(128, 4000), slice(4000, 4097)):
        bound = ROUNDING_SLACK * median_error(plain[part], theirs[part])
        assert median_error(ours[part], theirs[part]) <= bound


def test_files_give_the_same_logits(tmp_path: Path) -> None:
    """From a checkpoint on disk through the Python package: the bits of the core alone."""
    config, tensors = CONFIGS["32_experts"], random_tensors(CONFIGS["32_experts"])
    tokens = random_tokens(140, config)
    path = write_checkpoint(tmp_path, config, tensors)
    with Model.load(path, DEVICE, invariant=True, progress=False) as model:
        from_files = model.forward(tokens.tolist())  # on a card, the cache takes what is free
    assert_same_bits(from_files, core_logits(make_core(config, tensors), tokens))


ACCURACY_CONFIGS = {
    "4_layers": small(4),
    "8_layers": small(8, hidden_size=352, n_heads=6, n_experts=32, intermediate_size=160),
    "128_experts": small(4, hidden_size=160, n_heads=8, n_kv_heads=4, n_experts=128),
    "12_layers": small(12, hidden_size=224, n_heads=3, n_kv_heads=1, intermediate_size=32),
}


@pytest.mark.parametrize("name", ACCURACY_CONFIGS)
def test_more_accurate_than_bfloat16(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    """300 tokens against float64: at most 0.4 of transformers' error in bfloat16."""
    config = ACCURACY_CONFIGS[name]
    tensors, tokens = untrained_tensors(config), random_tokens(300, config)
    exact = reference.forward(tokens, tensors, config, EXACT)
    theirs = transformers_logits(transformers_model(config, tensors, torch.bfloat16), tokens)
    ours = core_logits(make_core(config, tensors, invariant=False), tokens)
    for measure in (median_error, mean_kl):
        ratio = measure(ours, exact) / measure(theirs, exact)
        record_property(f"{measure.__name__} as a part of bfloat16's", round(ratio, 3))
        assert ratio <= 0.4, f"{measure.__name__}: {ratio:.3f} of transformers' in bfloat16"


# --- the same bits -------------------------------------------------------------------------------


@pytest.fixture(params=("three_layers", "32_experts"))
def config(request: pytest.FixtureRequest) -> Config:
    return CONFIGS[request.param]


def test_prefill_is_decode_is_chunks(forced_isa: str, config: Config) -> None:
    """However a prompt is cut, its logits are the same bits."""
    core = make_core(config, random_tensors(config))
    tokens = random_tokens(300, config)
    whole = core_logits(core, tokens)
    for chunk in (1, 7, 128, 129):
        assert_same_bits(core_logits(core, tokens, chunk), whole)


def test_step_size_does_not_matter(config: Config) -> None:
    tensors, tokens = random_tensors(config), random_tokens(700, config)
    whole = core_logits(make_core(config, tensors, max_batch_tokens=1024), tokens)
    for size in (16, 512):
        core = make_core(config, tensors, max_batch_tokens=size)
        assert_same_bits(core_logits(core, tokens), whole)


def test_wanted_rows_are_the_same_rows(config: Config) -> None:
    """Asking for all logits, the last row's or none changes no bit of what is written."""
    core = make_core(config, random_tensors(config))
    first, second, third = (random_tokens(40, config, seed) for seed in range(3))
    expected = [core_logits(core, tokens) for tokens in (first, second)]
    sequences = [core.new_sequence() for _ in range(3)]
    logits = torch.empty(41, config.vocab_size)
    items = zip(sequences, (first, third, second), (1, 0, 2), strict=True)
    core.step([(sequence, tokens.tolist(), want, None) for sequence, tokens, want in items], logits)
    assert_same_bits(logits, torch.cat((expected[0][-1:], expected[1])))
    assert [sequence.length for sequence in sequences] == [40, 40, 40]


@pytest.mark.parametrize("seed", range(3))
def test_batch_composition_does_not_matter(forced_isa: str, config: Config, seed: int) -> None:
    """Sequences of many lengths, cut at random and mixed at random, are as if each ran alone."""
    chance = random.Random(seed)
    core = make_core(config, random_tensors(config), max_batch_tokens=256)
    lengths = [1, 2, 127, 129, 300, 33, 140, 5]
    prompts = [random_tokens(n, config, 100 * seed + n) for n in lengths]
    alone = [core_logits(core, tokens) for tokens in prompts]
    sequences = [core.new_sequence() for _ in prompts]
    results: list[list[Tensor]] = [[] for _ in prompts]
    while unfinished := [i for i, s in enumerate(sequences) if s.length < lengths[i]]:
        chosen = chance.sample(unfinished, chance.randint(1, len(unfinished)))
        batch, room = [], core.max_batch_tokens - len(chosen)
        for i in chosen:
            n = min(lengths[i] - sequences[i].length, 1 + chance.choice((0, 0, 3, 60, room)))
            n = min(n, 1 + room)
            room -= n - 1
            start = sequences[i].length
            batch.append((sequences[i], prompts[i][start : start + n]))
        for i, logits in zip(chosen, feed(core, batch), strict=True):
            results[i].append(logits)
    for result, expected in zip(results, alone, strict=True):
        assert_same_bits(torch.cat(result), expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are of the CPU backend")
def test_threads_do_not_matter(forced_isa: str, config: Config) -> None:
    tensors, tokens = random_tensors(config), random_tokens(300, config)
    one = core_logits(make_core(config, tensors, threads=1), tokens)
    for threads in (2, 3):
        core = make_core(config, tensors, threads=threads)
        assert core.threads == threads
        assert_same_bits(core_logits(core, tokens), one)
        assert_same_bits(core_logits(core, tokens[:40], chunk=1), one[:40])


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are of the CPU backend")
def test_threads_share_a_long_context(forced_isa: str) -> None:
    """Sequences of very different lengths, token by token: more threads than key/value heads. Their
    work space is planned."""
    config, lengths = small(2, n_heads=4, n_kv_heads=2), (1400, 300, 3)
    tensors, tokens = random_tensors(config), random_tokens(1410, config)

    def run(threads: int) -> tuple[Tensor, int]:
        core = make_core(config, tensors, threads=threads, max_context=1410)
        sequences = [core.new_sequence() for _ in lengths]
        for sequence, n in zip(sequences, lengths, strict=True):
            for part in tokens[:n].split(core.max_batch_tokens):
                feed(core, [(sequence, part)])
        steps = [
            feed(core, [(s, tokens[n + i :][:1]) for s, n in zip(sequences, lengths, strict=True)])
            for i in range(3)
        ]
        return torch.cat([row for step in steps for row in step]), core.memory()["workspace"]

    one, planned = run(1)
    for threads in (3, 16):
        logits, more = run(threads)
        assert_same_bits(logits, one)
        rows = (4 * threads - 1) // config.n_kv_heads
        assert more - planned == rows * 6 * config.n_heads * 66 * 4  # 6 chunks of 256 keys


def test_truncated_sequence_continues(config: Config) -> None:
    """After truncate(n), other tokens follow as if what was cut had never been there. What a window
    layer no longer keeps cannot be returned to, except to the start."""
    core = make_core(config, random_tensors(config))
    start, wrong, right = (random_tokens(n, config, n) for n in (200, 50, 250))
    expected = core_logits(core, torch.cat((start, right)))
    sequence = core.new_sequence()
    feed(core, [(sequence, torch.cat((start, wrong)))])
    sequence.truncate(200)
    assert sequence.length == 200
    assert_same_bits(feed(core, [(sequence, right)])[0], expected[200:])
    for length in (200, 451, -1):
        with pytest.raises(ValueError, match="truncate"):
            sequence.truncate(length)
    assert sequence.length == 450
    sequence.truncate(0)
    assert_same_bits(feed(core, [(sequence, start)])[0], expected[:200])


def test_refused_steps_change_nothing(config: Config) -> None:
    """Every bad step is a ValueError that says what is wrong, and leaves all sequences alone."""
    core = make_core(config, random_tensors(config), max_batch_tokens=64, max_context=100)
    one, two, closed = (core.new_sequence() for _ in range(3))
    closed.close()
    tokens, vocab = random_tokens(90, config), config.vocab_size
    feed(core, [(one, tokens[:60])])
    logits = torch.empty(1, vocab)
    stranger = make_core(config, random_tensors(config)).new_sequence()
    sampler = _gptoss.Sampler(vocab)
    bad_steps = (
        ("empty", [], None),
        ("empty", [(one, [], 1, None)], logits),
        ("vocabulary", [(one, [vocab], 1, None)], logits),
        ("vocabulary", [(two, [1], 0, None), (one, [-1], 1, None)], logits),
        ("ints", [(one, [1.5], 1, None)], logits),
        ("max_context", [(one, tokens[:41].tolist(), 1, None)], logits),
        ("at most 64", [(one, tokens[:30].tolist(), 0, None), (two, [1] * 35, 0, None)], None),
        ("twice", [(one, [1], 0, None), (one, [2], 0, None)], None),
        ("another model", [(one, [1], 0, None), (stranger, [2], 0, None)], None),
        ("closed", [(one, [1], 0, None), (closed, [2], 0, None)], None),
        ("want", [(one, [1], 3, None)], logits),
        ("sampler", [(one, [1], 2, sampler)], logits),
        ("sampler", [(one, [1], 1, _gptoss.Sampler(vocab + 1))], logits),
        ("logits", [(one, [1, 2], 2, None)], logits),
        ("logits", [(one, [1], 1, None)], logits.double()),
        ("logits", [(one, [1], 1, None)], torch.empty(1, 2 * vocab)[:, ::2]),
    )
    for message, items, out in bad_steps:
        with pytest.raises(ValueError, match=message):
            core.step(items, out)
        assert (one.length, two.length) == (60, 0)
    expected = core_logits(core, tokens)
    assert_same_bits(feed(core, [(one, tokens[60:])])[0], expected[60:])


# --- what others got wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_are_caught(mistake: str) -> None:
    """The engine disagrees with the reference as soon as that makes one of the known mistakes."""
    config = mutation_config(mistake)
    tensors, tokens = random_tensors(config), random_tokens(600, config)
    ours = core_logits(make_core(config, tensors), tokens)
    right = reference.forward(tokens, tensors, config, ENGINE)
    with broken(mistake):
        wrong = reference.forward(tokens, tensors, config, ENGINE)
    near = median_error(ours, right)
    assert near < 0.1 * median_error(right, reference.forward(tokens, tensors, config, EXACT))
    assert median_error(ours, wrong) > 10 * near


def test_router_bias_of_one_expert(config: Config) -> None:
    """A bias of 50 sends every token to expert 3 with all the weight."""
    tensors = random_tensors(config)
    for layer in range(config.n_layers):
        tensors[f"model.layers.{layer}.mlp.router.bias"][3] = 50
    tokens = random_tokens(100, config)
    exact = reference.forward(tokens, tensors, config, EXACT)
    plain = reference.forward(tokens, tensors, config, ENGINE)
    ours = core_logits(make_core(config, tensors), tokens)
    assert median_error(ours, exact) <= ROUNDING_SLACK * median_error(plain, exact)


def test_residual_beyond_half_precision() -> None:
    """A residual stream of 1e6 (float16 ends at 65504) is carried as well as one of 1."""
    config = CONFIGS["three_layers"]
    tensors = random_tensors(config)
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "o_proj.bias")):
            tensors[name] = (tensors[name].float() * 1e6).bfloat16()
    tokens = random_tokens(200, config)
    exact = reference.forward(tokens, tensors, config, EXACT)
    plain = reference.forward(tokens, tensors, config, ENGINE)
    ours = core_logits(make_core(config, tensors), tokens)
    assert ours.isfinite().all()
    assert median_error(ours, exact) <= ROUNDING_SLACK * median_error(plain, exact)


@pytest.mark.parametrize("poison", (torch.nan, torch.inf))
def test_pages_of_a_poisoned_sequence(forced_isa: str, poison: float) -> None:
    """NaN in the cache of one sequence reaches no other: not in the same batch, not in pages that
    are used again, not behind the end of a truncated sequence."""
    config = CONFIGS["three_layers"]
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"][0] = poison
    core = make_core(config, tensors)
    tokens = random_tokens(150, config).clamp(min=1)
    clean = core_logits(core, tokens)

    poisoned, other = core.new_sequence(), core.new_sequence()
    bad, good = feed(core, [(poisoned, torch.zeros(300, dtype=torch.int64)), (other, tokens)])
    assert bad.isnan().all()
    assert_same_bits(good, clean)
    poisoned.close()
    assert_same_bits(core_logits(core, tokens), clean)

    feed(core, [(other, torch.zeros(100, dtype=torch.int64))])
    other.truncate(10)
    assert_same_bits(feed(core, [(other, tokens[10:])])[0], clean[10:])


# --- the cache -----------------------------------------------------------------------------------


def test_cache_of_window_layers_is_bounded() -> None:
    """Three window layers keep what the window sees, one full layer keeps everything."""
    config = small(4, n_heads=2, n_kv_heads=1, layer_windows=(128, 128, 128, 0))
    core = make_core(config, random_tensors(config), max_batch_tokens=256)
    sequence, per_token = core.new_sequence(), cache_bytes_per_token(config)
    used = {}
    for tokens in random_tokens(4096, config).split(256):
        feed(core, [(sequence, tokens)])
        used[sequence.length] = core.memory()["cache_used"]
    full_layer = 2048 * per_token
    assert used[4096] - used[2048] == full_layer
    pages_kept = (used[4096] - 4096 * per_token) / (3 * PAGE * per_token)
    assert 1 <= pages_kept <= 2 + 256 / PAGE
    sequence.close()
    assert core.memory()["cache_used"] == 0


def test_window_pages_suffice() -> None:
    """Whatever steps as many sequences as there may be take, the window layers' pool, which holds
    little more than their windows, has the pages."""
    chance = random.Random(1)
    config = small(1, hidden_size=32, n_heads=1, n_kv_heads=1, n_experts=4, intermediate_size=32)
    core = make_core(config, random_tensors(config), max_sequences=3, max_batch_tokens=300)
    sequences = [core.new_sequence() for _ in range(3)]
    for _ in range(40):
        chosen = chance.sample(sequences, chance.randint(1, 3))
        cuts = sorted(chance.sample(range(1, 300), len(chosen) - 1))
        counts = [end - start for start, end in zip([0, *cuts], [*cuts, 300], strict=True)]
        core.step([(s, [1] * n, 0, None) for s, n in zip(chosen, counts, strict=True)])
        for sequence in chosen:
            if sequence.length > 2000:
                sequence.truncate(0)
    with pytest.raises(RuntimeError, match="pages of 128 tokens of the window layers are in use"):
        others = [core.new_sequence() for _ in range(9)]
        for sequence in others:
            core.step([(sequence, [1] * 129, 0, None)])


def test_cache_is_freed_with_the_sequence() -> None:
    config = CONFIGS["one_layer"]
    core = make_core(config, random_tensors(config))
    sequence = core.new_sequence()
    feed(core, [(sequence, random_tokens(250, config))])
    held = core.memory()["cache_used"]
    sequence.truncate(100)
    assert 0 < core.memory()["cache_used"] < held
    del sequence
    assert core.memory()["cache_used"] == 0


def test_long_context_in_one_precision_step() -> None:
    """A model of one full layer at 4097 tokens: what its last token sees is right to rounding."""
    config = small(1, layer_windows=(0,))
    tensors, tokens = random_tensors(config), random_tokens(4097, config)
    plain = reference.forward(tokens, tensors, config, ENGINE)[-64:]
    single = reference.forward(tokens, tensors, config, SINGLE)[-64:]
    ours = core_logits(make_core(config, tensors), tokens)[-64:]
    assert median_error(ours, plain) < 0.1 * median_error(plain, single)
