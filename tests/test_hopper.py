"""Products of many tokens on Hopper (csrc/cuda/hopper.cu), against float64 and plain torch.

They run on a card of compute capability 9.0, and in the emulator, which is told to be one. Sums are
in another order than in the kernels for fewer tokens, so here a row's bits may depend on how many
rows there are; on nothing else.
"""

from collections.abc import Iterator

import pytest
import reference
import torch
from errors import assert_same_rounding, median_error
from gptoss import _gptoss
from op_cases import (
    MAX_SCALE,
    ROUTINGS,
    assert_bitwise,
    assert_no_experts_for_padding,
    every_code_and_scale,
    moe_case,
    normal,
    run_moe,
    seeded,
)
from reference import ENGINE, EXACT
from small_models import (
    DEVICE,
    core_logits,
    feed,
    make_core,
    random_mxfp4,
    random_tensors,
    random_tokens,
    small,
)
from torch import Tensor

EMULATED = "emulator" in _gptoss.build_info()["cuda"]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        pytest.skip("GPTOSS_TEST_DEVICE is not cuda")
    if EMULATED:
        monkeypatch.setenv("GPTOSS_EMULATOR_SM", "90")
    if not make_ops().isa.startswith("sm_90"):
        pytest.skip("the card is not a Hopper")
    yield


def make_ops(invariant: bool = False) -> _gptoss.Ops:
    return _gptoss.Ops(DEVICE, invariant=invariant)


# Tokens from one box to several tiles; rows from less than a warp's to several tiles; inputs of one
# to more stages than the ring has, even and odd.
@pytest.mark.parametrize("n", (65, 96, 128, 129, 300))
@pytest.mark.parametrize("shape", ((64, 5), (96, 352), (160, 211), (1184, 97)), ids=str)
def test_linear(n: int, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    generator = seeded(n, inputs, outputs)
    x = normal(n, inputs, generator=generator)
    weight = normal(outputs, inputs, generator=generator).bfloat16()
    bias = normal(outputs, generator=generator)
    before = normal(n, outputs, generator=generator)

    def run(add: bool) -> Tensor:
        out = before.clone()
        make_ops().linear(out, x, weight, bias, add)
        return out

    plain = reference.linear(x, weight, bias, ENGINE)
    exact = reference.linear(x.double(), weight, bias, EXACT)
    assert_same_rounding(run(False), plain, exact, share=0.01)
    assert_same_rounding(run(True), before + plain, before + exact, share=0.01)


@pytest.mark.parametrize("n", (65, 129))
@pytest.mark.parametrize("shape", ((32, 1), (96, 31), (160, 33), (2880, 97)), ids=str)
def test_mxfp4_linear(n: int, shape: tuple[int, int]) -> None:
    inputs, outputs = shape
    generator = seeded(n, inputs, outputs)
    x = normal(n, inputs, generator=generator)
    blocks, scales = random_mxfp4((outputs, inputs), 1.0, generator)
    weight = reference.mxfp4_decode(blocks, scales)
    out = torch.empty(n, outputs)
    make_ops().mxfp4_linear(out, x, blocks, scales)
    plain = reference.linear(x, weight, None, ENGINE)
    exact = reference.linear(x.double(), weight, None, EXACT)
    assert_same_rounding(out, plain, exact, share=0.01)


def test_every_code_and_scale() -> None:
    """Exact, subnormal and infinite weights included, as in test_mxfp4.py."""
    blocks, scales = every_code_and_scale()
    x = torch.cat((torch.eye(32), torch.zeros(64, 32)))
    out = torch.empty(96, 256)
    make_ops().mxfp4_linear(out, x, blocks, scales)
    expected = reference.mxfp4_decode(blocks, scales, torch.float32)
    assert torch.equal(out.T[: MAX_SCALE + 1, :32], expected[: MAX_SCALE + 1])
    assert not out.T[: MAX_SCALE + 1, 32:].any()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", ((8, 96, 64), (4, 160, 224), (4, 352, 160)), ids=str)
@pytest.mark.parametrize("n", (129, 300))
def test_moe(n: int, shape: tuple[int, int, int], routing: str) -> None:
    x, t, ids, weights, experts, plain, exact = moe_case(n, shape, routing)
    out = run_moe(make_ops(), x, t, ids, weights, experts)
    assert_same_rounding(out, plain, exact, share=0.05)
    assert_bitwise([out, run_moe(make_ops(), x, t, ids, weights, experts)])


def test_which_path() -> None:
    """Many tokens take this path, which shows in the last bits; few, and invariant=True, do not."""
    generator = seeded(0)
    x = normal(128, 1184, generator=generator)
    weight = normal(64, 1184, generator=generator).bfloat16()

    def run(n: int, invariant: bool) -> Tensor:
        out = torch.empty(n, 64)
        make_ops(invariant).linear(out, x[:n], weight, None)
        return out

    assert torch.equal(run(64, False), run(64, True))
    assert torch.equal(run(128, True)[:64], run(64, True))
    assert not torch.equal(run(128, False), run(128, True))


def test_padding_chooses_no_experts() -> None:
    assert_no_experts_for_padding(make_ops(), 300, 90)


MODEL = small(2, hidden_size=160, n_heads=2, n_kv_heads=1, n_experts=4, intermediate_size=96)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(MODEL)


def assert_near(logits: Tensor, prompts: list[Tensor], tensors: dict[str, Tensor]) -> None:
    """All logits of those sequences: as near to float64 as torch with the engine's roundings is."""
    exact, plain = (
        torch.cat([reference.forward(tokens, tensors, MODEL, precision) for tokens in prompts])
        for precision in (EXACT, ENGINE)
    )
    assert median_error(logits, exact) <= 1.25 * median_error(plain, exact)


def test_prompt(tensors: dict[str, Tensor]) -> None:
    """With rotation, cache and residual: 300 tokens, of which the second step has 140."""
    tokens = random_tokens(300, MODEL)
    core = make_core(MODEL, tensors, invariant=False)
    assert_near(core_logits(core, tokens, 160), [tokens], tensors)


def test_replayed_steps(tensors: dict[str, Tensor]) -> None:
    """70 sequences, filled up to 72, decoded by steps that are recorded and replayed. Sequences of
    the same tokens have the same bits."""
    n, length, kinds = 70, 5, 5
    core = make_core(
        MODEL, tensors, invariant=False, max_context=128, max_sequences=72, max_batch_tokens=128
    )
    prompts = [random_tokens(length, MODEL, seed) for seed in range(kinds)]
    sequences = [core.new_sequence() for _ in range(n)]
    steps = [
        feed(core, [(s, prompts[i % kinds][at : at + 1]) for i, s in enumerate(sequences)])
        for at in range(length)
    ]
    logits = [torch.cat([step[i] for step in steps]) for i in range(n)]
    assert_near(torch.cat(logits[:kinds]), prompts, tensors)
    for i in range(kinds, n):
        assert_bitwise([logits[i], logits[i % kinds]])
