"""Small random gpt-oss models for the tests, and the three things that run them: the engine's core,
transformers, and (in reference.py) plain torch. Also writes them as checkpoint directories.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from reference import Config, mxfp4_decode
from safetensors.torch import save_file
from torch import Tensor

MXFP4_RMS = math.sqrt(68.5 / 8)  # of the E2M1 values, each as likely as any other

# Where make_core and make_ops run. "cuda": on a card, or in the emulator if that is what was built.
DEVICE = os.environ.get("GPTOSS_TEST_DEVICE", "cpu")


def windows(n_layers: int, window: int = 128) -> tuple[int, ...]:
    """Even layers see `window` tokens, odd ones all."""
    return tuple(0 if layer % 2 else window for layer in range(n_layers))


def small(n_layers: int, **fields: object) -> Config:
    """A config of `n_layers` layers that is small in all that `fields` does not say."""
    defaults: dict = dict(
        hidden_size=96,
        n_heads=4,
        n_kv_heads=2,
        n_experts=8,
        intermediate_size=64,
        vocab_size=211,
        max_context=8192,
        layer_windows=windows(n_layers),
    )
    return replace(Config(), n_layers=n_layers, **(defaults | fields))


# No two alike in hidden size, experts, or how many query heads share a key/value head.
CONFIGS = {
    "one_layer": small(1),
    "three_layers": small(3, hidden_size=160, n_heads=8, n_kv_heads=1, intermediate_size=96),
    "32_experts": small(
        4, hidden_size=352, n_heads=6, n_kv_heads=6, n_experts=32, intermediate_size=160
    ),
    "128_experts": small(2, hidden_size=64, n_heads=8, n_kv_heads=4, n_experts=128),
    "twelve_layers": small(
        12, hidden_size=224, n_heads=3, n_kv_heads=1, intermediate_size=32, experts_per_token=2
    ),
}


def mutation_config(mistake: str) -> Config:
    """The model to show a mistake of mutations.py in. One layer, so that a difference from the
    reference is not lost in what later layers make of rounding; without a window if that is not
    what is wrong, since YaRN shows over distance."""
    window = 128 if "window" in mistake else 0
    return small(1, hidden_size=160, n_experts=32, layer_windows=(window,))


def random_tokens(n: int, config: Config, seed: int = 0) -> Tensor:
    """int64 [n]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (n,), generator=generator)


def random_mxfp4(
    shape: tuple[int, ...], rms: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Blocks uint8 [..., K/32, 16] and scales uint8 [..., K/32] of a matrix [..., K] of about that
    root mean square, its scales differing."""
    *rows, k = shape
    blocks = torch.randint(256, (*rows, k // 32, 16), generator=generator, dtype=torch.uint8)
    middle = 127 + round(math.log2(rms / MXFP4_RMS))
    scales = torch.randint(
        middle - 1, middle + 2, (*rows, k // 32), generator=generator, dtype=torch.uint8
    )
    return blocks, scales


def untrained_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """As transformers initialises a model: all of standard deviation 0.02, with embeddings of 1, so
    that each layer adds a little to a larger residual, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)

    def initial(name: str, tensor: Tensor) -> Tensor:
        if name.endswith("_blocks"):
            return tensor
        if name.endswith("_scales"):
            return torch.full_like(tensor, 127 + round(math.log2(0.02 / MXFP4_RMS)))
        if name.endswith("norm.weight"):
            return torch.ones_like(tensor)
        std = 1.0 if "embed_tokens" in name else 0.02
        return (std * torch.randn(tensor.shape, generator=generator)).bfloat16()

    return {name: initial(name, tensor) for name, tensor in random_tensors(config, seed).items()}


def random_tensors(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with Hugging Face names, types and shapes, whose every part matters: attention
    is neither flat nor a single key, sinks and router biases weigh in, and many gates and ups go
    beyond the clamp."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.n_experts
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).bfloat16()

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return normal(rows, columns, std=gain / math.sqrt(columns))

    tensors = {"model.embed_tokens.weight": normal(config.vocab_size, hidden, std=2.0)}
    for layer in range(config.n_layers):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = normal(hidden, std=0.2, mean=1.0)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            tensors[f"{name}.self_attn.{part}_proj.weight"] = matrix(rows, hidden)
            tensors[f"{name}.self_attn.{part}_proj.bias"] = normal(rows, std=0.3)
        tensors[f"{name}.self_attn.o_proj.weight"] = matrix(hidden, q_rows, gain=2.0)
        tensors[f"{name}.self_attn.o_proj.bias"] = normal(hidden, std=0.3)
        tensors[f"{name}.self_attn.sinks"] = normal(config.n_heads, std=1.5, mean=4.0)
        tensors[f"{name}.mlp.router.weight"] = matrix(experts, hidden)
        tensors[f"{name}.mlp.router.bias"] = normal(experts, std=1.0)
        mlp = f"{name}.mlp.experts"
        for part, rows, columns, rms in (
            ("gate_up_proj", 2 * inner, hidden, 4.0 / math.sqrt(hidden)),
            ("down_proj", hidden, inner, 0.1 / math.sqrt(inner)),
        ):
            blocks, scales = random_mxfp4((experts, rows, columns), rms, generator)
            tensors[f"{mlp}.{part}_blocks"], tensors[f"{mlp}.{part}_scales"] = blocks, scales
            tensors[f"{mlp}.{part}_bias"] = normal(experts, rows, std=0.3)
    tensors["model.norm.weight"] = normal(hidden, std=0.2, mean=1.0)
    tensors["lm_head.weight"] = matrix(config.vocab_size, hidden, gain=2.0)
    return tensors


