"""Every operation of the backend, on every instruction set, against the same one in plain torch.

How near is near enough is said in errors.py. Two more properties hold bit for bit: a row's result
does not depend on the rows it is computed with, nor on the number of threads.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import pytest
import reference
import torch
from errors import assert_as_accurate, assert_same_rounding
from gptoss import _gptoss
from mutations import MUTATIONS, REPLACES, broken
from reference import ENGINE, EXACT, SINGLE
from small_models import core_fields, make_ops, random_mxfp4, small
from torch import Tensor

TOKENS = (1, 2, 127, 128, 129)
THREADS = (1, 2, 3)


@pytest.fixture
def ops(isa: str) -> _gptoss.Ops:
    return make_ops(isa)


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for each case."""
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def normal(*shape: int, generator: torch.Generator, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def assert_bitwise(results: list[Tensor]) -> None:
    """All are the same bits (so that -0 is not 0, and NaN is NaN)."""
    for result in results[1:]:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


def assert_rows_alone(run: Callable[[slice], Tensor], n: int) -> None:
    """Rows computed with all others, with a few and alone are the same bits."""
    together = run(slice(0, n))
    for first, width in ((0, 1), (n - 1, 1), (n // 3, 3), (n // 2, 17)):
        rows = slice(first, min(first + width, n))
        assert_bitwise([run(rows), together[rows]])


@pytest.mark.parametrize("hidden", (32, 96, 2880))
@pytest.mark.parametrize("n", TOKENS)
def test_embed(ops: _gptoss.Ops, n: int, hidden: int) -> None:
    generator = seeded(n, hidden)
    table = normal(50, hidden, generator=generator).bfloat16()
    tokens = torch.randint(50, (n,), generator=generator, dtype=torch.int32)
    out = torch.empty(n, hidden)
    ops.embed(out, tokens, table)
    assert torch.equal(out, reference.embed(tokens, table, SINGLE))


@pytest.mark.parametrize("hidden", (32, 96, 160, 2880))
@pytest.mark.parametrize("n", TOKENS)
def test_rmsnorm(ops: _gptoss.Ops, n: int, hidden: int) -> None:
    generator = seeded(n, hidden)
    x = normal(n, hidden, generator=generator) * torch.logspace(-3, 4, n)[:, None]
    weight = normal(hidden, generator=generator)

    def run(rows: slice) -> Tensor:
        out = torch.empty_like(x[rows])
        ops.rmsnorm(out, x[rows], weight, 1e-5)
        return out

    exact = reference.rmsnorm(x.double(), weight, 1e-5)
    assert_as_accurate(run(slice(0, n)), reference.rmsnorm(x, weight, 1e-5), exact)
    assert_rows_alone(run, n)


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("shape", ((96, 352), (160, 211), (32, 1), (2880, 97)))
@pytest.mark.parametrize("n", TOKENS)
def test_linear(isa: str, n: int, shape: tuple[int, int], bias: bool) -> None:
    inputs, outputs = shape
    generator = seeded(n, inputs, outputs)
    x = normal(n, inputs, generator=generator)
    weight = normal(outputs, inputs, generator=generator).bfloat16()
    b = normal(outputs, generator=generator) if bias else None
    before = normal(n, outputs, generator=generator)

    def run(rows: slice, threads: int = 1, add: bool = False) -> Tensor:
        out = before[rows].clone()
        make_ops(isa, threads).linear(out, x[rows], weight, b, add)
        return out

    everything = slice(0, n)
    plain = reference.linear(x, weight, b, ENGINE)
    exact = reference.linear(x, weight, b, EXACT)
    assert_same_rounding(run(everything), plain, exact, share=0.01)
    assert_same_rounding(run(everything, add=True), before + plain, before + exact, share=0.01)
    assert_bitwise([run(everything, threads) for threads in THREADS])
    assert_rows_alone(run, n)


ROUTERS = ((8, 4), (32, 4), (128, 4), (5, 2), (4, 4))  # experts, of them chosen


@pytest.mark.parametrize("experts, k", ROUTERS)
@pytest.mark.parametrize("hidden", (96, 2880))
@pytest.mark.parametrize("n", TOKENS)
def test_route(ops: _gptoss.Ops, n: int, hidden: int, experts: int, k: int) -> None:
    generator = seeded(n, hidden, experts)
    t = normal(n, hidden, generator=generator)
    weight = normal(experts, hidden, generator=generator, std=hidden**-0.5).bfloat16()
    bias = normal(experts, generator=generator)

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        ids = torch.empty(len(t[rows]), k, dtype=torch.int32)
        weights = torch.empty(len(t[rows]), k)
        ops.route(ids, weights, t[rows], weight, bias)
        return ids, weights

    ids, weights = run(slice(0, n))
    exact_ids, exact = reference.route(t.double(), weight, bias, k)
    _, plain = reference.route(t, weight, bias, k)
    assert torch.equal(ids.long(), exact_ids)
    assert_as_accurate(weights, plain, exact)
    assert_rows_alone(lambda rows: run(rows)[0].view(torch.float32), n)
    assert_rows_alone(lambda rows: run(rows)[1], n)


def test_route_prefers_the_lower_index(ops: _gptoss.Ops) -> None:
    """Ties are broken as in the reference, wherever they are."""
    t, weight = torch.zeros(1, 32), torch.zeros(40, 32).bfloat16()
    for best in ((), (39,), (3, 17, 20, 33), (1, 2, 30, 31, 38, 39)):
        bias = torch.zeros(40)
        bias[list(best)] = 1.0
        ids, weights = torch.empty(1, 4, dtype=torch.int32), torch.empty(1, 4)
        ops.route(ids, weights, t, weight, bias)
        expected_ids, expected = reference.route(t, weight, bias, 4)
        assert ids.tolist() == expected_ids.tolist()
        torch.testing.assert_close(weights, expected)


def random_experts(
    n_experts: int, hidden: int, inner: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Expert weights whose gates and ups go well beyond the clamp for inputs of size 1."""
    experts = {}
    for name, rows, columns, rms in (
        ("gate_up_proj", 2 * inner, hidden, 5 * hidden**-0.5),
        ("down_proj", hidden, inner, 0.1 * inner**-0.5),
    ):
        blocks, scales = random_mxfp4((n_experts, rows, columns), rms, generator)
        experts[f"{name}_blocks"], experts[f"{name}_scales"] = blocks, scales
        experts[f"{name}_bias"] = normal(n_experts, rows, generator=generator, std=0.5)
    return experts


def run_moe(
    ops: _gptoss.Ops,
    x: Tensor,
    t: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: dict[str, Tensor],
    limit: float = 7.0,
) -> Tensor:
    """The engine's x + moe(t)."""
    parts = [
        f"{name}_proj_{p}" for name in ("gate_up", "down") for p in ("blocks", "scales", "bias")
    ]
    out = x.clone()
    ops.moe(out, t, ids.int(), weights, *(experts[part] for part in parts), limit)
    return out


def random_routing(
    n: int, n_experts: int, kind: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ids int64 and weights [n, k]: all experts used alike, one by every token, or one by none."""
    k = min(4, n_experts)
    ids = torch.rand(n, n_experts, generator=generator).argsort(-1)
    if kind == "an expert with all":
        others = ids[ids != n_experts - 1].view(n, -1)
        ids = torch.cat((others[:, :2], torch.full((n, 1), n_experts - 1), others[:, 2:]), dim=1)
    elif kind == "experts with none":
        ids = ids[ids < k].view(n, k)
    return ids[:, :k], torch.rand(n, k, generator=generator).softmax(-1)


SHAPES = ((8, 96, 64), (32, 160, 96), (128, 64, 32), (4, 352, 160), (4, 2880, 32))  # E, H, I
ROUTINGS = ("random", "an expert with all", "experts with none")


@cache
def moe_case(n: int, shape: tuple[int, int, int], routing: str) -> tuple:
    """The inputs (x, t, ids, weights, experts), and x + moe(t) in torch as ENGINE and EXACT."""
    n_experts, hidden, inner = shape
    generator = seeded(n, *shape)
    experts = random_experts(n_experts, hidden, inner, generator)
    x, t = (normal(n, hidden, generator=generator) for _ in range(2))
    ids, weights = random_routing(n, n_experts, routing, generator)
    plain = x + reference.moe(t, ids, weights, experts, 7.0, ENGINE)
    exact = x + reference.moe(t.double(), ids, weights, experts, 7.0, EXACT)
    return x, t, ids, weights, experts, plain, exact


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n", TOKENS)
def test_moe(isa: str, n: int, shape: tuple[int, int, int], routing: str) -> None:
    x, t, ids, weights, experts, plain, exact = moe_case(n, shape, routing)

    def run(rows: slice, threads: int = 1) -> Tensor:
        ops = make_ops(isa, threads)
        return run_moe(ops, x[rows], t[rows], ids[rows], weights[rows], experts)

    everything = slice(0, n)
    assert_same_rounding(run(everything), plain, exact, share=0.05)
    if routing != "experts with none":
        assert_bitwise([run(everything, threads) for threads in THREADS])
        assert_rows_alone(run, n)


def test_swiglu_limit_is_read(ops: _gptoss.Ops) -> None:
    """Other limits than 7 hold too."""
    generator = seeded(1)
    experts = random_experts(4, 96, 64, generator)
    t, x = normal(65, 96, generator=generator), torch.zeros(65, 96)
    ids, weights = random_routing(65, 4, "random", generator)
    for limit in (0.5, 3.0, 20.0):
        plain = reference.moe(t, ids, weights, experts, limit, ENGINE)
        exact = reference.moe(t.double(), ids, weights, experts, limit, EXACT)
        out = run_moe(ops, x, t, ids, weights, experts, limit)
        assert_same_rounding(out, plain, exact, share=0.05)


# query heads, key/value heads
HEADS = ((1, 1), (3, 3), (4, 2), (4, 1), (8, 1), (16, 2), (12, 1), (16, 1))
RAGGED = ((1,), (129, 2, 1, 127, 128), (520,))


def run_attention(
    ops: _gptoss.Ops,
    qkv: Tensor,
    lengths: Sequence[int],
    sinks: Tensor,
    window: int,
    config: reference.Config,
    chunk: int = 0,
) -> Tensor:
    """The engine's attention of sequences of those lengths, their rows one after the other."""
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    out = torch.full((len(qkv), config.n_heads * 64), torch.nan)
    core_config = _gptoss.Config(**core_fields(config))
    ops.attention(out, qkv, positions, list(lengths), sinks, window, core_config, chunk)
    return out


def random_qkv(n: int, config: reference.Config, generator: torch.Generator) -> Tensor:
    """Rows [n, (A + 2G) * 64] whose scores have a standard deviation of 3 or so."""
    qkv = normal(n, (config.n_heads + 2 * config.n_kv_heads) * 64, generator=generator)
    qkv[:, : config.n_heads * 64] *= 1.5
    return qkv


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


def run_mlp(
    ops: _gptoss.Ops,
    inputs: tuple,
    experts: dict[str, Tensor],
    rows: slice,
    k: int,
    fused: bool,
    padding: int = 0,
) -> tuple[Tensor, ...]:
    """The engine's x + moe(norm(x)), norm(x), the chosen experts and their shares."""
    x, norm, router, bias = inputs
    out = x[rows].clone()
    t, ids = torch.full_like(out, torch.nan), torch.empty(len(out), k, dtype=torch.int32)
    weights = torch.full((len(out), k), torch.nan)
    parts = [
        experts[f"{name}_proj_{p}"]
        for name in ("gate_up", "down")
        for p in ("blocks", "scales", "bias")
    ]
    ops.mlp(out, t, ids, weights, norm, 1e-5, router, bias, parts, 7.0, fused, padding)
    return out, t, ids, weights


def assert_no_experts_for_padding(ops: _gptoss.Ops, n: int, padding: int) -> None:
    """Of n rows, the last ones only fill up a batch: no expert is chosen for them, so none is read
    or added; the others are as ever. (On CUDA.)"""
    n_experts, hidden, k = 8, 96, 4
    generator = seeded(n, padding)
    experts = random_experts(n_experts, hidden, 64, generator)
    router = normal(n_experts, hidden, generator=generator, std=0.1).bfloat16()
    x, norm = normal(n, hidden, generator=generator), normal(hidden, generator=generator)
    inputs = x, norm, router, normal(n_experts, generator=generator)
    real = n - padding
    for fused in (True, False):
        whole = run_mlp(ops, inputs, experts, slice(0, n), k, fused)
        out, _, ids, weights = run_mlp(ops, inputs, experts, slice(0, n), k, fused, padding)
        assert torch.equal(out[:real], whole[0][:real])
        assert torch.equal(ids[:real], whole[2][:real])
        assert torch.equal(weights[:real], whole[3][:real])
        assert torch.equal(out[real:], x[real:])
        assert (ids[real:] == n_experts).all() and not weights[real:].any()


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


OPERATION_OF = {  # the operation of the engine that holds a function of the reference
    "swiglu": "moe",
    "split_gate_up": "moe",
    "nibbles": "moe",
    "route": "route",
    "softmax_with_sink": "attention",
    "visible": "attention",
    "rope_frequencies": "attention",
    "rope": "attention",
}


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_are_caught(ops: _gptoss.Ops, mistake: str) -> None:
    """The checks above fail against a reference that makes one of the known mistakes."""
    generator, n = seeded(5), 300
    operation = OPERATION_OF[REPLACES[MUTATIONS[mistake]]]
    if operation == "attention":
        config, window = small(1), 128 if "window" in mistake else 0
        qkv, sinks = random_qkv(n, config, generator), normal(4, generator=generator, std=2.0)
        out = run_attention(ops, qkv, [n], sinks, window, config)

        def by_reference(precision: reference.Precision) -> Tensor:
            return reference.attention(qkv, sinks, window, config, precision)
    elif operation == "moe":
        experts = random_experts(8, 96, 64, generator)
        t, x = normal(n, 96, generator=generator), torch.zeros(n, 96)
        ids, weights = random_routing(n, 8, "random", generator)
        out = run_moe(ops, x, t, ids, weights, experts)

        def by_reference(precision: reference.Precision) -> Tensor:
            return reference.moe(t, ids, weights, experts, 7.0, precision)
    else:
        t, bias = normal(n, 96, generator=generator), normal(8, generator=generator)
        weight = normal(8, 96, generator=generator, std=0.1).bfloat16()
        ids, out = torch.empty(n, 4, dtype=torch.int32), torch.empty(n, 4)
        ops.route(ids, out, t, weight, bias)

        def by_reference(precision: reference.Precision) -> Tensor:
            return reference.route(t.to(precision.sums), weight, bias, 4)[1]

    right = by_reference(ENGINE)
    with broken(mistake):
        wrong = by_reference(ENGINE)
    distance = (out - right).norm()
    assert distance < 0.05 * (wrong - right).norm(), "the engine is not near the right reference"
    assert (out - wrong).norm() > 20 * distance, "the engine makes this mistake"
