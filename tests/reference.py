"""The gpt-oss model in plain torch: one function per operation, to be read as the specification.

Every operation is written once and takes a `Precision`: in what type sums are made, and to what
type the operands of a matrix product are rounded before it. So the same lines are the model in
float64 (`EXACT`), in float32 (`SINGLE`), and a model of the engine's own numerics (`ENGINE`).

Sources: openai/gpt-oss `gpt_oss/torch/model.py`; YaRN, arXiv:2309.00071; OCP Microscaling Formats
(MX) 1.0. Tensors carry their Hugging Face names, shapes and types: matrices bfloat16, expert
weights as raw MXFP4 blocks and scales. `mutations.py` breaks functions of this file on purpose.

Letters in shapes: n tokens, H hidden, A query heads, G key/value heads, D head dimension (64),
E experts, I intermediate, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SWIGLU_ALPHA = 1.702
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign


@dataclass(frozen=True)
class Config:
    """What config.json says, with the names the core uses. Defaults are those of gpt-oss-20b."""

    hidden_size: int = 2880
    n_layers: int = 24
    n_heads: int = 64
    n_kv_heads: int = 8
    head_dim: int = 64
    n_experts: int = 32
    experts_per_token: int = 4
    intermediate_size: int = 2880
    vocab_size: int = 201088
    max_context: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_original_context: int = 4096
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    rope_attention_factor: float = 0.1 * math.log(32.0) + 1.0
    swiglu_limit: float = 7.0
    layer_windows: tuple[int, ...] = (
        128,
        0,
    ) * 12  # for each layer: 0 full attention, else its window


@dataclass(frozen=True)
class Precision:
    """Where numbers are rounded.

    sums: type of the residual stream, norms, softmax, router, and of the sums of matrix products.
    operands: type that activations are rounded to before a matrix product (not the router's), and
        that q, k and v are rounded to after the rotation. Weights are not rounded.
    int8: matrix products take activations and bfloat16 weights (not the router's) as int8 instead,
        64 inputs to a scale; activations of expert weights 32, as MXFP4 has it.
    """

    sums: torch.dtype
    operands: torch.dtype
    int8: bool = False

    def round(self, x: Tensor) -> Tensor:
        """x as an operand of a matrix product, held in the type of the sums."""
        return x.to(self.operands).to(self.sums)

    def activations(self, x: Tensor, weight: Tensor) -> Tensor:
        """The left operand x [n, K] of a product with a weight matrix as `matrix` takes it."""
        block = 64 if weight.dtype == torch.bfloat16 else 32
        return int8_rounded(x, block).to(self.sums) if self.int8 else self.round(x)

    def matrix(self, weight: Tensor) -> Tensor:
        """The matrix [M, K] of a product; expert weights come decoded, hence not as bfloat16."""
        if self.int8 and weight.dtype == torch.bfloat16:
            weight = int8_rounded(weight.float(), 64, scales_in_bfloat16=True)
        return weight.to(self.sums)


EXACT = Precision(sums=torch.float64, operands=torch.float64)
SINGLE = Precision(sums=torch.float32, operands=torch.float32)
ENGINE = Precision(sums=torch.float32, operands=torch.bfloat16)
FAST = Precision(sums=torch.float32, operands=torch.bfloat16, int8=True)


def int8_rounded(x: Tensor, block: int, scales_in_bfloat16: bool = False) -> Tensor:
    """Each `block` numbers of a row (the last may have fewer) as integers from -127 to 127 times a
    scale, their largest magnitude / 127 (as bfloat16: rounded up). Blocks below 2^-50 are zeros.
    float32 [n, K] -> float64 [n, K], what they then stand for."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % block))
    blocks = padded.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    scale, inverse = largest / 127, torch.tensor(127.0) / largest
    if scales_in_bfloat16:
        scale = ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
        inverse = 1 / scale
    codes = torch.where(largest >= 2.0**-50, (blocks * inverse).round(), 0.0)
    return (codes.double() * scale.double()).flatten(-2)[..., : x.shape[-1]]


def embed(tokens: Tensor, table: Tensor, precision: Precision = EXACT) -> Tensor:
    """tokens [n], table [V, H] -> [n, H]."""
    return table[tokens].to(precision.sums)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [n, H], weight [H] -> [n, H]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision = EXACT) -> Tensor:
    """x [n, K], weight [M, K], bias [M] -> [n, M]."""
    y = precision.activations(x, weight) @ precision.matrix(weight).T
    return y if bias is None else y + bias.to(precision.sums)


def rope_frequencies(config: Config) -> Tensor:
    """Radians per position of each of the D/2 rotated pairs, after YaRN. float64 [D/2]."""
    pairs = config.head_dim // 2
    plain = config.rope_theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes so many turns within the original context."""
        turns = config.rope_original_context / (times * 2 * math.pi)
        return pairs * math.log(turns) / math.log(config.rope_theta)

    low, high = pair_that_turns(config.rope_beta_fast), pair_that_turns(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    slow = ((torch.arange(pairs, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain / config.rope_factor * slow + plain * (1 - slow)


def rope_tables(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin, times YaRN's attention factor, of positions int [n]. float64 [n, D/2]."""
    angles = positions.to(torch.float64)[:, None] * rope_frequencies(config)
    factor = config.rope_attention_factor
    return angles.cos() * factor, angles.sin() * factor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (i, i + D/2). x [n, heads, D], cos and sin [n, D/2] -> [n, heads, D]."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def visible(n: int, window: int) -> Tensor:
    """Whether token i (row) sees token j (column): itself and those before it, `window` in all
    if the window is not 0. bool [n, n]."""
    distance = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    return (distance >= 0) & (distance < (window or n))


def softmax_with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """Softmax over the keys and one more logit, the sink, whose own share is then dropped.
    scores [n, keys], sink [] -> [n, keys]."""
    highest = torch.maximum(scores.max(-1, keepdim=True).values, sink)
    e = torch.exp(scores - highest)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink - highest))


