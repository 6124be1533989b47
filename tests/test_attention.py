"""Attention over the paged cache, on every instruction set, against plain torch: lengths, windows,
sinks and rotation. The same bits however rows are cut, and on any number of threads.
"""

from functools import cache

import pytest
import reference
import torch
from errors import assert_same_rounding
from gptoss import _gptoss
from op_cases import THREADS, assert_bitwise, normal, random_qkv, run_attention, seeded
from reference import ENGINE, EXACT
from small_models import DEVICE, make_ops, small
from torch import Tensor

# query heads, key/value heads
HEADS = ((1, 1), (3, 3), (4, 2), (4, 1), (8, 1), (16, 2), (12, 1), (16, 1))
RAGGED = ((1,), (129, 2, 1, 127, 128), (520,))


@cache
def attention_case(heads: int, kv_heads: int, window: int, lengths: tuple[int, ...]) -> tuple:
    """The inputs (config, qkv, sinks), and what torch makes of them as ENGINE and EXACT."""
    config = small(1, n_heads=heads, n_kv_heads=kv_heads)
    generator = seeded(heads, window, *lengths)
    qkv = random_qkv(sum(lengths), config, generator)
    sinks = normal(heads, generator=generator, std=3.0)

    def by_reference(precision: reference.Precision) -> Tensor:
        parts = qkv.split(lengths)
        return torch.cat([reference.attention(p, sinks, window, config, precision) for p in parts])

    return config, qkv, sinks, by_reference(ENGINE), by_reference(EXACT)


@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("window", (0, 128))
@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_attention(
    isa: str, heads: int, kv_heads: int, window: int, lengths: tuple[int, ...]
) -> None:
    config, qkv, sinks, plain, exact = attention_case(heads, kv_heads, window, lengths)

    def run(threads: int = 1, chunk: int = 0) -> Tensor:
        ops = make_ops(isa, threads)
        return run_attention(ops, qkv, lengths, sinks, window, config, chunk)

    together = run()
    assert_same_rounding(together, plain, exact, share=0.05)
    alone = [
        run_attention(make_ops(isa), rows, [len(rows)], sinks, window, config)
        for rows in qkv.split(lengths)
    ]
    assert_bitwise([together, torch.cat(alone)])
    assert_bitwise([together, *(run(threads=threads) for threads in THREADS)])
    assert_bitwise([together, *(run(chunk=chunk) for chunk in (9, 64, 128))])


@pytest.mark.parametrize("lengths", ((1001,), (600, 130, 1, 64, 257)), ids=str)
@pytest.mark.parametrize("window", (0, 128))
def test_attention_row_by_row(ops: _gptoss.Ops, window: int, lengths: tuple[int, ...]) -> None:
    """A prompt at once, a few rows of each sequence at a time and one row are the same bits."""
    config, qkv, sinks, plain, exact = attention_case(2, 2, window, lengths)
    together, few, single = (
        run_attention(ops, qkv, lengths, sinks, window, config, chunk) for chunk in (0, 8, 1)
    )
    assert_same_rounding(single, plain, exact, share=0.05)
    assert_bitwise([together, few, single])


def test_attention_in_long_sequences(ops: _gptoss.Ops) -> None:
    """Over more pages than there are parts of a row: the last rows in a prompt, and alone."""
    config, n = small(1, n_heads=8, n_kv_heads=1), 4200
    qkv, sinks = random_qkv(n, config, seeded(6)), normal(8, generator=seeded(7), std=3.0)
    together = run_attention(ops, qkv, [n], sinks, 0, config)
    assert_bitwise([together, run_attention(ops, qkv, [n], sinks, 0, config, chunk=n - 1)])
    plain = reference.attention(qkv, sinks, 0, config, ENGINE)
    exact = reference.attention(qkv, sinks, 0, config, EXACT)
    assert_same_rounding(together, plain, exact, share=0.05)


