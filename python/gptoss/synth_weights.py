"""Random weights for `synth`: what each tensor's values are drawn from, and their bytes in chunks.

A tensor is made of components (`attn.qkv.weight` of q, k and v), each of which is a sequence of
chunks with random streams of their own, keyed by seed, component and number. So both layouts of one
seed hold the same weights, and several threads may make chunks in any order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from zlib import crc32

import numpy as np

from . import _gptoss

CHUNK_BYTES = 16 << 20  # changing it changes every checkpoint's bytes
E2M1_MEAN_SQUARE = (0.5**2 + 1 + 1.5**2 + 2**2 + 3**2 + 4**2 + 6**2) / 8
LAYER_NAME = re.compile(r"(?:model\.layers|block)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Normal:
    """bfloat16 with this mean and std `gain`, or std `gain / sqrt(size)` if a size is named."""

    gain: float
    fan_in: str = ""
    mean: float = 0.0


@dataclass(frozen=True)
class Codes:
    """Blocks of MXFP4: every byte, and so every pair of codes, is equally likely."""


@dataclass(frozen=True)
class Scales:
    """Scales of MXFP4 over five octaves, such that the values have std `gain / sqrt(size)`."""

    gain: float
    fan_in: str


Distribution = Normal | Codes | Scales

# Chosen so that activations stay near 1, some values pass the SwiGLU's limit of 7, and sinks,
# biases and norm weights all matter to the logits.
DISTRIBUTIONS: dict[str, Distribution] = {
    "embedding": Normal(1.0),
    "attention.norm": Normal(0.2, mean=1.0),
    "q.weight": Normal(1.2, "hidden"),
    "q.bias": Normal(0.5),
    "k.weight": Normal(1.0, "hidden"),
    "k.bias": Normal(0.5),
    "v.weight": Normal(1.0, "hidden"),
    "v.bias": Normal(0.5),
    "sinks": Normal(2.0, mean=2.0),
    "o.weight": Normal(1.0, "attention"),
    "o.bias": Normal(0.2),
    "mlp.norm": Normal(0.2, mean=1.0),
    "router.weight": Normal(2.0, "hidden"),
    "router.bias": Normal(0.5),
    "gate_up.blocks": Codes(),
    "gate_up.scales": Scales(2.5, "hidden"),
    "gate_up.bias": Normal(0.5),
    "down.blocks": Codes(),
    "down.scales": Scales(0.2, "intermediate"),
    "down.bias": Normal(0.1),
    "norm": Normal(0.2, mean=1.0),
    "unembedding": Normal(2.5, "hidden"),
}

# Tensor names in both layouts, without the layer's prefix -> components, top rows first.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("embedding",),
    "input_layernorm.weight": ("attention.norm",),
    "self_attn.q_proj.weight": ("q.weight",),
    "self_attn.q_proj.bias": ("q.bias",),
    "self_attn.k_proj.weight": ("k.weight",),
    "self_attn.k_proj.bias": ("k.bias",),
    "self_attn.v_proj.weight": ("v.weight",),
    "self_attn.v_proj.bias": ("v.bias",),
    "self_attn.sinks": ("sinks",),
    "self_attn.o_proj.weight": ("o.weight",),
    "self_attn.o_proj.bias": ("o.bias",),
    "post_attention_layernorm.weight": ("mlp.norm",),
    "mlp.router.weight": ("router.weight",),
    "mlp.router.bias": ("router.bias",),
    "mlp.experts.gate_up_proj_blocks": ("gate_up.blocks",),
    "mlp.experts.gate_up_proj_scales": ("gate_up.scales",),
    "mlp.experts.gate_up_proj_bias": ("gate_up.bias",),
    "mlp.experts.down_proj_blocks": ("down.blocks",),
    "mlp.experts.down_proj_scales": ("down.scales",),
    "mlp.experts.down_proj_bias": ("down.bias",),
    "model.norm.weight": ("norm",),
    "lm_head.weight": ("unembedding",),
    "embedding.weight": ("embedding",),
    "attn.norm.scale": ("attention.norm",),
    "attn.qkv.weight": ("q.weight", "k.weight", "v.weight"),
    "attn.qkv.bias": ("q.bias", "k.bias", "v.bias"),
    "attn.sinks": ("sinks",),
    "attn.out.weight": ("o.weight",),
    "attn.out.bias": ("o.bias",),
    "mlp.norm.scale": ("mlp.norm",),
    "mlp.gate.weight": ("router.weight",),
    "mlp.gate.bias": ("router.bias",),
    "mlp.mlp1_weight.blocks": ("gate_up.blocks",),
    "mlp.mlp1_weight.scales": ("gate_up.scales",),
    "mlp.mlp1_bias": ("gate_up.bias",),
    "mlp.mlp2_weight.blocks": ("down.blocks",),
    "mlp.mlp2_weight.scales": ("down.scales",),
    "mlp.mlp2_bias": ("down.bias",),
    "norm.scale": ("norm",),
    "unembedding.weight": ("unembedding",),
}


@dataclass(frozen=True)
class Chunk:
    """Up to `CHUNK_BYTES` of a tensor, with a random stream of its own.

    Attributes:
        key: seed, component and number of the chunk within the component.
        nbytes: its size.
        table: what random indices stand for, uint16 [65536] or uint8 [256]; None: the indices.
    """

    key: tuple[int, int, int]
    nbytes: int
    table: np.ndarray | None

    def make(self) -> np.ndarray:
        """The values, [nbytes / itemsize], little-endian. Releases the GIL for most of its time."""
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(self.key)))
        words = generator.integers(
            0, 2**64 - 1, size=-(-self.nbytes // 8), dtype=np.uint64, endpoint=True
        )
        indices = words.astype("<u8", copy=False).view(np.uint8)[: self.nbytes]
        return indices if self.table is None else self.table[indices.view(self.table.dtype)]


def tensor_chunks(
    name: str, shape: list[int], itemsize: int, config: _gptoss.Config, seed: int
) -> Iterator[Chunk]:
    """The chunks of one tensor in the order of its bytes.

    Args:
        name: its name in either layout.
        shape: its sizes; the components of a joint tensor divide the first.
        itemsize: bytes of one element.
        config: the model's shape.
        seed: an integer from 0.
    """
    match = LAYER_NAME.fullmatch(name)
    layer, suffix = (match[1] + ".", match[2]) if match else ("", name)
    components = COMPONENTS[suffix]
    joint = {
        "q": config.n_heads * config.head_dim,
        "k": config.n_kv_heads * config.head_dim,
        "v": config.n_kv_heads * config.head_dim,
    }
    for component in components:
        rows = joint[component[0]] if len(components) > 1 else shape[0]
        left = rows * math.prod(shape[1:]) * itemsize
        table = _table(component, config)
        number = 0
        while left:
            nbytes = min(left, CHUNK_BYTES)
            yield Chunk((seed, crc32((layer + component).encode()), number), nbytes, table)
            left -= nbytes
            number += 1


def _table(component: str, config: _gptoss.Config) -> np.ndarray | None:
    """The values that random indices stand for; see `Chunk.table`."""
    sizes = {
        "": 1,
        "hidden": config.hidden_size,
        "attention": config.n_heads * config.head_dim,
        "intermediate": config.intermediate_size,
    }
    distribution = DISTRIBUTIONS[component]
    if isinstance(distribution, Codes):
        return None
    std = distribution.gain / math.sqrt(sizes[distribution.fan_in])
    if isinstance(distribution, Scales):
        return _scale_table(std)
    return _normal_table(distribution.mean, std)


@cache
def _normal_quantiles() -> np.ndarray:
    """The standard normal distribution as 65536 equally likely values; float64, ascending."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((index + 0.5) / 65536) for index in range(65536)])


@cache
def _normal_table(mean: float, std: float) -> np.ndarray:
    """Normal values as bfloat16 bits, rounded to nearest even; uint16 [65536]."""
    bits = (mean + std * _normal_quantiles()).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


@cache
def _scale_table(std: float) -> np.ndarray:
    """Scale bytes (2 to the power byte - 127) that give random codes this std; uint8 [256].

    Around the right power of two, scales spread over four octaves in the proportions 1 3 3 1; which
    share of them is an octave higher makes up for what lies between two powers of two.
    """
    octaves = np.array([-2, -1, -1, -1, 0, 0, 0, 1])
    mean_square = std**2 / E2M1_MEAN_SQUARE / np.mean(4.0**octaves)
    exponent = math.floor(math.log(mean_square, 4))
    higher = round((mean_square / 4.0**exponent - 1) / 3 * 32)
    index = np.arange(256)
    exponents = exponent + octaves[index % 8] + (index // 8 < higher)
    return np.clip(127 + exponents, 0, 254).astype(np.uint8)
