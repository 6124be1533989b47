"""The precision "fast": int8 attention and unembedding weights, int8 activations.

Held against plain torch that makes the same roundings, and those against float64. Everything that
is promised of the exact precision holds here too: the same bits in any batch, cut and thread.
"""

from functools import cache

import pytest
import reference
import torch
from errors import assert_same_bits, assert_same_rounding, mean_kl, median_error
from gptoss import Model, _gptoss
from op_cases import (
    assert_bitwise,
    assert_rows_alone,
    moe_case,
    normal,
    run_moe,
    seeded,
)
from reference import EXACT, FAST
from small_models import (
    CONFIGS,
    DEVICE,
    core_fields,
    core_logits,
    feed,
    make_core,
    make_ops,
    random_mxfp4,
    random_tensors,
    random_tokens,
    small,
    untrained_tensors,
)
from torch import Tensor

cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="the precision fast is for the CPU")
TOKENS = (1, 3, 8, 9, 129)  # around the tiles of 4, 6 and 8 tokens


def run_linear(isa: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, threads: int = 1):
    out = torch.empty(len(x), len(weight))
    make_ops(isa, threads, "fast").linear(out, x, weight, bias, False)
    return out


@cpu_only
@pytest.mark.parametrize("shape", ((96, 352), (160, 211), (32, 1), (2880, 97)))
@pytest.mark.parametrize("n", TOKENS)
def test_linear(isa: str, n: int, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    generator = seeded(n, inputs, outputs)
    x = normal(n, inputs, generator=generator) * torch.logspace(-3, 4, n)[:, None]
    weight = normal(outputs, inputs, generator=generator).bfloat16()
    bias, before = (normal(outputs, generator=generator) for _ in range(2))
    out = run_linear(isa, x, weight, bias)
    plain, exact = (reference.linear(x, weight, bias, p) for p in (FAST, EXACT))
    rows = exact.norm(dim=-1, keepdim=True)
    assert_same_rounding(out / rows, plain / rows, exact / rows, share=0.001)
    assert_bitwise([out, *(run_linear(isa, x, weight, bias, threads) for threads in (2, 3))])
    assert_rows_alone(lambda rows: run_linear(isa, x[rows], weight, bias), n)

    added = before.expand(n, outputs).clone()
    make_ops(isa, precision="fast").linear(added, x, weight, bias, True)
    assert_same_rounding(added / rows, (before + plain) / rows, (before + exact) / rows, 0.001)


@cpu_only
def test_error_is_half_a_step(isa: str) -> None:
    """No code is further from its number than rounding takes it, also where sizes differ wildly."""
    generator = seeded(6)
    x = normal(50, 352, generator=generator) * torch.logspace(-6, 6, 352)
    weight = (normal(70, 352, generator=generator) * torch.logspace(3, -3, 352)).bfloat16()

    def half_step(matrix: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(matrix.double().abs(), (0, -matrix.shape[-1] % 64))
        largest = padded.unflatten(-1, (-1, 64)).amax(-1)
        return largest.repeat_interleave(64, -1)[:, : matrix.shape[-1]] / 127 / 2

    x_error, weight_error = half_step(x), half_step(weight) * (1 + 2**-7)  # bfloat16 scales
    size = x.double().abs()
    bound = x_error @ weight.double().abs().T + (size + x_error) @ weight_error.T
    bound += 20 * 2**-24 * (size @ weight.double().abs().T)  # sums in float32
    error = run_linear(isa, x, weight).double() - reference.linear(x, weight, None, EXACT)
    assert (error.abs() <= bound).all()


@cpu_only
def test_sets_agree() -> None:
    """Sums of a block are integers, so the sets that fuse multiply and add give the same bits."""
    generator = seeded(7)
    x = normal(21, 352, generator=generator)
    weight = normal(70, 352, generator=generator).bfloat16()
    blocks, scales = random_mxfp4((70, 352), 0.1, generator)
    results = []
    for isa in _gptoss.supported_isas():
        out = torch.empty(21, 70)
        make_ops(isa, precision="fast").mxfp4_linear(out, x, blocks, scales)
        results.append(torch.cat((out, run_linear(isa, x, weight))))
        torch.testing.assert_close(results[-1], results[0], rtol=0, atol=1e-4)
    assert_bitwise(results[1:])


@cpu_only
@pytest.mark.parametrize("n", (1, 7))
def test_largest_sums(isa: str, n: int) -> None:
    """All codes and weights as large as can be, with every pattern of signs of eight inputs."""
    signs = torch.tensor([[1 - 2 * (i >> j & 1) for j in range(8)] for i in range(256)])
    weight = 127.0 * signs.repeat(1, 8)  # scales of 1
    x = weight[torch.arange(n) * 37]
    exact = x.double() @ weight.double().T
    out = run_linear(isa, x, weight.bfloat16())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)
    nibbles = torch.where(weight < 0, 15, 7).to(torch.uint8)  # -6 and 6
    blocks = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(256, 2, 16)
    scales = torch.full((256, 2), 127, dtype=torch.uint8)
    make_ops(isa, precision="fast").mxfp4_linear(out, x, blocks, scales)
    torch.testing.assert_close(out.double(), exact * 6 / 127, rtol=1e-6, atol=0)


@cpu_only
def test_zeros_and_what_is_not_finite(isa: str) -> None:
    """Blocks of zeros or next to nothing are zeros; NaN and infinity show in their rows only."""
    x, weight = torch.zeros(6, 64), normal(40, 64, generator=seeded(8)).bfloat16()
    weight[3], weight[4, 32:], weight[5, 32:] = 0, 1e-38, torch.nan
    x[1, :32], x[2, 7], x[3, 40], x[4, 63], x[5] = 1, 1e-38, torch.nan, -torch.inf, 1e17
    out = run_linear(isa, x, weight)
    assert (out[[0, 2]].nan_to_num(0) == 0).all() and (out[:3, 3] == 0).all()
    fine = torch.arange(40) != 5
    assert out[:3, fine].isfinite().all() and out[5, fine].isfinite().all()
    assert out[3:5].isnan().all() and out[:, 5].isnan().all()
    plain = reference.linear(x[1:2], weight[fine], None, FAST)
    torch.testing.assert_close(out[1:2, fine], plain)


@cpu_only
def test_numbers_beyond_its_range(isa: str) -> None:
    """A token with a number from 2^60 on shows it; scales of experts beyond 2^60 are refused."""
    generator = seeded(9)
    x, (blocks, scales) = normal(3, 64, generator=generator), random_mxfp4((40, 64), 1, generator)
    x[1, 40] = 2.0**60
    ops, out = make_ops(isa, precision="fast"), torch.empty(3, 40)
    scales[0], scales[1] = 67, 187
    ops.mxfp4_linear(out, x, blocks, scales)
    assert out[1].isnan().all()
    weight = reference.mxfp4_decode(blocks, scales)
    plain = reference.linear(x[[0, 2]], weight, None, FAST)
    torch.testing.assert_close(out[[0, 2]], plain, rtol=1e-4, atol=1e-4)
    for byte in (66, 188):
        scales[7, 1] = byte
        with pytest.raises(ValueError, match=f"scales: scale bytes .*{byte}.*precision"):
            ops.mxfp4_linear(out, x, blocks, scales)


@cpu_only
@pytest.mark.parametrize("n", TOKENS)
def test_mxfp4_linear(isa: str, n: int) -> None:
    generator = seeded(n)
    x = normal(n, 352, generator=generator)
    blocks, scales = random_mxfp4((75, 352), 0.1, generator)
    out = torch.empty(n, 75)
    make_ops(isa, precision="fast").mxfp4_linear(out, x, blocks, scales)
    weight = reference.mxfp4_decode(blocks, scales)
    plain, exact = (reference.linear(x, weight, None, p) for p in (FAST, EXACT))
    assert_same_rounding(out, plain, exact, share=0.001)


MOE_SHAPES = ((8, 96, 64), (4, 352, 160))  # E, H, I
MOE_ROUTINGS = ("random", "an expert with all")


@cpu_only
@pytest.mark.parametrize("routing", MOE_ROUTINGS)
@pytest.mark.parametrize("shape", MOE_SHAPES, ids=str)
@pytest.mark.parametrize("n", TOKENS)
def test_moe(isa: str, n: int, shape: tuple[int, int, int], routing: str) -> None:
    x, t, ids, weights, experts, plain, exact = moe_case(n, shape, routing, FAST)

    def run(rows: slice, threads: int = 1) -> Tensor:
        ops = make_ops(isa, threads, "fast")
        return run_moe(ops, x[rows], t[rows], ids[rows], weights[rows], experts)

    everything = slice(0, n)
    assert_same_rounding(run(everything), plain, exact, share=0.05)
    assert_bitwise([run(everything, threads) for threads in (1, 2, 3)])
    assert_rows_alone(run, n)


# --- the whole model -----------------------------------------------------------------------------


@cache
def fast_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """300 tokens, and their logits in torch as FAST and EXACT."""
    config = CONFIGS[name]
    tokens, tensors = random_tokens(300, config), untrained_tensors(config)
    plain, exact = (reference.forward(tokens, tensors, config, p) for p in (FAST, EXACT))
    return tokens, plain, exact


@cpu_only
@pytest.mark.parametrize("name", ("three_layers", "32_experts", "twelve_layers"))
def test_error_is_that_of_the_roundings(forced_isa: str, name: str) -> None:
    """As near to float64 as torch with the same roundings, and that is near."""
    config, (tokens, plain, exact) = CONFIGS[name], fast_case(name)
    core = make_core(config, untrained_tensors(config), precision="fast")
    assert core.precision == "fast"
    ours = core_logits(core, tokens)
    assert mean_kl(ours, exact) <= 1.1 * mean_kl(plain, exact) <= 1e-5
    assert median_error(ours, exact) <= 1.1 * median_error(plain, exact) <= 0.01


@cpu_only
def test_same_bits_however_it_is_fed(forced_isa: str) -> None:
    """Chunks, a mixed batch, and threads."""
    config = CONFIGS["three_layers"]
    tensors, tokens = random_tensors(config), random_tokens(150, config)
    core = make_core(config, tensors, precision="fast")
    whole = core_logits(core, tokens)
    for chunk in (1, 7, 129):
        assert_same_bits(core_logits(core, tokens, chunk), whole)
    for threads in (2, 3):
        other = make_core(config, tensors, threads, precision="fast")
        assert_same_bits(core_logits(other, tokens), whole)
        assert_same_bits(core_logits(other, tokens[:20], chunk=1), whole[:20])

    first, second = core.new_sequence(), core.new_sequence()
    other_tokens = random_tokens(40, config, seed=1)
    alone = core_logits(core, other_tokens)
    results = [feed(core, [(first, tokens[:100])])[0]]
    for a, b in ((1, 3), (30, 1), (19, 36)):
        start = sum(map(len, results)), second.length
        parts = tokens[start[0] : start[0] + a], other_tokens[start[1] : start[1] + b]
        mixed = feed(core, [(second, parts[1]), (first, parts[0])])
        assert_same_bits(mixed[0], alone[start[1] : start[1] + b])
        results.append(mixed[1])
    assert_same_bits(torch.cat(results), whole)


@cpu_only
def test_weights_are_smaller() -> None:
    """Attention and unembedding weights take 8.25 bits instead of 16."""
    config = small(1, hidden_size=1024, vocab_size=65536)
    kinds = {}
    for precision in ("exact", "fast"):
        core = _gptoss.Core(_gptoss.Config(**core_fields(config)), precision=precision)
        kinds[precision] = core.memory()["weights"]
    assert kinds["exact"] - kinds["fast"] >= 0.9 * 65536 * 1024 * 7.75 / 8


def test_it_is_asked_for_by_name(tiny_path) -> None:
    config = _gptoss.Config(**core_fields(CONFIGS["one_layer"]))
    assert _gptoss.Core(config).precision == "exact"
    for wrong in ("", "Fast", "int8"):
        with pytest.raises(ValueError, match="precision"):
            _gptoss.Core(config, precision=wrong)
        with pytest.raises(ValueError, match="precision"):
            Model.load(tiny_path, "cpu", precision=wrong, progress=False)
    with pytest.raises(ValueError, match="precision"):
        _gptoss.Core(config, device="cuda", precision="fast")


@cpu_only
def test_from_a_checkpoint(tiny_path) -> None:
    with Model.load(tiny_path, "cpu", precision="fast", progress=False) as model:
        logits = model.forward([1, 2, 3])
        assert model.core.precision == "fast"
    with Model.load(tiny_path, "cpu", progress=False) as model:
        exact = model.forward([1, 2, 3])
    assert 0 < mean_kl(logits, exact) < 0.1
