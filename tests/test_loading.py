"""Streaming a checkpoint into the core: order, progress, and what happens when it fails."""

import os
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_json, edit_tensors, write_small
from gptoss import Model, _gptoss, checkpoint
from gptoss.checkpoint import open_checkpoint


def core_for(path: Path) -> _gptoss.Core:
    return _gptoss.Core(open_checkpoint(path).config, "cpu")


def test_both_layouts_and_any_sharding_load_the_same_model(
    path: Path, sharded: Path, tmp_path: Path
) -> None:
    original = write_small(tmp_path / "original", "original", shards=2)
    logits = []
    for source in (path, sharded, original):
        with Model.load(source, "cpu", progress=False) as model:
            logits.append(model.forward(range(150)))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_norms_and_biases_may_be_float32(path: Path) -> None:
    def widen(tensors: dict) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16 and tensor.ndim == 1:
                tensors[name] = tensor.float()

    with Model.load(path, "cpu", progress=False) as model:
        expected = model.forward([1, 2, 3])
    edit_tensors(path, widen)
    with Model.load(path, "cpu", progress=False) as model:
        assert torch.equal(model.forward([1, 2, 3]), expected)


@pytest.mark.parametrize("batch_bytes", [1, 20_000, 256 << 20])
def test_batches_hold_every_tensor_once(
    batch_bytes: int, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(checkpoint, "LARGE_BYTES", 30_000)
    opened = open_checkpoint(sharded)
    batches = list(opened._batches())
    names = [name for _, batch in batches for name in batch]
    assert sorted(names) == sorted(opened.expected)
    for file, batch in batches:
        infos = [opened.tensors[name] for name in batch]
        assert all(info.file == file for info in infos)
        assert len(batch) == 1 or sum(info.nbytes for info in infos) <= batch_bytes
    large = [opened.tensors[name].nbytes >= 30_000 for name in names]
    assert large == sorted(large, reverse=True) and any(large)


@pytest.mark.parametrize("free", [0, float("inf")])
def test_loads_whether_or_not_memory_is_short(
    free: float, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little free memory consumed file pages are dropped; what is loaded is the same."""
    with Model.load(sharded, "cpu", progress=False) as model:
        expected = model.forward([1, 2, 3])
    monkeypatch.setattr(checkpoint, "_free_memory", lambda: free)
    monkeypatch.setattr(checkpoint, "BATCH_BYTES", 1)
    with Model.load(sharded, "cpu", progress=False) as model:
        assert torch.equal(model.forward([1, 2, 3]), expected)


def test_progress_counts_every_byte(sharded: Path) -> None:
    calls: list[tuple[int, int]] = []
    opened = open_checkpoint(sharded)
    opened.load_into(core_for(sharded), progress=lambda *call: calls.append(call))
    assert calls[-1] == (opened.nbytes, opened.nbytes)
    assert len(calls) == len(opened.expected)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_progress_bar_is_on_stderr_and_ends(
    sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = open_checkpoint(sharded)
    opened.load_into(core_for(sharded))
    out, err = capsys.readouterr()
    assert out == "" and "100%" in err and err.endswith("\n")
    opened.load_into(core_for(sharded), progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_ends_when_loading_fails(
    path: Path, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(path / "config.json", lambda values: values.update(vocab_size=301))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight|lm_head\.weight"):
        open_checkpoint(sharded).load_into(core_for(path))
    assert capsys.readouterr().err.endswith("\n")


def test_interrupted_loading(sharded: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    core = core_for(sharded)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(sharded).load_into(core, progress=interrupt)
    with pytest.raises(ValueError, match="missing"):
        core.finish_loading()


def test_file_truncated_after_opening(path: Path) -> None:
    opened = open_checkpoint(path)
    core = core_for(path)
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        opened.load_into(core, progress=False)


def test_bad_checkpoints_are_refused_before_the_core_is_made(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("memory is about to be taken")

    monkeypatch.setattr(_gptoss, "Core", never)
    edit_tensors(path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        Model.load(path, "cpu", progress=False)
