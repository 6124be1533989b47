"""Samplers, and the formula that their draws are held against."""

from collections.abc import Sequence

import numpy as np
import torch
from gptoss import _gptoss
from torch import Tensor

VOCAB = 60  # where a test does not say otherwise
OFF = dict(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    seed=0,
    logprobs=-1,
)


def sampler(vocab: int = VOCAB, **options: object) -> _gptoss.Sampler:
    return _gptoss.Sampler(vocab, **(OFF | options))


def mask_of(allowed: Sequence[int], vocab: int = VOCAB) -> np.ndarray:
    """What `Sampler.allow` takes: these tokens and no others."""
    bits = np.zeros((vocab + 31) // 32 * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> Tensor:
    """The formula: float64 [V], the probability of each token to be drawn."""
    x = logits.double()
    if allowed is not None:
        forbidden = torch.ones(len(x), dtype=torch.bool)
        forbidden[list(allowed)] = False
        x[forbidden] = -torch.inf
    for token, bias in (logit_bias or {}).items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] *= repetition_penalty if x[token] < 0 else 1 / repetition_penalty
    for token in set(output):
        x[token] -= presence_penalty + frequency_penalty * output.count(token)
    p = (x / temperature).softmax(-1)
    order = p.argsort(descending=True, stable=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def assert_drawn_from(p: Tensor, draws: list[int]) -> None:
    """Each token came as often as 5 standard deviations allow, and never if it has no chance."""
    counts = torch.bincount(torch.tensor(draws), minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    deviation = (len(draws) * p * (1 - p)).sqrt()
    unlikely = (counts - len(draws) * p).abs() > 5 * deviation + 1
    assert not unlikely.any(), unlikely.nonzero().flatten()
