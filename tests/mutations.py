"""Known mistakes of other engines, made on purpose in the reference.

Each replaces one function of reference.py by a wrong one. The tests then require that the engine
disagrees with the broken reference: whoever makes the same mistake in the engine makes a test fail.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import reference
import torch
from reference import SWIGLU_ALPHA, Config
from torch import Tensor

SPLIT = 128  # keys to a split of a split-KV attention kernel


def plus_one_lost(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = reference.split_gate_up(gate_up)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * up


def limit_of_zero_clamps_all(gate_up: Tensor, limit: float, *, right=reference.swiglu) -> Tensor:
    return right(gate_up, 0.0)


def limit_of_zero_clamps_nothing(
    gate_up: Tensor, limit: float, *, right=reference.swiglu
) -> Tensor:
    return right(gate_up, torch.inf)


def gate_and_up_as_halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.chunk(2, dim=-1)


def sink_in_the_numerator(scores: Tensor, sink: Tensor) -> Tensor:
    highest = torch.maximum(scores.max(-1, keepdim=True).values, sink)
    e, s = torch.exp(scores - highest), torch.exp(sink - highest)
    return (e + s) * (scores > -torch.inf) / (e.sum(-1, keepdim=True) + s)


def sink_outside_the_maximum(scores: Tensor, sink: Tensor) -> Tensor:
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink))


def sink_once_per_split(scores: Tensor, sink: Tensor) -> Tensor:
    highest = torch.maximum(scores.max(-1, keepdim=True).values, sink)
    e, s = torch.exp(scores - highest), torch.exp(sink - highest)
    parts = scores.split(SPLIT, dim=-1)
    splits = sum((part > -torch.inf).any(-1, keepdim=True).to(e) for part in parts)
    return e / (e.sum(-1, keepdim=True) + splits * s)


def window_one_key_too_long(n: int, window: int, *, right=reference.visible) -> Tensor:
    return right(n, window + 1 if window else 0)


def yarn_truncated(config: Config, *, right=reference.rope_frequencies) -> Tensor:
    return right(replace(config, rope_truncate=True))


def rotation_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def softmax_before_top_k(t: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shares = (t @ weight.to(t.dtype).T + bias.to(t.dtype)).softmax(-1)
    top, ids = shares.topk(k)
    return ids, top


def router_bias_forgotten(
    t: Tensor, weight: Tensor, bias: Tensor, k: int, *, right=reference.route
) -> tuple[Tensor, Tensor]:
    return right(t, weight, torch.zeros_like(bias), k)


def high_nibble_first(blocks: Tensor) -> Tensor:
    return torch.stack((blocks >> 4, blocks & 15), dim=-1).flatten(-2).long()


REPLACES: dict[Callable, str] = {
    plus_one_lost: "swiglu",
    limit_of_zero_clamps_all: "swiglu",
    limit_of_zero_clamps_nothing: "swiglu",
    gate_and_up_as_halves: "split_gate_up",
    sink_in_the_numerator: "softmax_with_sink",
    sink_outside_the_maximum: "softmax_with_sink",
    sink_once_per_split: "softmax_with_sink",
    window_one_key_too_long: "visible",
    yarn_truncated: "rope_frequencies",
    rotation_interleaved: "rope",
    softmax_before_top_k: "route",
    router_bias_forgotten: "route",
    high_nibble_first: "nibbles",
}
MUTATIONS = {function.__name__: function for function in REPLACES}


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Within the block, the reference makes the mistake of that name (a key of MUTATIONS)."""
    function = MUTATIONS[name]
    with patch.object(reference, REPLACES[function], function):
        yield
