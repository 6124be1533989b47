"""Inputs of single operations, ways to run the engine's, and what holds of them bit for bit."""

from collections.abc import Callable, Sequence
from functools import cache

import reference
import torch
from errors import assert_same_bits
from gptoss import _gptoss
from reference import ENGINE, EXACT, Precision
from small_models import core_fields, random_mxfp4
from torch import Tensor

THREADS = (1, 2, 3)
ROUTINGS = ("random", "an expert with all", "experts with none")  # of random_routing
MAX_SCALE = 254  # 255 is NaN in the OCP specification and infinite as 2^(255 - 127) in float32
EXPERT_PARTS = [  # in the order that the engine's operations take them
    f"{name}_proj_{part}" for name in ("gate_up", "down") for part in ("blocks", "scales", "bias")
]


def seeded(*numbers: int) -> torch.Generator:
    """A generator of its own for each case."""
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def normal(*shape: int, generator: torch.Generator, std: float = 1.0) -> Tensor:
    return std * torch.randn(shape, generator=generator)


def assert_bitwise(results: list[Tensor]) -> None:
    """All are the same bits (so that -0 is not 0, and NaN is NaN)."""
    for result in results[1:]:
        assert_same_bits(result, results[0])


def assert_rows_alone(run: Callable[[slice], Tensor], n: int) -> None:
    """Rows computed with all others, with a few and alone are the same bits."""
    together = run(slice(0, n))
    for first, width in ((0, 1), (n - 1, 1), (n // 3, 3), (n // 2, 17)):
        rows = slice(first, min(first + width, n))
        assert_bitwise([run(rows), together[rows]])


def every_code_and_scale() -> tuple[Tensor, Tensor]:
    """Row s has all 16 codes twice, at each nibble once, and scale s. [256, 1, 16], [256, 1]."""
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = codes | codes.flip(0) << 4
    return blocks.expand(256, 1, 16).contiguous(), torch.arange(256, dtype=torch.uint8)[:, None]


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
    out = x.clone()
    ops.moe(out, t, ids.int(), weights, *(experts[part] for part in EXPERT_PARTS), limit)
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


@cache
def moe_case(
    n: int, shape: tuple[int, int, int], routing: str, precision: Precision = ENGINE
) -> tuple:
    """The inputs (x, t, ids, weights, experts), and x + moe(t) in torch at `precision` and EXACT.
    shape: experts, hidden size, intermediate size."""
    n_experts, hidden, inner = shape
    generator = seeded(n, *shape)
    experts = random_experts(n_experts, hidden, inner, generator)
    x, t = (normal(n, hidden, generator=generator) for _ in range(2))
    ids, weights = random_routing(n, n_experts, routing, generator)
    plain = x + reference.moe(t, ids, weights, experts, 7.0, precision)
    exact = x + reference.moe(t.double(), ids, weights, experts, 7.0, EXACT)
    return x, t, ids, weights, experts, plain, exact


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
    parts = [experts[part] for part in EXPERT_PARTS]
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


def random_qkv(n: int, config: reference.Config, generator: torch.Generator) -> Tensor:
    """Rows [n, (A + 2G) * 64] whose scores have a standard deviation of 3 or so."""
    qkv = normal(n, (config.n_heads + 2 * config.n_kv_heads) * 64, generator=generator)
    qkv[:, : config.n_heads * 64] *= 1.5
    return qkv


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
