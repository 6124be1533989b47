"""The prefix cache: pages that sequences share have the bits of computing them, only true matches
match, and every page comes back."""

import random
from contextlib import suppress
from functools import cache

import pytest
import torch
from gptoss import _gptoss
from small_models import CONFIGS, core_logits, feed, make_core, random_tensors, random_tokens, small
from torch import Tensor

PAGE = 128
SMALL = dict(hidden_size=32, n_heads=1, n_kv_heads=1, n_experts=4, intermediate_size=32)
MODELS = {
    "window_and_full": CONFIGS["three_layers"],
    "full": small(2, layer_windows=(0, 0), **SMALL),
    "window": small(2, layer_windows=(128, 128), **SMALL),
    "window_of_300": small(2, layer_windows=(300, 0), **SMALL),
    "window_of_1": small(2, layer_windows=(0, 1), **SMALL),
}
LENGTHS = (1, 127, 128, 129, 130, 255, 256, 257, 300, 384, 385, 600)


@cache
def tensors_of(name: str) -> dict[str, Tensor]:
    return random_tensors(MODELS[name])


def core_of(name: str, **options: object) -> _gptoss.Core:
    limits = dict(prefix_cache=True, max_context=1024, max_sequences=4)
    return make_core(MODELS[name], tensors_of(name), **(limits | options))


def read(core: _gptoss.Core, tokens: Tensor) -> tuple[_gptoss.Sequence, int, Tensor]:
    """A sequence of these tokens, how many it reused, and the logits of the others."""
    sequence = core.new_sequence()
    reused = sequence.reuse(tokens.tolist())
    rest = tokens[reused:].split(core.max_batch_tokens)
    return sequence, reused, torch.cat([feed(core, [(sequence, part)])[0] for part in rest])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


def held(core: _gptoss.Core) -> tuple[int, int]:
    """Pages that sequences hold; checks that the others are free."""
    stats, free = core.cache_stats(), core.free_pages()
    in_use = stats["full_in_use"], stats["window_in_use"]
    assert (in_use[0] + free[0], in_use[1] + free[1]) == (core.full_pages, core.window_pages)
    return in_use


@pytest.mark.parametrize("name", MODELS)
def test_reuse_has_the_bits_of_computing(name: str) -> None:
    """Of whatever length the tokens are that a long sequence has left; they go on differently."""
    core, plain = core_of(name, max_context=8192), core_of(name, prefix_cache=False)
    tokens = random_tokens(700, MODELS[name])
    sequence, reused, logits = read(core, tokens)
    assert reused == 0
    expected = core_logits(plain, tokens)
    assert_same_bits(logits, expected)
    sequence.close()
    for n in LENGTHS:
        sequence, reused, logits = read(core, tokens[:n])
        assert reused == (n - 1) // PAGE * PAGE
        assert_same_bits(logits, expected[reused:n])
        sequence.close()
        other = torch.cat((tokens[:n], random_tokens(150, MODELS[name], seed=n)))
        sequence, reused, logits = read(core, other)
        assert reused == n // PAGE * PAGE
        assert_same_bits(logits, core_logits(plain, other)[reused:])
        sequence.close()
    assert held(core) == (0, 0)


@pytest.mark.parametrize("name", MODELS)
def test_sequences_share_while_both_run(name: str) -> None:
    """Pages are shared with a sequence that still runs, and by two that compute the same at once.
    None of them sees what another adds."""
    core, plain = core_of(name), core_of(name, prefix_cache=False)
    config, common = MODELS[name], random_tokens(300, MODELS[name])
    twins = [core.new_sequence() for _ in range(2)]
    feed(core, [(twin, common[:200]) for twin in twins])
    feed(core, [(twin, common[200:]) for twin in twins])
    third, reused, _ = read(core, common)
    assert reused == 256
    windows = {window for window in config.layer_windows if window}
    full = 0 in config.layer_windows
    own_windows = 1 if windows else 0  # the last page, of the three only this one is not shared
    shared_windows = {300: 2, 128: 1}.get(max(windows, default=0), 0)
    assert held(core) == (full * (2 + 3), shared_windows + 3 * own_windows)
    for i, sequence in enumerate((*twins, third)):
        end = random_tokens(200, config, seed=i + 1)
        expected = core_logits(plain, torch.cat((common, end)))[300:]
        assert_same_bits(feed(core, [(sequence, end)])[0], expected)
        sequence.close()
    assert held(core) == (0, 0)