def hf_config(config: Config) -> dict:
    """The fields of a Hugging Face config.json, as gpt-oss-20b spells them."""
    return dict(
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        num_local_experts=config.n_experts,
        num_experts_per_tok=config.experts_per_token,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.rms_norm_eps,
        swiglu_limit=config.swiglu_limit,
        sliding_window=max(config.layer_windows) or 128,
        layer_types=[
            "sliding_attention" if window else "full_attention" for window in config.layer_windows
        ],
        rope_theta=config.rope_theta,
        rope_scaling=dict(
            rope_type="yarn",
            factor=config.rope_factor,
            original_max_position_embeddings=config.rope_original_context,
            beta_fast=config.rope_beta_fast,
            beta_slow=config.rope_beta_slow,
            truncate=config.rope_truncate,
        ),
        attention_bias=True,
        tie_word_embeddings=False,
        hidden_act="silu",
        eos_token_id=config.vocab_size - 1,
    )


def write_checkpoint(path: Path, config: Config, tensors: dict[str, Tensor]) -> Path:
    """Writes config.json and model.safetensors of the Hugging Face layout into directory `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(hf_config(config)))
    save_file(tensors, path / "model.safetensors")
    return path


def transformers_model(config: Config, tensors: dict[str, Tensor], dtype: torch.dtype):
    """transformers' own model of that checkpoint, MXFP4 decoded, with eager attention."""
    from transformers import GptOssConfig, GptOssForCausalLM, logging

    logging.set_verbosity_error()  # it finds YaRN's factor 32 unlike a context this short
    fields = hf_config(config)
    rope = fields.pop("rope_scaling") | {"rope_theta": fields.pop("rope_theta")}
    model = GptOssForCausalLM._from_config(
        GptOssConfig(**fields, rope_parameters=rope),
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scales = tensors[name.removesuffix("blocks") + "scales"]
            matrix = mxfp4_decode(tensor, scales).to(dtype).transpose(1, 2)
            state[name.removesuffix("_blocks")] = matrix
        elif not name.endswith("_scales"):
            state[name] = tensor.to(dtype)
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def transformers_logits(model, tokens: Tensor) -> Tensor:
    """Logits [n, V] of one sequence [n], in the model's own type."""
    return model(input_ids=tokens[None], use_cache=False).logits[0]


def make_core(config: Config, tensors: dict[str, Tensor], threads: int = 1, **options: object):
    """The engine's core on DEVICE with these weights; `options` are Core's own. Most tests compare
    bits, so it is invariant, which is something of its own on Hopper only."""
    from gptoss import _gptoss

    # A small cache: an emulated card is touched.
    defaults = {"device": DEVICE, "max_sequences": 8, "invariant": True}
    core = _gptoss.Core(
        _gptoss.Config(**core_fields(config)), threads=threads, **(defaults | options)
    )
    for name, tensor in tensors.items():
        core.load_tensor(name, tensor)
    core.finish_loading()
    return core


def make_ops(isa: str, threads: int = 1, precision: str = "exact"):
    """The engine's operations: on the CPU with this instruction set and threads, or on DEVICE."""
    from gptoss import _gptoss

    return _gptoss.Ops("cpu", isa, threads, precision) if DEVICE == "cpu" else _gptoss.Ops(DEVICE)


def core_fields(config: Config) -> dict:
    """The keyword arguments of `_gptoss.Config`."""
    return asdict(config) | {"layer_windows": list(config.layer_windows)}


def feed(core, batch: Sequence[tuple[object, Tensor]]) -> list[Tensor]:
    """One step: appends tokens to sequences, and gives all logits of each, float32 [n_i, V]."""
    counts = [len(tokens) for _, tokens in batch]
    logits = torch.full((sum(counts), core.config.vocab_size), torch.nan)
    core.step([(sequence, tokens.tolist(), 2, None) for sequence, tokens in batch], logits)
    return list(logits.split(counts))


def core_logits(core, tokens: Tensor, chunk: int = 0) -> Tensor:
    """Logits [n, V] of one new sequence, fed `chunk` tokens at a time (0: as many as fit)."""

    sequence = core.new_sequence()
    parts = [
        feed(core, [(sequence, part)])[0] for part in tokens.split(chunk or core.max_batch_tokens)
    ]
    sequence.close()
    return torch.cat(parts)
