"""Fixtures of all tests. `isa` runs a test once for each instruction set this machine has, or once
on small_models.DEVICE."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a job in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C is tested, in children too
torch.set_num_threads(1)  # on tensors this small, more threads mostly wait for each other

if TYPE_CHECKING:
    from gptoss import Model, _gptoss
    from gptoss.harmony import Harmony


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        from gptoss import _gptoss
        from small_models import DEVICE

        metafunc.parametrize("isa", _gptoss.supported_isas() if DEVICE == "cpu" else [DEVICE])


@pytest.fixture
def forced_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes every Core built within the test use the instruction set `isa`, if it is one."""
    from gptoss import _gptoss

    if isa in _gptoss.isa_names():
        monkeypatch.setenv("GPTOSS_ISA", isa)
    return isa


@pytest.fixture
def ops(isa: str) -> "_gptoss.Ops":
    """The engine's single operations on `isa`."""
    from small_models import make_ops

    return make_ops(isa)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small checkpoint of 2 layers in one file, to be spoiled."""
    from checkpoint_files import write_small

    return write_small(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in three files with an index."""
    from checkpoint_files import write_small

    return write_small(tmp_path / "sharded", shards=3)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with a tokenizer of 512 tokens."""
    from gptoss.synth import synthesize

    return synthesize(tmp_path_factory.mktemp("tiny") / "model", progress=False)


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> "Iterator[Model]":
    """That checkpoint on DEVICE. Shared: a test must leave it as it found it."""
    from gptoss import Model
    from small_models import DEVICE

    with Model.load(tiny_path, DEVICE, max_sequences=8, invariant=True, progress=False) as model:
        yield model


@pytest.fixture(scope="session")
def harmony_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny random checkpoint with gpt-oss's own tokenizer and vocabulary size. Skips where no
    vocabulary file is to be had. The user's cache is left alone."""
    from gptoss.synth import synthesize
    from o200k import find_vocabulary, write_tokenizer

    pytest.importorskip("openai_harmony")
    vocabulary = find_vocabulary()
    if vocabulary is None:
        pytest.skip("needs o200k_base.tiktoken in TIKTOKEN_CACHE_DIR or TIKTOKEN_RS_CACHE_DIR")
    directory = tmp_path_factory.mktemp("harmony")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
        yield synthesize(
            directory / "model",
            tokenizer=write_tokenizer(directory / "tokenizer.json", vocabulary),
            vocab_size=201088,
            n_layers=2,
            hidden_size=64,
            n_heads=2,
            n_kv_heads=1,
            n_experts=4,
            intermediate_size=32,
            progress=False,
        )


@pytest.fixture(scope="session")
def harmony_model(harmony_path: Path) -> "Iterator[Model]":
    """That checkpoint on the CPU. Shared: a test must leave it as it found it."""
    from gptoss import Model

    with Model.load(harmony_path, "cpu", max_sequences=8, progress=False) as model:
        yield model


@pytest.fixture(scope="session")
def harmony(harmony_path: Path) -> "Harmony":
    """The format over that checkpoint's tokenizer."""
    from gptoss.harmony import Harmony
    from gptoss.tokenizer import Tokenizer

    return Harmony.for_tokenizer(Tokenizer.from_file(harmony_path / "tokenizer.json"))
