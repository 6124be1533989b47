"""Every operation of the backend, on every instruction set, against the same one in plain torch.
Attention and the fused operations are in files of their own.

How near is near enough is said in errors.py. Two more properties hold bit for bit: a row's result
does not depend on the rows it is computed with, nor on the number of threads.
"""

import pytest
import reference
import torch
from errors import assert_as_accurate, assert_same_rounding
from gptoss import _gptoss
from mutations import MUTATIONS, REPLACES, broken
from op_cases import (
    ROUTINGS,
    THREADS,
    assert_bitwise,
    assert_rows_alone,
    moe_case,
    normal,
    random_experts,
    random_qkv,
    random_routing,
    run_attention,
    run_moe,
    seeded,
)
from reference import ENGINE, EXACT, SINGLE
from small_models import DEVICE, make_ops, small
from torch import Tensor

TOKENS = (1, 2, 127, 128, 129)


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


SHAPES = ((8, 96, 64), (32, 160, 96), (128, 64, 32), (4, 352, 160), (4, 2880, 32))  # E, H, I


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


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are of the CPU backend")
def test_experts_are_added_in_order(isa: str) -> None:
    """However threads get in each other's way: more of them than processors, again and again."""
    x, t, ids, weights, experts, _, _ = moe_case(64, (32, 2880, 32), "random")
    alone = run_moe(make_ops(isa), x, t, ids, weights, experts)
    crowd = make_ops(isa, 16)
    assert_bitwise([alone, *(run_moe(crowd, x, t, ids, weights, experts) for _ in range(30))])


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