@pytest.mark.parametrize(
    "positions, window, kv_heads, threads, parts",
    (
        ([8191], 0, 8, 1, [1]),
        ([8191], 0, 8, 2, [1]),  # 8 heads for 2 threads
        ([8191], 0, 8, 3, [2]),
        ([8191], 0, 8, 16, [8]),
        ([8192], 0, 1, 64, [17]),  # 33 chunks, no part of more than 2
        ([511], 0, 1, 64, [1]),
        ([512], 0, 1, 64, [2]),
        ([131071], 128, 1, 64, [1]),
        ([131071] * 4, 0, 8, 8, [1] * 4),
        ([131071] * 3, 0, 8, 8, [2] * 3),
        ([131071] + [1023] * 31, 0, 8, 16, [7] + [1] * 31),
        (list(range(131072 - 512, 131072)), 0, 8, 64, [1] * 512),
    ),
)
def test_attention_parts(
    positions: list[int], window: int, kv_heads: int, threads: int, parts: list[int]
) -> None:
    """Rows are cut where there are too few of them for the threads, or one is much the longest."""
    assert _gptoss.attention_parts(positions, window, kv_heads, threads) == parts


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are of the CPU backend")
@pytest.mark.parametrize(
    "heads, kv_heads, window, lengths, chunk",
    (
        (4, 1, 0, (1030,), 1),  # every length, among them those around the borders of 256 keys
        (4, 1, 600, (1030,), 1),
        (12, 1, 0, (520, 900, 769), 1),
        (2, 1, 0, (1025, 1026, 1030), 512),  # 1, 2 and 6 rows in the last round
        (3, 3, 0, (2305,), 2304),
    ),
)
def test_attention_cut_for_threads(
    isa: str, heads: int, kv_heads: int, window: int, lengths: tuple[int, ...], chunk: int
) -> None:
    """A row whose keys are computed in parts, by several threads, has the bits of one thread, which
    computes them in one piece."""
    config, qkv, sinks, plain, exact = attention_case(heads, kv_heads, window, lengths)
    assert _gptoss.attention_parts([max(lengths) - 1], window, kv_heads, 3)[0] > 1

    def run(threads: int) -> Tensor:
        return run_attention(make_ops(isa, threads), qkv, lengths, sinks, window, config, chunk)

    one = run(1)
    assert_same_rounding(one, plain, exact, share=0.05)
    assert_bitwise([one, *(run(threads) for threads in (3, 8, 16))])


@pytest.mark.parametrize("chunk", (1, 64))
def test_attention_does_not_read_the_unseen(ops: _gptoss.Ops, chunk: int) -> None:
    """NaN in keys and values that a row cannot see: later ones of the same page, those before its
    window, and what lies in a page that another sequence has given back."""
    config, lengths, window = small(1, n_heads=8, n_kv_heads=2), (400, 300), 128
    qkv, sinks = random_qkv(700, config, seeded(8)), normal(8, generator=seeded(9))
    clean = run_attention(ops, qkv, lengths, sinks, window, config, chunk)
    qkv[:100, 8 * 64 :] = torch.nan  # the first sequence; gone when row 256 takes a page
    qkv[350, 8 * 64 :] = torch.nan
    out = run_attention(ops, qkv, lengths, sinks, window, config, chunk)
    assert out[:100].isnan().all() and out[350:400].isnan().all()
    for rows in (slice(99 + window, 350), slice(400, 700)):
        assert_bitwise([out[rows], clean[rows]])


@pytest.mark.parametrize("window", (0, 128))
@pytest.mark.parametrize("sink", (-torch.inf, -1e4, -100.0, 0.0, 5.0, 100.0, 1e4))
def test_attention_with_extreme_sinks(ops: _gptoss.Ops, sink: float, window: int) -> None:
    """n / (n + e^sink) where q . k = 0 and v = 1, and no overflow for any sink."""
    config, n = small(1, n_heads=2, n_kv_heads=1), 400
    qkv = torch.zeros(n, 4 * 64)
    qkv[:, -64:] = 1
    out = run_attention(ops, qkv, [n], torch.full((2,), sink), window, config)
    keys = torch.arange(1, n + 1).clamp(max=window or n)[:, None].double()
    expected = keys / (keys + torch.tensor(sink).double().exp())
    torch.testing.assert_close(out, expected.expand(n, 128).float(), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("size", (1e-3, 30.0, 300.0))
def test_attention_with_extreme_scores(ops: _gptoss.Ops, size: float) -> None:
    """Scores next to nothing and in the tens of thousands, of either sign, against a sink of 2."""
    config, n = small(1, n_heads=4, n_kv_heads=2), 300
    qkv = random_qkv(n, config, seeded(3))
    qkv[:, : 6 * 64] *= size
    sinks = torch.full((4,), 2.0)
    plain = reference.attention(qkv, sinks, 0, config, ENGINE)
    exact = reference.attention(qkv, sinks, 0, config, EXACT)
    assert_same_rounding(run_attention(ops, qkv, [n], sinks, 0, config), plain, exact, share=0.05)


def test_rotation_at_the_last_positions(isa: str) -> None:
    """YaRN's tables are still right at position 131071."""
    config, n = small(1, n_heads=1, n_kv_heads=1, max_context=131072), 131072
    qkv = random_qkv(n, config, seeded(4))
    sinks = torch.zeros(1)
    ops = make_ops(isa, 2)
    out = run_attention(ops, qkv, [n], sinks, 128, config, chunk=8192)[-64:]

    def by_reference(precision: reference.Precision) -> Tensor:
        """Attention of the last 64 tokens, all of whose keys are among the last 192."""
        last = qkv[-192:].to(precision.sums).view(192, 3, 64)
        tables = reference.rope_tables(torch.arange(n - 192, n), config)
        q, k = (precision.round(reference.rope(last[:, [i]], *tables))[:, 0] for i in (0, 1))
        scores = (q @ k.T / 8).masked_fill(~reference.visible(192, 128), -torch.inf)
        share = reference.softmax_with_sink(scores, sinks[0].to(precision.sums))
        return (share @ precision.round(last[:, 2]))[-64:]

    assert_same_rounding(out, by_reference(ENGINE), by_reference(EXACT), share=0.05)
