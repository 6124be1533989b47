"""Writes a gpt-oss checkpoint as GGUF, with the types of the official files.

Attention, embedding and output become Q8_0; experts stay MXFP4, bit for bit; norms, biases, sinks
and the router are F32. The checkpoint's tokenizer.json goes in, too; without one, feed token ids.

    python bench/write_gguf.py CHECKPOINT OUT.gguf
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gptoss.checkpoint import Checkpoint, open_checkpoint
from safetensors import safe_open

F32, Q8_0, MXFP4 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "MXFP4"))
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Output:
    """A tensor of the file. `make` gives its values: float32 for F32, else bytes."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


class Source:
    """The tensors of a checkpoint of either layout, by their Hugging Face names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def read(self, name: str) -> torch.Tensor:
        if self.checkpoint.layout == "original":
            name, rows = self._original(name)
        else:
            rows = slice(None)
        with safe_open(self.checkpoint.tensors[name].file, framework="pt") as file:
            return file.get_slice(name)[rows]

    def _original(self, name: str) -> tuple[str, slice]:
        """The name in the original layout, and which of its rows."""
        config = self.checkpoint.config
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        whole = {
            "model.embed_tokens.weight": "embedding.weight",
            "model.norm.weight": "norm.scale",
            "lm_head.weight": "unembedding.weight",
        }
        if name in whole:
            return whole[name], slice(None)
        layer, part = name.removeprefix("model.layers.").split(".", 1)
        for index, letter in enumerate("qkv"):
            if part.startswith(f"self_attn.{letter}_proj."):
                ends = (0, q, q + kv, q + 2 * kv)
                kind = part.rsplit(".", 1)[1]
                return f"block.{layer}.attn.qkv.{kind}", slice(ends[index], ends[index + 1])
        for ours, theirs in (
            ("input_layernorm.weight", "attn.norm.scale"),
            ("post_attention_layernorm.weight", "mlp.norm.scale"),
            ("self_attn.sinks", "attn.sinks"),
            ("self_attn.o_proj", "attn.out"),
            ("mlp.router", "mlp.gate"),
            ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
            ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
            ("mlp.experts.gate_up_proj_", "mlp.mlp1_weight."),
            ("mlp.experts.down_proj_", "mlp.mlp2_weight."),
        ):
            part = part.replace(ours, theirs)
        return f"block.{layer}.{part}", slice(None)


def quantize(matrix: torch.Tensor) -> np.ndarray:
    """bfloat16 [rows, K] -> Q8_0, uint8 [rows, K/32 * 34]: blocks of a float16 scale, 32 int8."""
    parts = [
        gguf.quants.quantize(part.float().numpy(), Q8_0) for part in matrix.split(ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def repack(blocks: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """MXFP4 of a checkpoint -> of GGUF. blocks uint8 [E, rows, K/32, 16], scales [E, rows, K/32]
    -> uint8 [E, rows, K/32 * 17]: a scale, then bytes that hold elements j (low) and j + 16."""
    experts, rows, count, _ = blocks.shape
    out = np.empty((experts, rows, count, 17), np.uint8)
    for expert in range(experts):
        packed = blocks[expert].numpy()
        codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(rows, count, 32)
        out[expert, ..., 0] = scales[expert].numpy()
        out[expert, ..., 1:] = codes[..., :16] | codes[..., 16:] << 4
    return out.reshape(experts, rows, count * 17)


def outputs(source: Source) -> Iterator[Output]:
    """Every tensor of the file."""
    config = source.checkpoint.config
    hidden, vocab, experts = config.hidden_size, config.vocab_size, config.n_experts
    inner, q_rows = config.intermediate_size, config.n_heads * config.head_dim
    kv_rows = config.n_kv_heads * config.head_dim

    def plain(name: str, origin: str, *shape: int) -> Output:
        return Output(name, F32, shape, lambda: source.read(origin).float().numpy())

    def matrix(name: str, origin: str, *shape: int) -> Output:
        return Output(name, Q8_0, shape, lambda: quantize(source.read(origin)))

    def expert(name: str, origin: str, rows: slice, *shape: int) -> Iterator[Output]:
        def make() -> np.ndarray:
            blocks, scales = (source.read(f"{origin}_{part}") for part in ("blocks", "scales"))
            return repack(blocks[:, rows], scales[:, rows])

        def bias() -> np.ndarray:
            return source.read(f"{origin}_bias").float()[:, rows].contiguous().numpy()

        yield Output(f"{name}.weight", MXFP4, shape, make)
        yield Output(f"{name}.bias", F32, shape[:2], bias)

    yield matrix("token_embd.weight", "model.embed_tokens.weight", vocab, hidden)
    yield plain("output_norm.weight", "model.norm.weight", hidden)
    yield matrix("output.weight", "lm_head.weight", vocab, hidden)
    for layer in range(config.n_layers):
        to, origin = f"blk.{layer}", f"model.layers.{layer}"
        yield plain(f"{to}.attn_norm.weight", f"{origin}.input_layernorm.weight", hidden)
        for name, part, rows, columns in (
            ("attn_q", "q_proj", q_rows, hidden),
            ("attn_k", "k_proj", kv_rows, hidden),
            ("attn_v", "v_proj", kv_rows, hidden),
            ("attn_output", "o_proj", hidden, q_rows),
        ):
            part = f"{origin}.self_attn.{part}"
            yield matrix(f"{to}.{name}.weight", f"{part}.weight", rows, columns)
            yield plain(f"{to}.{name}.bias", f"{part}.bias", rows)
        yield plain(f"{to}.attn_sinks.weight", f"{origin}.self_attn.sinks", config.n_heads)
        norm = f"{origin}.post_attention_layernorm.weight"
        yield plain(f"{to}.post_attention_norm.weight", norm, hidden)
        router = f"{origin}.mlp.router"
        yield plain(f"{to}.ffn_gate_inp.weight", f"{router}.weight", experts, hidden)
        yield plain(f"{to}.ffn_gate_inp.bias", f"{router}.bias", experts)
        gate_up, down = (f"{origin}.mlp.experts.{part}_proj" for part in ("gate_up", "down"))
        even, odd = slice(0, None, 2), slice(1, None, 2)
        yield from expert(f"{to}.ffn_gate_exps", gate_up, even, experts, inner, hidden)
        yield from expert(f"{to}.ffn_up_exps", gate_up, odd, experts, inner, hidden)
        yield from expert(f"{to}.ffn_down_exps", down, slice(None), experts, hidden, inner)


def describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    """The metadata."""
    config = checkpoint.config
    writer.add_name(checkpoint.directory.name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_count(config.n_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(max(config.layer_windows))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_context)
    writer.add_vocab_size(config.vocab_size)
    if checkpoint.tokenizer_path is None:
        writer.add_tokenizer_model("none")
    else:
        describe_tokenizer(writer, checkpoint.tokenizer_path, config.vocab_size)


def describe_tokenizer(writer: gguf.GGUFWriter, path: Path, vocab_size: int) -> None:
    """A byte-level BPE. Ids that it does not use get a name of their own, and are never written."""
    content = json.loads(path.read_text(encoding="utf-8"))
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    names = [f"<|unused_{index}|>" for index in range(vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * vocab_size
    for name, index in content["model"]["vocab"].items():
        names[index], kinds[index] = name, gguf.TokenType.NORMAL
    for index, name in added.items():
        names[index], kinds[index] = name, gguf.TokenType.CONTROL
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    # How text is cut before it is merged: o200k has a pattern of its own.
    splits = "Split" in json.dumps(content["pre_tokenizer"])
    writer.add_tokenizer_pre("gpt-4o" if splits else "gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    ids = {name: index for index, name in added.items()}
    writer.add_bos_token_id(ids["<|startoftext|>"])
    writer.add_eos_token_id(ids["<|return|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)


def write_gguf(checkpoint_path: str | Path, out: str | Path) -> Path:
    """Writes the checkpoint as one GGUF file, tensor by tensor; at most one is in memory. If
    anything stops it, nothing is left."""
    checkpoint = open_checkpoint(checkpoint_path)
    checkpoint.check()
    partial = Path(f"{out}.partial")
    try:
        write_tensors(partial, checkpoint)
        return partial.rename(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the file: metadata, then every tensor as it is made."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    describe(writer, checkpoint)
    tensors = list(outputs(Source(checkpoint)))
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        nbytes = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_gguf(sys.argv[1], sys.argv[2])