def attention(
    qkv: Tensor, sinks: Tensor, window: int, config: Config, precision: Precision = EXACT
) -> Tensor:
    """Rotation and attention of one sequence from its first token.
    qkv [n, (A + 2G) * D] (q heads, then k, then v), sinks [A] -> [n, A * D]."""
    n, group = len(qkv), config.n_heads // config.n_kv_heads
    heads = qkv.to(precision.sums).view(n, -1, config.head_dim)
    q, k, v = heads.split((config.n_heads, config.n_kv_heads, config.n_kv_heads), dim=1)
    cos, sin = rope_tables(torch.arange(n), config)
    q, k, v = (precision.round(x) for x in (rope(q, cos, sin), rope(k, cos, sin), v))
    hidden = ~visible(n, window)
    out = torch.empty_like(q)
    for head in range(config.n_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(config.head_dim)
        scores.masked_fill_(hidden, -torch.inf)
        share = softmax_with_sink(scores, sinks[head].to(precision.sums))
        out[:, head] = share @ v[:, head // group]
    return out.view(n, -1)


def route(t: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k experts of the highest logits (ties: the lower index), and a softmax over those k.
    t [n, H], weight [E, H], bias [E] -> ids int64 [n, k], weights [n, k]."""
    logits = t @ weight.to(t.dtype).T + bias.to(t.dtype)
    top, ids = logits.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k], top[:, :k].softmax(-1)


def nibbles(blocks: Tensor) -> Tensor:
    """Byte j holds element 2j in its low and element 2j + 1 in its high four bits.
    uint8 [..., 16] -> int64 [..., 32]."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()


def mxfp4_decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """E2M1 values times 2^(scale - 127), 32 values to a scale; exact in bfloat16 too.
    blocks uint8 [..., K/32, 16], scales uint8 [..., K/32] -> [..., K]."""
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64)
    values = torch.cat((magnitudes, -magnitudes))[nibbles(blocks)]
    return (values * torch.exp2(scales.double() - 127)[..., None]).flatten(-2).to(dtype)


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Rows interleave: even ones are the gate's, odd ones up's. [n, 2I] -> [n, I] each."""
    return gate_up[..., 0::2], gate_up[..., 1::2]


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), both clamped. [n, 2I] -> [n, I]."""
    gate, up = split_gate_up(gate_up)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def moe(
    t: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: dict[str, Tensor],
    limit: float,
    precision: Precision = EXACT,
) -> Tensor:
    """Sum of the chosen experts' outputs, weighted by the router.
    t [n, H], ids and weights [n, k] -> [n, H].
    experts: tensors {gate_up,down}_proj_{blocks,scales,bias} of all experts."""
    out = torch.zeros(t.shape, dtype=precision.sums)
    for expert in ids.unique().tolist():
        gate_up_weight, down_weight = (
            mxfp4_decode(experts[f"{name}_blocks"][expert], experts[f"{name}_scales"][expert])
            for name in ("gate_up_proj", "down_proj")
        )
        token, slot = torch.where(ids == expert)
        y = linear(t[token], gate_up_weight, experts["gate_up_proj_bias"][expert], precision)
        y = swiglu(y, limit)
        y = linear(y, down_weight, experts["down_proj_bias"][expert], precision)
        out[token] += weights[token, slot, None].to(precision.sums) * y
    return out


def forward(
    tokens: Tensor, tensors: dict[str, Tensor], config: Config, precision: Precision = EXACT
) -> Tensor:
    """Logits after every token of one sequence. tokens int64 [n] -> [n, V] in `precision.sums`."""

    def normed(x: Tensor, name: str) -> Tensor:
        return rmsnorm(x, tensors[f"{name}.weight"], config.rms_norm_eps)

    def projected(x: Tensor, name: str) -> Tensor:
        return linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], precision)

    x = embed(tokens, tensors["model.embed_tokens.weight"], precision)
    for layer, window in enumerate(config.layer_windows):
        name = f"model.layers.{layer}"
        t = normed(x, f"{name}.input_layernorm")
        qkv = torch.cat([projected(t, f"{name}.self_attn.{p}_proj") for p in "qkv"], dim=-1)
        a = attention(qkv, tensors[f"{name}.self_attn.sinks"], window, config, precision)
        x = x + projected(a, f"{name}.self_attn.o_proj")

        t = normed(x, f"{name}.post_attention_layernorm")
        router = (tensors[f"{name}.mlp.router.{part}"] for part in ("weight", "bias"))
        ids, weights = route(t, *router, config.experts_per_token)
        prefix = f"{name}.mlp.experts."
        experts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        x = x + moe(t, ids, weights, experts, config.swiglu_limit, precision)
    return linear(normed(x, "model.norm"), tensors["lm_head.weight"], None, precision)
