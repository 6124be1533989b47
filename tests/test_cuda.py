"""What only the CUDA backend has: padded and replayed decode steps, memory that is planned,
failures that can be recovered from. Runs where GPTOSS_TEST_DEVICE is cuda; what the card is made to
do, in the emulator."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import write_small
from gptoss import Model, SamplingParams, _gptoss
from op_cases import assert_no_experts_for_padding
from small_models import (
    DEVICE,
    core_fields,
    core_logits,
    feed,
    make_core,
    random_tensors,
    random_tokens,
    small,
)

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="of the CUDA backend")
emulated = pytest.mark.skipif(
    _gptoss.build_info()["cuda"] != "emulator", reason="a card does not fail when asked to"
)

CONFIG = small(2, hidden_size=64, n_heads=2, n_kv_heads=1, n_experts=4, vocab_size=64)
LIMITS = {"max_context": 300, "max_sequences": 6, "max_batch_tokens": 160}
GREEDY = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("n, padding", [(4, 1), (24, 7), (192, 60), (1100, 300)])
def test_padding_chooses_no_experts(n: int, padding: int) -> None:
    """Over the kernels that norm and sort few rows and many."""
    assert_no_experts_for_padding(_gptoss.Ops(DEVICE), n, padding)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "model")


def load(path: Path, device: str = DEVICE) -> Model:
    return Model.load(path, device, max_context=256, max_sequences=2, progress=False)


def test_replayed_steps_have_the_same_bits() -> None:
    """Sequences that come, go and grow over page ends, decoded in steps of several sizes, some of
    them filled up: as if each had been read at once."""
    core = make_core(CONFIG, random_tensors(CONFIG), **LIMITS)
    prompts = [random_tokens(140 - 2 * i, CONFIG, i) for i in range(6)]
    expected = [core_logits(core, tokens) for tokens in prompts]
    sequences = [core.new_sequence() for _ in prompts]
    for i, sequence in enumerate(sequences):
        feed(core, [(sequence, prompts[i][: 120 - i])])
    for step in range(16):
        chosen = range(step % 2, (5, 6, 3, 4)[step // 4])
        batch = [(sequences[i], prompts[i][sequences[i].length :][:1]) for i in chosen]
        for i, logits in zip(chosen, feed(core, batch), strict=True):
            assert torch.equal(logits[0], expected[i][sequences[i].length - 1]), (step, i)


def test_steps_that_want_some_rows() -> None:
    """Single tokens of which only some are followed by logits."""
    core = make_core(CONFIG, random_tensors(CONFIG), **LIMITS)
    prompts = [random_tokens(4, CONFIG, i) for i in range(3)]
    expected = [core_logits(core, tokens) for tokens in prompts]
    sequences = [core.new_sequence() for _ in prompts]
    for step, wants in enumerate(((0, 0, 0), (1, 0, 1), (0, 1, 0), (2, 1, 1))):
        rows = [i for i, want in enumerate(wants) if want]
        logits = torch.empty(len(rows), CONFIG.vocab_size)
        tokens = [prompt[step : step + 1].tolist() for prompt in prompts]
        items = zip(sequences, tokens, wants, [None] * 3, strict=True)
        core.step(list(items), logits)
        for i, row in zip(rows, logits, strict=True):
            assert torch.equal(row, expected[i][step])


def test_more_than_was_reserved() -> None:
    core = make_core(CONFIG, random_tensors(CONFIG), **LIMITS | {"max_sequences": 2})
    assert (core.max_sequences, core.max_context, core.max_batch_tokens) == (2, 300, 160)
    sequences = [core.new_sequence() for _ in range(3)]
    with pytest.raises(ValueError, match="at most 2 sequences, not 3"):
        core.step([(sequence, [1], 0, None) for sequence in sequences])
    with pytest.raises(ValueError, match="at most 160 tokens, not 161"):
        core.step([(sequences[0], [1] * 161, 0, None)])
    for sequence in sequences[:2]:
        for _ in range(2):
            core.step([(sequence, [1] * 150, 0, None)])
    with pytest.raises(ValueError, match="max_context = 300"):
        core.step([(sequences[0], [1], 0, None)])
    with pytest.raises(RuntimeError, match="the cache is full: 6 of 6 pages"):
        core.step([(sequences[2], [1], 0, None)])
    assert [sequence.length for sequence in sequences] == [300, 300, 0]
    sequences[0].close()
    core.step([(sequences[2], [1], 0, None)])


@pytest.mark.parametrize("cls", ["Model", "Core"])
def test_invariant_is_taken(path: Path, cls: str) -> None:
    """Both settings give the same tokens; anything but a bool is refused."""
    if cls == "Core":
        _gptoss.Core(_gptoss.Config(**core_fields(CONFIG)), DEVICE, **LIMITS, invariant=True)
        return
    tokens = []
    for invariant in (False, True):
        options = {"max_context": 256, "max_sequences": 2, "progress": False}
        with Model.load(path, DEVICE, invariant=invariant, **options) as model:
            tokens.append(model.generate([1, 2, 3], GREEDY).tokens)
    assert tokens[0] == tokens[1]
    with pytest.raises(ValueError, match="invariant"):
        Model.load(path, DEVICE, invariant=1)


# --- bad devices ---------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(
    "card, device, kind, message",
    [
        ({"SM": "75"}, "cuda", RuntimeError, "capability 7.5, but gptoss needs 8.0"),
        ({"SM": "100"}, "cuda", RuntimeError, r"capability 10.0, but this build has kernels for"),
        ({"DEVICES": "0"}, "cuda", RuntimeError, "no usable GPU .*driver"),
        ({}, "cuda:7", ValueError, '"cuda:7" was asked for, but this machine has 1 GPU$'),
    ],
)
def test_unusable_devices(
    path: Path, monkeypatch: pytest.MonkeyPatch, card: dict, device: str, kind: type, message: str
) -> None:
    for name, value in card.items():
        monkeypatch.setenv(f"GPTOSS_EMULATOR_{name}", value)
    with pytest.raises(kind, match=message):
        load(path, device)
    with load(path, "auto") as model:
        assert model.core.device == ("cpu" if card else "cuda:0")


@emulated
def test_second_card(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_EMULATOR_DEVICES", "2")
    with load(path, "cuda:1") as model:
        assert model.core.device == "cuda:1"
        assert len(model.generate([1], GREEDY).tokens) == 6


@emulated
@pytest.mark.parametrize(
    "memory, limits, message",
    [
        ("100000", {}, r"its weights take 0\.\d+ GiB, work space .* a cache for 1 sequence 0\.\d+"),
        ("60000000", {"max_context": 4096, "max_sequences": 32}, "32 sequences of 4096 tokens"),
    ],
)
def test_too_little_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, limits: dict, message: str
) -> None:
    """Refused with the numbers before a tensor is read; less asked for fits, where that is so."""
    monkeypatch.setenv("GPTOSS_EMULATOR_MEMORY", memory)
    monkeypatch.setattr("gptoss.checkpoint.Checkpoint.load_into", None)
    with pytest.raises(RuntimeError, match=f"does not fit into the memory of cuda:0: .*{message}"):
        Model.load(path, DEVICE, progress=False, **limits)
    monkeypatch.undo()
    with load(path) as model:
        assert model.max_context == 256


# --- failures ------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("kernel", [3, 110])  # of the prompt; of a step that is replayed
def test_failure_in_a_generation(path: Path, monkeypatch: pytest.MonkeyPatch, kernel: int) -> None:
    """The error names the call, the model says what happened from then on, and when it is closed
    the process can load again."""
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    model = load(path)
    expected = model.generate([1, 2, 3], params).tokens
    sequence = model.core.new_sequence()
    model.core.step([(sequence, [4, 5], 0, None)])
    held = model.core.memory()["cache_used"]
    monkeypatch.setenv("GPTOSS_EMULATOR_FAIL", str(kernel))
    with pytest.raises(RuntimeError, match=r"^CUDA: \w+.* failed: an illegal memory access"):
        model.generate([1, 2, 3], params)
    assert (sequence.length, model.core.memory()["cache_used"]) == (2, held)
    for use in (
        lambda: model.generate([1], GREEDY),
        lambda: model.core.step([(sequence, [6], 0, None)]),
        lambda: model.forward([1]),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be used any more.*CUDA: \w+.* failed"):
            use()
    with pytest.raises(RuntimeError, match="all models on it are closed"):
        load(path)
    sequence.close()
    model.close()
    with load(path) as again:
        assert again.generate([1, 2, 3], params).tokens == expected


@emulated
def test_failure_while_loading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_EMULATOR_FAIL", "5")
    with pytest.raises(RuntimeError, match=r"^CUDA: \w+.* failed: an illegal memory access"):
        load(path)
    with load(path) as model:
        assert len(model.generate([1], GREEDY).tokens) == 6