def test_only_the_same_tokens_match() -> None:
    """One other token anywhere, and nothing from its page on is taken; nor are right pages behind
    another beginning, or at another place."""
    core = core_of("window_and_full")
    tokens = random_tokens(513, MODELS["window_and_full"])
    read(core, tokens)[0].close()
    vocab = MODELS["window_and_full"].vocab_size
    for place in (0, 64, 127, 128, 255, 256, 300, 383, 384, 511):
        changed = tokens.clone()
        changed[place] = (changed[place] + 1) % vocab
        sequence = core.new_sequence()
        assert sequence.reuse(changed.tolist()) == place // PAGE * PAGE
    for start in (1, 127, 128, 256):
        assert core.new_sequence().reuse(tokens[start:].tolist()) == 0
    swapped = torch.cat((tokens[128:256], tokens[:128], tokens[256:]))
    assert core.new_sequence().reuse(swapped.tolist()) == 0
    assert core.new_sequence().reuse(tokens.tolist()) == 512


def test_reuse_is_counted_and_refused() -> None:
    core = core_of("full")
    tokens = random_tokens(300, MODELS["full"]).tolist()
    feed(core, [(one := core.new_sequence(), torch.tensor(tokens))])
    with pytest.raises(ValueError, match="only an empty sequence"):
        one.reuse(tokens)
    one.close()
    with pytest.raises(ValueError, match="closed"):
        one.reuse(tokens)
    with pytest.raises(ValueError, match="ints"):
        core.new_sequence().reuse([0.5])
    assert core.new_sequence().reuse([]) == 0
    assert core.new_sequence().reuse(tokens) == 256
    stats = core.cache_stats()
    assert (stats["prefix_tokens_asked"], stats["prefix_tokens_reused"]) == (300, 256)
    assert stats["cached_pages"] == 2
    off = core_of("full", prefix_cache=False)
    feed(off, [(off.new_sequence(), torch.tensor(tokens))])
    assert off.new_sequence().reuse(tokens) == 0
    assert off.cache_stats()["cached_pages"] == 0


