"""Opening checkpoints: both layouts, any sharding, and every way that files can be bad.

A bad checkpoint is a ValueError or FileNotFoundError that names file and field or tensor.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import LAYOUTS, edit_json, edit_tensors, write_small
from gptoss import Model
from gptoss.checkpoint import open_checkpoint
from gptoss.config import MAX_JSON_BYTES
from safetensors.torch import load_file, save_file

Q_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj_"


def refused(path: Path, *texts: object, error: type[Exception] = ValueError) -> None:
    """Opening or checking raises this error, and its message holds these texts."""
    with pytest.raises(error) as info:
        open_checkpoint(path).check()
    for text in texts:
        assert str(text) in str(info.value)


# What opens.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_opens(layout: str, shards: int, tmp_path: Path) -> None:
    path = write_small(tmp_path / "model", layout, shards)
    opened = open_checkpoint(str(path))
    opened.check()
    assert opened.layout == layout
    assert opened.unused == []
    assert opened.tokenizer_path == path / "tokenizer.json"
    assert opened.eos_token_ids == (293, 292, 299)
    assert opened.generation["do_sample"] is True
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        for name, tensor in load_file(file).items():
            info = opened.tensors[name]
            assert info.file == file and list(info.shape) == list(tensor.shape)
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert data[info.offset : info.offset + info.nbytes] == raw


def test_unknown_tensors_are_collected(path: Path) -> None:
    edit_tensors(path, lambda t: t.update({"extra.weight": torch.zeros(3)}))
    opened = open_checkpoint(path)
    opened.check()
    assert opened.unused == ["extra.weight"]
    Model.load(path, "cpu", progress=False).close()


def test_original_directory_of_a_repository(tmp_path: Path) -> None:
    original = write_small(tmp_path / "repository" / "original", "original")
    for name in ("tokenizer.json", "generation_config.json"):
        (original / name).rename(original.parent / name)
    for path in (original, original.parent):
        opened = open_checkpoint(path)
        assert (opened.directory, opened.layout) == (original, "original")
        assert opened.tokenizer_path == original.parent / "tokenizer.json"
        assert opened.eos_token_ids == (293, 292, 299)


@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index(first: int, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shards = sorted(sharded.glob("*.safetensors"))
    last = first + len(shards) - 1
    for number, shard in reversed(list(enumerate(shards, first))):
        shard.rename(shard.with_name(f"model-{number:05d}-of-{last:05d}.safetensors"))
    open_checkpoint(sharded).check()
    (sharded / f"model-00001-of-{last:05d}.safetensors").unlink()
    refused(sharded, "model-00001-of", error=FileNotFoundError)


def test_shards_that_hold_the_same_tensor(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    first, second, _ = sorted(sharded.glob("*.safetensors"))
    shutil.copy(first, second)
    refused(sharded, second, "model.embed_tokens.weight", first.name)


def test_files_may_be_links_to_elsewhere(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.symlink_to(file.rename(tmp_path / "blobs" / str(number)))
    open_checkpoint(sharded).check()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_config_that_is_no_object(content: bytes, path: Path) -> None:
    (path / "config.json").write_bytes(content)
    refused(path, path / "config.json")


def test_huge_config_is_not_read(path: Path) -> None:
    os.truncate(path / "config.json", MAX_JSON_BYTES + 1)
    refused(path, path / "config.json", MAX_JSON_BYTES + 1)


def test_config_that_is_missing_or_no_file(path: Path) -> None:
    (path / "config.json").unlink()
    refused(path, path / "config.json", error=FileNotFoundError)
    (path / "config.json").mkdir()
    refused(path, path / "config.json", "not a regular file")


# Stop tokens.


@pytest.mark.parametrize(
    ("vocab_size", "generation", "config", "expected"),
    [
        (201088, {"eos_token_id": [200002, 200007, 7]}, None, (200002, 7)),
        (201088, {"eos_token_id": 5}, 9, (5,)),
        (201088, {"eos_token_id": None}, None, (200002, 199999, 200012)),
        (201088, None, 200002, (200002, 199999, 200012)),
        (201088, None, [200007, 4], (200002, 199999, 200012, 4)),
        (300, None, None, ()),
        (300, None, 3, (3,)),
    ],
)
def test_stop_tokens(
    vocab_size: int, generation: Any, config: Any, expected: tuple, path: Path
) -> None:
    edit_json(path / "config.json", lambda v: v.update(vocab_size=vocab_size, eos_token_id=config))
    file = path / "generation_config.json"
    file.unlink() if generation is None else file.write_text(json.dumps(generation))
    assert open_checkpoint(path).eos_token_ids == expected


@pytest.mark.parametrize("value", [300, -1, "2", True, [1, 300], [None]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_stop_tokens(name: str, value: Any, path: Path) -> None:
    edit_json(path / name, lambda values: values.update(eos_token_id=value))
    refused(path, path / name, "eos_token_id")


# Bad tensors.


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (Q_WEIGHT, lambda t: None, "missing"),
        (Q_WEIGHT, lambda t: t[None].clone(), "3 dimensions [1, 128, 64], expected 2: [128, 64]"),
        (Q_WEIGHT, lambda t: t[0].clone(), "1 dimensions [64], expected 2"),
        (Q_WEIGHT, lambda t: t.T.contiguous(), "shape [64, 128], expected [128, 64]"),
        (Q_WEIGHT, lambda t: t[:0].clone(), "shape [0, 64], expected [128, 64]"),
        (Q_WEIGHT, lambda t: t.float(), "dtype F32, expected BF16"),
        (Q_WEIGHT, lambda t: t.half(), "dtype F16, expected BF16"),
        ("model.norm.weight", lambda t: t.half(), "dtype F16, expected BF16 or F32"),
        ("model.layers.1.self_attn.sinks", lambda t: t.double(), "dtype F64"),
        ("lm_head.weight", lambda t: t[:-1].clone(), "shape [299, 64], expected [300, 64]"),
        (GATE_UP + "blocks", lambda t: t.to(torch.int8), "dtype I8, expected U8"),
        (GATE_UP + "blocks", lambda t: t.flatten(-2), "dimensions"),
        (GATE_UP + "scales", lambda t: t[..., :1].clone(), "does not fit"),
        (GATE_UP + "scales", lambda t: t.to(torch.bfloat16), "dtype BF16, expected U8"),
        (GATE_UP + "bias", lambda t: t[:, :32].clone(), "shape [8, 32], expected [8, 64]"),
    ],
)
def test_bad_tensor(name: str, change: Callable, message: str, path: Path) -> None:
    def spoil(tensors: dict) -> None:
        tensors[name] = change(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    edit_tensors(path, spoil)
    shown = GATE_UP + "scales" if message == "dimensions" else name
    refused(path, path / "model.safetensors", shown, "" if message == "dimensions" else message)


def test_blocks_and_scales_that_agree_but_not_with_the_config(path: Path) -> None:
    def halve(tensors: dict) -> None:
        for kind in ("blocks", "scales"):
            tensors[GATE_UP + kind] = tensors[GATE_UP + kind][:4].clone()

    edit_tensors(path, halve)
    refused(path, GATE_UP + "blocks", "expected [8, 64, 2, 16]")


def test_config_of_another_size(path: Path) -> None:
    edit_json(path / "config.json", lambda values: values.update(vocab_size=301))
    refused(path, "model.embed_tokens.weight", "expected [301, 64]")


def test_several_missing_tensors_are_counted(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    edit_json(
        index, lambda v: [v["weight_map"].pop(n) for n in list(v["weight_map"]) if ".sinks" in n]
    )
    refused(sharded, index, "model.layers.0.self_attn.sinks [2] and 1 more missing")


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.zeros(2)}])
def test_tensors_of_another_model(tensors: dict, path: Path) -> None:
    save_file(tensors, path / "model.safetensors")
    refused(path, path / "model.safetensors", "no gpt-oss tensors")


# Bad weight files.


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"garbage " * 100,
        lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"BF16"', b'"BF61"'),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[2,'),
    ],
)
def test_file_that_is_not_whole_safetensors(spoil: Callable[[bytes], bytes], path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    refused(path, file, "truncated or not safetensors")


def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    refused(sharded, shard, "truncated")


def test_no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()
    refused(path, path, "model.safetensors", error=FileNotFoundError)
    (path / "model.safetensors").mkdir()
    refused(path, path / "model.safetensors", "not a regular file")


def test_shards_with_odd_names(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-1-of-many.safetensors")
    refused(path, "model-1-of-many.safetensors", "model-00001-of-00002")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/../../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "model\0.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_index_that_leaves_the_directory(name: Any, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "model.safetensors")
    edit_json(index, lambda values: values["weight_map"].update({Q_WEIGHT: name}))
    refused(sharded, index, Q_WEIGHT, "inside the directory")


def test_index_that_names_what_is_not_there(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shards = sorted(sharded.glob("*.safetensors"))
    original = index.read_text()
    edit_json(index, lambda values: values["weight_map"].update({Q_WEIGHT: "gone.safetensors"}))
    refused(sharded, sharded / "gone.safetensors", index.name, error=FileNotFoundError)
    index.write_text(original)
    edit_json(index, lambda values: values["weight_map"].update({"lm_head.weight": shards[0].name}))
    refused(sharded, shards[0], "lm_head.weight", index.name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_bad_index(content: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    refused(sharded, index)


# Paths and repositories.


@pytest.mark.parametrize("path", ["/nowhere/at/all", "nowhere", "./a/b", "a/b/c", "../x", "~/x"])
def test_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        open_checkpoint(path)


def test_path_that_is_a_file(path: Path) -> None:
    with pytest.raises(ValueError, match="expected the directory"):
        open_checkpoint(path / "model.safetensors")


def run_offline(cache: Path, script: str, *arguments: object) -> str:
    """Runs Python with the hub's cache at `cache` and no network; gives what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    line = [sys.executable, "-c", "import sys\n" + script, *map(str, arguments)]
    done = subprocess.run(line, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
from gptoss.checkpoint import open_checkpoint
try:
    opened = open_checkpoint(sys.argv[1])
    opened.check()
    print(opened.layout, opened.directory)
except FileNotFoundError as error:
    print(error)
"""


def test_repository_from_the_hubs_cache(sharded: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--small-gpt-oss"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    out = run_offline(tmp_path / "cache", OPEN, "someone/small-gpt-oss")
    assert out == f"huggingface {snapshot}\n"


def test_repository_that_cannot_be_had(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    out = run_offline(tmp_path / "cache", OPEN, "someone/nothing")
    assert out.startswith("someone/nothing: no such directory, and not to be had from the hub")


def test_repository_without_the_extra(tmp_path: Path) -> None:
    script = "sys.modules['huggingface_hub'] = None\n" + OPEN
    out = run_offline(tmp_path / "cache", script, "someone/nothing")
    assert "someone/nothing" in out and "gptoss[hub]" in out
