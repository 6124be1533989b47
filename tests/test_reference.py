"""The reference itself: against transformers, against published numbers, and whether the deliberate
mistakes of mutations.py show in it."""

import math

import pytest
import reference
import torch
from errors import median_error
from mutations import MUTATIONS, broken
from reference import ENGINE, EXACT, SINGLE, Config
from small_models import (
    CONFIGS,
    mutation_config,
    random_mxfp4,
    random_tensors,
    random_tokens,
    transformers_logits,
    transformers_model,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_transformers(name: str) -> None:
    """In float32 both are as near to the float64 reference as float32 allows."""
    config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
    tokens = random_tokens(300, config)
    exact = reference.forward(tokens, tensors, config, EXACT)
    ours = reference.forward(tokens, tensors, config, SINGLE)
    theirs = transformers_logits(transformers_model(config, tensors, torch.float32), tokens)
    assert median_error(ours, exact) < 1e-5
    assert median_error(theirs, exact) < 1e-5


@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mistakes_show(mistake: str) -> None:
    """Every deliberate mistake moves the logits further than the engine's rounding does."""
    config = mutation_config(mistake)
    tensors, tokens = random_tensors(config), random_tokens(600, config)
    exact = reference.forward(tokens, tensors, config, EXACT)
    rounded = reference.forward(tokens, tensors, config, ENGINE)
    with broken(mistake):
        wrong = reference.forward(tokens, tensors, config, EXACT)
    assert median_error(wrong, exact) > median_error(rounded, exact)


def test_yarn_ramp() -> None:
    """gpt-oss does not truncate: the ramp runs from pair 8.092779 to pair 17.398025 of 32."""
    config = Config()
    plain = config.rope_theta ** -(torch.arange(32, dtype=torch.float64) / 32)
    slow = (1 - reference.rope_frequencies(config) / plain) / (1 - 1 / config.rope_factor)
    slope = (slow[17] - slow[9]).item() / 8
    assert 9 - slow[9].item() / slope == pytest.approx(8.092779, abs=5e-7)
    assert 17 + (1 - slow[17].item()) / slope == pytest.approx(17.398025, abs=5e-7)
    assert slow[:9].abs().max() < 1e-12
    assert (slow[18:] - 1).abs().max() < 1e-12


def test_sink_takes_its_share() -> None:
    """With q . k = 0 and v = 1 the output is n / (n + e^sink)."""
    config = Config(n_heads=2, n_kv_heads=1)
    n, sinks = 200, torch.tensor([0.5, 6.0])
    qkv = torch.zeros(n, 4 * 64)
    qkv[:, -64:] = 1
    for window in (0, 128):
        out = reference.attention(qkv, sinks, window, config).view(n, 2, 64)
        keys = torch.arange(1, n + 1).clamp(max=window or n)[:, None].double()
        torch.testing.assert_close(out[..., 0], keys / (keys + sinks.double().exp()))


def test_route_prefers_the_lower_index() -> None:
    ids, weights = reference.route(torch.zeros(1, 32), torch.zeros(8, 32), torch.zeros(8), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


def test_mxfp4_by_hand() -> None:
    """0xA1 is the pair (0.5, -1): low nibble first; scale 128 doubles."""
    blocks = torch.tensor([0xA1] + [0x7F] * 15, dtype=torch.uint8)
    decoded = reference.mxfp4_decode(blocks[None], torch.tensor([128], dtype=torch.uint8))
    assert decoded.tolist() == [1.0, -2.0] + [-12.0, 12.0] * 15


def test_mxfp4_is_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_mxfp4((2, 48, 96), 1.0, torch.Generator().manual_seed(0))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(reference.mxfp4_decode(blocks, scales, torch.float32), theirs)


def test_swiglu_by_hand() -> None:
    """gate 9 and up -9 are clamped to 7 and -7; gate -9 is not clamped."""
    out = reference.swiglu(torch.tensor([9.0, -9.0, -9.0, 1.0], dtype=torch.float64), 7.0)
    sigmoid = [1 / (1 + math.exp(-1.702 * gate)) for gate in (7.0, -9.0)]
    assert out.tolist() == pytest.approx([7 * sigmoid[0] * -6, -9 * sigmoid[1] * 2])