def test_least_recently_held_goes_first_and_ends_before_beginnings() -> None:
    """Of three sequences of 3 pages in a cache of 8 (4 of one context), the one used longest ago
    makes room, from its end; pages that a sequence holds never do."""
    core = core_of("full", max_context=512, max_sequences=2)
    assert core.full_pages == 8
    prompts = [random_tokens(385, MODELS["full"], seed) for seed in range(3)]

    def kept() -> list[int]:
        found = []
        for tokens in prompts:
            sequence = core.new_sequence()
            found.append(sequence.reuse(tokens.tolist()) // PAGE)
            sequence.close()
        return found

    read(core, prompts[0][:257])[0].close()
    read(core, prompts[1][:257])[0].close()
    assert kept() == [2, 2, 0]  # and so 0 is now older than 1
    first, _, _ = read(core, prompts[2][:129])
    assert core.cache_stats()["cached_pages"] == 5
    first.close()
    assert core.cache_stats()["cached_pages"] == 4  # the end of 0 is over the limit
    assert kept() == [1, 2, 1]
    holder = core.new_sequence()
    assert holder.reuse(prompts[0][:129].tolist()) == PAGE
    big, _, _ = read(core, random_tokens(512, MODELS["full"], 9))
    feed(core, [(big_two := core.new_sequence(), random_tokens(384, MODELS["full"], 8))])
    assert core.free_pages()[0] == 0
    with pytest.raises(_gptoss.CacheFull, match="8 of 8 pages of 128 tokens of the full layers"):
        core.step([(core.new_sequence(), [1], 0, None)])
    assert holder.length == PAGE
    big.close()
    big_two.close()
    assert kept()[:1] == [1]
    holder.close()
    assert held(core) == (0, 0)


@pytest.mark.parametrize("name", ("window_and_full", "window", "window_of_300"))
def test_window_pages_that_are_gone_shorten_the_match(name: str) -> None:
    """Window pages are fewer: where one is gone a sequence goes on from an earlier place, or from
    the start, with the same bits; and computing them brings them back."""
    core = core_of(name, max_context=1024, max_sequences=1, max_batch_tokens=128)
    plain = core_of(name, prefix_cache=False)
    prompts = [random_tokens(900, MODELS[name], seed) for seed in range(4)]
    expected = [core_logits(plain, tokens) for tokens in prompts]
    chance, lengths = random.Random(1), set()
    for _ in range(40):
        i, n = chance.randrange(4), chance.choice((300, 500, 900))
        sequence, reused, logits = read(core, prompts[i][:n])
        assert_same_bits(logits, expected[i][reused:n])
        sequence.close()
        assert held(core) == (0, 0)
        lengths.add(reused)
        again, reused, _ = read(core, prompts[i][:n])
        assert reused == (n - 1) // PAGE * PAGE
        again.close()
    assert 0 in lengths and len(lengths) > 2


def test_shared_pages_are_not_written_again() -> None:
    """A sequence is cut back to where a page of its own begins, or within its last; not into what
    others may share. What follows has the right bits, in all that share it."""
    core, plain = core_of("full"), core_of("full", prefix_cache=False)
    config, tokens = MODELS["full"], random_tokens(300, MODELS["full"])
    one, _, _ = read(core, tokens)
    two, _, _ = read(core, tokens)
    for length in (1, 127, 129, 255):
        with pytest.raises(ValueError, match="multiple of 128"):
            one.truncate(length)
    assert one.length == 300
    for length in (290, 256, 128):
        one.truncate(length)
        assert one.length == length
        more = random_tokens(150, config, seed=length)
        whole = torch.cat((tokens[:length], more))
        assert_same_bits(feed(core, [(one, more)])[0], core_logits(plain, whole)[length:])
        assert core.new_sequence().reuse(whole.tolist()) == (len(whole) - 1) // PAGE * PAGE
        one.close()
        one, _, _ = read(core, tokens)
    end = random_tokens(90, config, seed=5)
    expected = core_logits(plain, torch.cat((tokens, end)))[300:]
    assert_same_bits(feed(core, [(two, end)])[0], expected)
    one.truncate(0)
    two.close()
    assert held(core) == (0, 0)


def test_failed_step_leaves_the_cache() -> None:
    """A step that fails registers nothing, and all its pages come back."""
    config = MODELS["window_and_full"]
    core = core_of("window_and_full")
    one, _, _ = read(core, random_tokens(100, config))
    before = held(core)
    banned = _gptoss.Sampler(config.vocab_size, logit_bias=dict.fromkeys(range(211), -torch.inf))
    with pytest.raises(RuntimeError, match="nothing can be sampled"):
        core.step([(one, random_tokens(200, config).tolist(), 1, banned)])
    assert (held(core), core.cache_stats()["cached_pages"]) == (before, 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ("window_and_full", "window", "window_of_300", "full"))
def test_random_walks_come_back_to_nothing(name: str, seed: int) -> None:
    """Sequences over a tree of common beginnings join, reuse, grow, are cut back and leave, in too
    small a cache: right bits always, and in the end no page is held."""
    chance = random.Random(seed)
    core = core_of(name, max_context=640, max_sequences=3)
    plain = core_of(name, prefix_cache=False, max_context=640)
    parts = [random_tokens(64, MODELS[name], seed) for seed in range(3)]
    known: dict[tuple[int, ...], Tensor] = {}

    def logits_of(path: tuple[int, ...]) -> Tensor:
        if path not in known:
            known[path] = core_logits(plain, torch.cat([parts[i] for i in path]))
        return known[path]

    running: list[tuple[_gptoss.Sequence, tuple[int, ...]]] = []
    reused_in_all = 0
    for _ in range(60):
        action = chance.random()
        if action < 0.5 and len(running) < 3:
            path = (*chance.choice(((0, 1), (0, 0, 1, 1), (2, 0))), chance.randrange(3))
            tokens = torch.cat([parts[i] for i in path])
            sequence = core.new_sequence()
            reused = sequence.reuse(tokens.tolist())
            reused_in_all += reused
            got = feed(core, [(sequence, tokens[reused:])])[0]
            assert_same_bits(got, logits_of(path)[reused:])
            running.append((sequence, path))
        elif action < 0.75 and running:
            i = chance.randrange(len(running))
            sequence, path = running[i]
            if len(path) < 10:
                more = tuple(chance.randrange(2) for _ in range(min(3, 10 - len(path))))
                got = feed(core, [(sequence, torch.cat([parts[i] for i in more]))])[0]
                assert_same_bits(got, logits_of(path + more)[64 * len(path) :])
                running[i] = sequence, path + more
        elif action < 0.85 and running:
            i = chance.randrange(len(running))
            sequence, path = running[i]
            keep = sequence.length // PAGE * 2
            with suppress(ValueError):  # the window layers may have let go of what it would see
                sequence.truncate(64 * keep)
                running[i] = sequence, path[:keep]
            assert sequence.length == 64 * len(running[i][1])
        elif running:
            running.pop(chance.randrange(len(running)))[0].close()
        held(core)
    for sequence, _ in running:
        sequence.close()
    assert reused_in_all > 0
    assert held(core) == (0, 0)


def test_plan_leaves_room_for_cached_windows() -> None:
    """Beside what the sequences need; without a prefix cache everything is as it was."""
    with_cache, without = core_of("window_and_full"), core_of("window_and_full", prefix_cache=False)
    assert with_cache.full_pages == without.full_pages == 4 * 8
    assert with_cache.window_pages == without.window_pages + 8
    assert without.free_pages() == (without.full_pages, without.window_pages)
