"""The fused operations against plain torch, and against the narrow ones to the last bit."""

from functools import cache
from itertools import product

import pytest
import reference
import torch
from errors import assert_as_accurate, assert_same_rounding
from gptoss import _gptoss
from op_cases import (
    ROUTINGS,
    assert_bitwise,
    assert_rows_alone,
    normal,
    random_experts,
    run_mlp,
    seeded,
)
from reference import ENGINE, EXACT
from small_models import core_fields, small
from torch import Tensor

BATCHES = (1, 2, 8, 9, 64, 127, 128, 129)  # around every change of kernel, and of page


@cache
def qkv_case(n: int, hidden: int, heads: int, kv_heads: int, window: int) -> tuple:
    """Inputs of norm and projection for sequences of n and 3 rows, and what torch makes of them."""
    config = small(1, hidden_size=hidden, n_heads=heads, n_kv_heads=kv_heads)
    generator = seeded(n, hidden, heads, window)
    outputs = (heads + 2 * kv_heads) * 64
    x = normal(n + 3, hidden, generator=generator) * torch.logspace(-2, 2, n + 3)[:, None]
    norm = normal(hidden, generator=generator)
    weight = normal(outputs, hidden, generator=generator, std=1.3 * hidden**-0.5).bfloat16()
    bias, sinks = normal(outputs, generator=generator), normal(heads, generator=generator)

    def by_reference(precision: reference.Precision) -> tuple[Tensor, Tensor]:
        t = reference.rmsnorm(x.to(precision.sums), norm, 1e-5)
        qkv = reference.linear(t, weight, bias, precision)
        queries, out = [], []
        for rows in qkv.split((n, 3)):
            tables = reference.rope_tables(torch.arange(len(rows)), config)
            q = rows[:, : heads * 64].view(-1, heads, 64)
            queries.append(reference.rope(q, *tables).flatten(1))
            out.append(reference.attention(rows, sinks, window, config, precision))
        return torch.cat(queries), torch.cat(out)

    return config, (x, norm, weight, bias, sinks), by_reference(ENGINE), by_reference(EXACT)


def run_qkv(
    ops: _gptoss.Ops, config: reference.Config, inputs: tuple, window: int, chunk: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """The engine's queries, and its attention with the keys and values that went to the cache."""
    x, norm, weight, bias, sinks = inputs
    lengths = [len(x) - 3, 3]
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    q, out = (torch.full((len(x), config.n_heads * 64), torch.nan) for _ in range(2))
    core = _gptoss.Config(**core_fields(config))
    ops.qkv_attention(
        out, q, x, norm, 1e-5, weight, bias, positions, lengths, sinks, window, core, chunk, fused
    )
    return q, out


@pytest.mark.parametrize(
    "hidden, heads, kv_heads, window", ((96, 4, 2, 128), (352, 3, 1, 0), (2880, 2, 1, 0))
)
@pytest.mark.parametrize("n", BATCHES)
def test_norm_qkv(
    ops: _gptoss.Ops, n: int, hidden: int, heads: int, kv_heads: int, window: int
) -> None:
    """Norm, projection, rotation and cache write in one are those operations, to the last bit."""
    config, inputs, plain, exact = qkv_case(n, hidden, heads, kv_heads, window)
    q, out = run_qkv(ops, config, inputs, window, 0, True)
    assert_same_rounding(q, plain[0], exact[0], share=0.05)
    assert_same_rounding(out, plain[1], exact[1], share=0.15)  # three roundings in a row
    for chunk, fused in ((0, False), (1, True), (4, True), (9, True)):
        if fused and n > 64 and chunk == 1:
            continue  # the same kernel as at 64
        other_q, other = run_qkv(ops, config, inputs, window, chunk, fused)
        assert_bitwise([q, other_q])
        assert_bitwise([out, other])


MLPS = ((4, 96, 64), (32, 160, 96), (128, 64, 32), (5, 352, 32), (32, 2880, 32))  # E, H, I


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("n, shape", (*product(BATCHES, MLPS), (1100, (4, 32, 32))), ids=str)
def test_norm_route(ops: _gptoss.Ops, n: int, shape: tuple[int, int, int], routing: str) -> None:
    """Norm, router and sort in one, then the experts, are those operations to the last bit."""
    n_experts, hidden, inner = shape
    k = min(4, n_experts)
    generator = seeded(n, *shape)
    experts = random_experts(n_experts, hidden, inner, generator)
    x = normal(n, hidden, generator=generator) * torch.logspace(-1, 1, n)[:, None]
    norm = normal(hidden, generator=generator)
    router = normal(n_experts, hidden, generator=generator, std=hidden**-0.5).bfloat16()
    bias = normal(n_experts, generator=generator)
    if routing == "an expert with all":
        bias[-1] = 100
    elif routing == "experts with none":
        bias[:k] = 100
    inputs = (x, norm, router, bias)
    everything = slice(0, n)

    out, t, ids, weights = run_mlp(ops, inputs, experts, everything, k, True)
    exact_t, plain_t = reference.rmsnorm(x.double(), norm, 1e-5), reference.rmsnorm(x, norm, 1e-5)
    assert_as_accurate(t, plain_t, exact_t)
    exact_ids, exact_weights = reference.route(exact_t, router, bias, k)
    assert torch.equal(ids.long(), exact_ids)
    assert_as_accurate(weights, reference.route(plain_t, router, bias, k)[1], exact_weights)
    plain = x + reference.moe(t, ids.long(), weights, experts, 7.0, ENGINE)
    exact = x + reference.moe(t.double(), ids.long(), weights.double(), experts, 7.0, EXACT)
    assert_same_rounding(out, plain, exact, share=0.05)

    narrow = run_mlp(ops, inputs, experts, everything, k, False)
    for mine, other in zip((out, t, ids, weights), narrow, strict=True):
        assert_bitwise([mine.view(torch.int32), other.view(torch.int32)])
    if routing == "random":
        assert_rows_alone(lambda rows: run_mlp(ops, inputs, experts, rows, k, True)[0], n)
