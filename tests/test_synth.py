"""Synthetic checkpoints: same seed same bytes, true format, sensible values, nothing half-done."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gptoss import Model
from gptoss.checkpoint import open_checkpoint
from gptoss.config import read_config
from gptoss.synth import synthesize
from gptoss.synth_tokenizer import SPECIAL_TOKENS
from reference import mxfp4_decode
from safetensors.torch import load_file

SMALL = dict(n_layers=2, hidden_size=64, n_heads=4, n_kv_heads=2, vocab_size=300)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_same_seed_same_bytes(layout: str, tmp_path: Path) -> None:
    first = synthesize(tmp_path / "a", layout=layout, shards=2, progress=False)
    script = "import sys; from gptoss.synth import synthesize as s; "
    script += f"s(sys.argv[1], layout={layout!r}, shards=2, progress=False)"
    subprocess.run([sys.executable, "-c", script, tmp_path / "b"], check=True)
    assert files_of(first) == files_of(tmp_path / "b")
    other = synthesize(tmp_path / "c", layout=layout, shards=2, seed=1, progress=False)
    for name, tensor in tensors_of(first).items():
        assert not torch.equal(tensor, tensors_of(other)[name]), name


def test_both_layouts_hold_the_same_weights(tmp_path: Path) -> None:
    hugging_face = tensors_of(synthesize(tmp_path / "a", progress=False, **SMALL))
    original = tensors_of(synthesize(tmp_path / "b", layout="original", progress=False, **SMALL))
    for kind in ("weight", "bias"):
        parts = [f"model.layers.1.self_attn.{part}_proj.{kind}" for part in "qkv"]
        joint = torch.cat([hugging_face[part] for part in parts])
        assert torch.equal(joint, original[f"block.1.attn.qkv.{kind}"])
    for name, same in {
        "model.embed_tokens.weight": "embedding.weight",
        "model.layers.1.input_layernorm.weight": "block.1.attn.norm.scale",
        "model.layers.1.self_attn.sinks": "block.1.attn.sinks",
        "model.layers.1.self_attn.o_proj.weight": "block.1.attn.out.weight",
        "model.layers.1.self_attn.o_proj.bias": "block.1.attn.out.bias",
        "model.layers.1.post_attention_layernorm.weight": "block.1.mlp.norm.scale",
        "model.layers.1.mlp.router.weight": "block.1.mlp.gate.weight",
        "model.layers.1.mlp.router.bias": "block.1.mlp.gate.bias",
        "model.layers.1.mlp.experts.gate_up_proj_blocks": "block.1.mlp.mlp1_weight.blocks",
        "model.layers.1.mlp.experts.gate_up_proj_scales": "block.1.mlp.mlp1_weight.scales",
        "model.layers.1.mlp.experts.gate_up_proj_bias": "block.1.mlp.mlp1_bias",
        "model.layers.1.mlp.experts.down_proj_blocks": "block.1.mlp.mlp2_weight.blocks",
        "model.layers.1.mlp.experts.down_proj_scales": "block.1.mlp.mlp2_weight.scales",
        "model.layers.1.mlp.experts.down_proj_bias": "block.1.mlp.mlp2_bias",
        "model.norm.weight": "norm.scale",
        "lm_head.weight": "unembedding.weight",
    }.items():
        assert torch.equal(hugging_face[name], original[same]), name
    assert len(hugging_face) == 3 + 2 * 19 and len(original) == 3 + 2 * 15


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("cut", [{"shards": 4}, {"max_shard_bytes": 100_000}])
def test_shards_hold_the_same_tensors(layout: str, cut: dict, tmp_path: Path) -> None:
    whole = synthesize(tmp_path / "a", layout=layout, progress=False, **SMALL)
    parts = synthesize(tmp_path / "b", layout=layout, progress=False, **cut, **SMALL)
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]
    shards = sorted(parts.glob("*.safetensors"))
    assert len(shards) == cut.get("shards", len(shards)) > 1
    expected, found = tensors_of(whole), tensors_of(parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for shard in shards:
        names = load_file(shard).keys()
        assert all(index["weight_map"][name] == shard.name for name in names)
        limit = cut.get("max_shard_bytes", 1 << 30)
        assert len(names) == 1 or sum(expected[name].nbytes for name in names) <= limit


def test_transformers_reads_the_config(tiny_path: Path) -> None:
    from transformers import AutoTokenizer, GptOssConfig

    theirs, ours = GptOssConfig.from_pretrained(tiny_path), read_config(tiny_path / "config.json")
    assert theirs.quantization_config["quant_method"] == "mxfp4"
    assert theirs.rope_parameters["rope_type"] == "yarn"
    assert theirs.rope_parameters["factor"] == ours.rope_factor == 32
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta == 150000
    assert theirs.rope_parameters["truncate"] is ours.rope_truncate is False
    windows = {"sliding_attention": theirs.sliding_window, "full_attention": 0}
    assert [windows[kind] for kind in theirs.layer_types] == ours.layer_windows
    assert theirs.num_local_experts == ours.n_experts
    assert theirs.vocab_size == len(AutoTokenizer.from_pretrained(tiny_path)) == 512


def test_both_configs_mean_the_same(tmp_path: Path) -> None:
    shape = dict(SMALL, sliding_window=64, swiglu_limit=5.0, rope_theta=1e4, rope_factor=8.0)
    paths = [
        synthesize(tmp_path / layout, layout=layout, progress=False, **shape)
        for layout in ("huggingface", "original")
    ]
    first, second = [read_config(path / "config.json") for path in paths]
    names = [name for name in dir(first) if not name.startswith("_")]
    assert {name: getattr(first, name) for name in names} == {
        name: getattr(second, name) for name in names
    }
    assert first.layer_windows == [64, 0] and first.max_context == 8 * 4096
    assert (first.swiglu_limit, first.rope_theta) == (5.0, 1e4)


def test_values_have_the_intended_spread(tmp_path: Path) -> None:
    shape = dict(SMALL, hidden_size=192, intermediate_size=320, vocab_size=2000)
    tensors = tensors_of(synthesize(tmp_path / "model", progress=False, **shape))
    experts = "model.layers.0.mlp.experts."
    for name, std in {"gate_up_proj": 2.5 / 192**0.5, "down_proj": 0.2 / 320**0.5}.items():
        blocks, scales = tensors[f"{experts}{name}_blocks"], tensors[f"{experts}{name}_scales"]
        values = mxfp4_decode(blocks, scales, torch.float32)
        assert values.std().item() == pytest.approx(std, rel=0.05)
        assert 4 <= scales.unique().numel() <= 5
    for name, mean, std in (
        ("model.embed_tokens.weight", 0, 1),
        ("lm_head.weight", 0, 2.5 / 192**0.5),
        ("model.layers.0.self_attn.q_proj.weight", 0, 1.2 / 192**0.5),
        ("model.norm.weight", 1, 0.2),
    ):
        values = tensors[name].float()
        assert tensors[name].dtype == torch.bfloat16
        assert values.std().item() == pytest.approx(std, rel=0.15)
        assert values.mean().item() == pytest.approx(mean, abs=0.2 * std)


def test_the_forward_pass_is_well_behaved(tiny: Model) -> None:
    tokens = torch.randint(512, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = tiny.forward(tokens)
    assert logits.isfinite().all()
    assert 1 < logits.std().item() < 5
    assert logits.argmax(-1).unique().numel() > 30


def test_tokenizer(tiny_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 512
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(503, 512))
    text = "The weather in París is 20 °C, 天気 🙂\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|start|>").ids == [tokenizer.token_to_id("<|start|>")]
    stops = [tokenizer.token_to_id(f"<|{name}|>") for name in ("return", "endoftext", "call")]
    assert list(open_checkpoint(tiny_path).eos_token_ids) == stops


@pytest.mark.parametrize("vocab_size", [265, 300, 4000])
def test_tokenizer_of_any_size(vocab_size: int, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = synthesize(tmp_path / "model", progress=False, n_layers=1, vocab_size=vocab_size)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab_size
    assert tokenizer.token_to_id(SPECIAL_TOKENS[-1]) == vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("añb").ids) == "añb"


def test_no_tokenizer_for_a_vocabulary_without_room(tmp_path: Path) -> None:
    path = synthesize(tmp_path / "model", progress=False, n_layers=1, vocab_size=264)
    assert not (path / "tokenizer.json").exists()
    assert open_checkpoint(path).eos_token_ids == ()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"preset": "7b"}, "preset is '7b'"),
        ({"layout": "gguf"}, "layout is 'gguf'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"shards": 0}, "shards is 0"),
        ({"shards": 10**6}, "shards is 1000000"),
        ({"shards": 2, "max_shard_bytes": 5}, "both"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"depth": 3}, "depth"),
        ({"n_layers": 0}, "num_hidden_layers is 0"),
        ({"n_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"hidden_size": 100}, "hidden_size is 100"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"experts_per_token": 9}, "experts_per_token is 9"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ],
)
def test_bad_arguments(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        synthesize(tmp_path / "model", progress=False, **arguments)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_it_is_stopped(exception: type, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise exception

    with pytest.raises(exception):
        synthesize(tmp_path / "model", progress=stop, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_when_it_is_stopped(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path = synthesize(tmp_path / "model", progress=False, **SMALL)
    before = files_of(path)
    with pytest.raises(KeyboardInterrupt):
        synthesize(path, progress=stop, overwrite=True, seed=1, **SMALL)
    assert files_of(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="1000 are free") as error:
        synthesize(tmp_path / "model", progress=False)
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_overwrites_only_checkpoints_and_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    synthesize(path, progress=False, **SMALL)  # an empty directory is free to take
    with pytest.raises(FileExistsError, match="not empty"):
        synthesize(path, progress=False, **SMALL)
    before = files_of(path)
    synthesize(path, progress=False, overwrite=True, seed=1, shards=2, **SMALL)
    assert files_of(path) != before and not (path / "model.safetensors").exists()
    (path / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        synthesize(path, progress=False, overwrite=True, **SMALL)
    assert (path / "notes.txt").read_text() == "keep me"
    with pytest.raises(FileExistsError, match="no directory"):
        synthesize(path / "notes.txt", progress=False, overwrite=True, **SMALL)
    assert list(tmp_path.iterdir()) == [path]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = synthesize(tmp_path / "model", progress=lambda *call: calls.append(call), **SMALL)
    total = sum(tensor.nbytes for tensor in tensors_of(path).values())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tokenizer_of_ones_own(tmp_path: Path, tiny_path: Path) -> None:
    """Copied as it is; vocabulary and stop tokens follow it."""
    file = tiny_path / "tokenizer.json"
    path = synthesize(tmp_path / "model", tokenizer=file, preset="tiny", progress=False)
    assert (path / "tokenizer.json").read_bytes() == file.read_bytes()
    assert json.loads((path / "config.json").read_text())["vocab_size"] == 512
    expected = json.loads((tiny_path / "generation_config.json").read_text())
    assert json.loads((path / "generation_config.json").read_text()) == expected
    larger = synthesize(tmp_path / "larger", tokenizer=file, vocab_size=600, progress=False)
    assert json.loads((larger / "config.json").read_text())["vocab_size"] == 600
    assert json.loads((larger / "generation_config.json").read_text()) == expected
    with pytest.raises(ValueError, match=r"vocab_size is 511, expected at least 512: .* token ids"):
        synthesize(tmp_path / "smaller", tokenizer=file, vocab_size=511, progress=False)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        synthesize(tmp_path / "none", tokenizer=tmp_path / "none.json", progress=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["larger", "model"]
