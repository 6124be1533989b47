"""MXFP4: every scale with every code, and products with whole matrices."""

import pytest
import reference
import torch
from errors import assert_same_rounding
from op_cases import MAX_SCALE, every_code_and_scale
from reference import ENGINE, EXACT
from small_models import make_ops, random_mxfp4
from torch import Tensor


def decode(isa: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """The matrix [M, K] as the engine sees it: its product with the identity."""
    rows, columns = len(blocks), blocks.shape[1] * 32
    out = torch.empty(columns, rows)
    make_ops(isa).mxfp4_linear(out, torch.eye(columns), blocks, scales)
    return out.T


def test_every_code_and_scale(isa: str) -> None:
    """Exact, subnormal and infinite results included. A scale of 255 may give anything, in its own
    row only."""
    blocks, scales = every_code_and_scale()
    decoded = decode(isa, blocks, scales)
    expected = reference.mxfp4_decode(blocks, scales, torch.float32)
    assert torch.equal(decoded[: MAX_SCALE + 1], expected[: MAX_SCALE + 1])


def test_every_code_with_every_neighbour(isa: str) -> None:
    """All 256 bytes at all 16 places of a block, next to blocks of other scales."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.stack([torch.randperm(256, generator=generator) for _ in range(3 * 16)])
    blocks = blocks.to(torch.uint8).T.reshape(256, 3, 16).contiguous()
    scales = torch.randint(1, 255, (256, 3), generator=generator, dtype=torch.uint8)
    expected = reference.mxfp4_decode(blocks, scales, torch.float32)
    assert torch.equal(decode(isa, blocks, scales), expected)


def test_decoded_weights_are_bfloat16() -> None:
    """What lets a kernel multiply in bfloat16: no code and scale that float32 holds loses a bit."""
    decoded = reference.mxfp4_decode(*every_code_and_scale())
    decoded = decoded[decoded.float().isfinite()]
    assert torch.equal(decoded, decoded.bfloat16().double())


@pytest.mark.parametrize("shape", ((1, 32), (31, 96), (33, 160), (97, 2880)))
@pytest.mark.parametrize("n", (1, 2, 127, 128, 129))
def test_mxfp4_linear(isa: str, n: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, shape[1], generator=generator)
    blocks, scales = random_mxfp4(shape, 1.0, generator)
    weight = reference.mxfp4_decode(blocks, scales)
    out = torch.empty(n, shape[0])
    make_ops(isa).mxfp4_linear(out, x, blocks, scales)
    plain = reference.linear(x, weight, None, ENGINE)
    exact = reference.linear(x.double(), weight, None, EXACT)
    assert_same_rounding(out, plain, exact, share=0.01)
