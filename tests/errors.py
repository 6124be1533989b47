"""How far results are from the truth, and the bounds the tests put on it.

No bound is a guessed tolerance. The truth is float64; the same computation in plain torch at the
engine's precision has some error against it; the engine is held to that.
"""

import torch
from torch import Tensor

FLOAT32_ROUNDING = 2.0**-24


def rms(x: Tensor) -> float:
    """Root mean square over all elements."""
    return x.double().square().mean().sqrt().item()


def row_errors(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| / |exact| of each row. [n, m] twice -> float64 [n]."""
    exact = exact.double()
    return (actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


def median_error(actual: Tensor, exact: Tensor) -> float:
    """The median of `row_errors`: a router that flips between near-equal experts in a few rows,
    as any rounding makes it, does not move it."""
    return row_errors(actual, exact).median().item()


def mean_kl(actual: Tensor, exact: Tensor) -> float:
    """Mean over rows of KL(exact || actual), in nats, of the softmax of logits [n, V]."""
    p, q = exact.double().log_softmax(-1), actual.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = 4.0) -> None:
    """For operations in float32 throughout: about as near to float64 as torch in float32.

    The error may be `slack` times torch's (orders of summation differ), or that many float32
    roundings of the largest element (in a small test torch can be exact by luck).
    """
    assert actual.shape == exact.shape
    error, torchs = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    bound = slack * max(torchs.item(), FLOAT32_ROUNDING * exact.abs().max().item())
    assert error <= bound, f"largest error {error:.3g}, bound {bound:.3g}"


def assert_same_rounding(actual: Tensor, plain: Tensor, exact: Tensor, share: float) -> None:
    """For operations that round to bfloat16: makes the same roundings as `plain`, and no others.

    `plain` is torch at the engine's precision, `plain - exact` what those roundings cost. `actual`
    must be nearer to `plain` than that by the factor `share`, which leaves room for sums in another
    order but none for one more (or one missing) rounding.
    """
    assert actual.shape == exact.shape
    assert actual.isfinite().all(), "not finite"
    difference, cost = rms(actual.double() - plain), rms(plain.double() - exact)
    bound = share * cost + 4 * FLOAT32_ROUNDING * rms(exact)
    assert difference <= bound, (
        f"{difference:.3g} from torch, which is {cost:.3g} from float64; bound {bound:.3g}"
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Both have the same bits, -0 not being 0; the error names the rows that differ."""
    assert actual.shape == expected.shape
    differing = (actual.view(torch.int32) != expected.view(torch.int32)).any(-1).nonzero()
    assert not len(differing), f"rows {differing.flatten()}"
