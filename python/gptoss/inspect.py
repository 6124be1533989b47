"""What a checkpoint is made of, counted from its headers as OpenAI's model card counts.

The rule that gives the card's numbers (116.83B and 20.91B in all, 5.13B and 3.61B active): every
number is a parameter, biases, norms and sinks too, but the scales of MXFP4 blocks are not. Active
are those that one token multiplies with: of the experts the chosen ones, and of the vocabulary's
two tables only the unembedding, for the embedding is looked up.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import _gptoss
from .checkpoint import open_checkpoint
from .config import DTYPE_BYTES

if TYPE_CHECKING:  # imported when first needed
    from rich.console import Console

CACHE_BYTES = 2  # keys and values are bfloat16
PAGE_TOKENS = 128  # of the cache
CODES_PER_BYTE = 2  # of MXFP4 blocks

MLP, ATTENTION, VOCABULARY = "MLP", "Attention", "Embedding and unembedding"
_EXPERTS = re.compile(r".*\.mlp\.(experts\.|mlp[12]_).*")
_PARTS = {
    MLP: re.compile(r".*(\.mlp\.|\.post_attention_layernorm\.).*"),
    ATTENTION: re.compile(r".*(\.self_attn\.|\.attn\.|\.input_layernorm\.).*"),
    VOCABULARY: re.compile(r".*"),  # the rest; the last norm, which is small, is with them
}
_EMBEDDINGS = ("model.embed_tokens.weight", "embedding.weight")


@dataclass(frozen=True)
class Part:
    """Parameters and bytes of one part of the model, or of all of it."""

    name: str
    parameters: int = 0
    active_parameters: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Description:
    """What `gptoss inspect` shows.

    Attributes:
        path: the directory, or "" if there is only a config.
        layout: "huggingface" or "original".
        sizes: the fields of the config that are one number, by name.
        n_window_layers: layers that see only the last `window` tokens.
        window: that number of tokens, 0 if there are no such layers.
        parts: MLP, attention, embedding and unembedding.
        total: their sum.
        cache_bytes_per_token: what each token of context adds: keys and values of the full layers.
        cache_window_bytes: what the window layers hold of a sequence between steps, at most,
            however long it is: the pages of 128 tokens that the next token's window touches.
        unused_tensors: names of tensors in the files that the model has no use for.
        has_tokenizer: whether there is a tokenizer.json.
    """

    path: str
    layout: str
    sizes: dict[str, float]
    n_window_layers: int
    window: int
    parts: tuple[Part, ...]
    total: Part
    cache_bytes_per_token: int
    cache_window_bytes: int
    unused_tensors: tuple[str, ...] = ()
    has_tokenizer: bool = False


def describe(path: str | os.PathLike[str]) -> Description:
    """Counts a checkpoint from its config and headers; no tensor is read.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint` and `Checkpoint.check`.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    found = {name: checkpoint.tensors[name] for name in checkpoint.expected}
    return _describe(
        checkpoint.config,
        checkpoint.layout,
        [(name, info.shape, info.nbytes) for name, info in found.items()],
        path=str(checkpoint.directory),
        unused_tensors=tuple(checkpoint.unused),
        has_tokenizer=checkpoint.tokenizer_path is not None,
    )


def describe_config(config: _gptoss.Config, layout: str = "huggingface") -> Description:
    """Counts the checkpoint that this config would have, with its first choice of dtypes."""
    specs = _gptoss.expected_tensors(config, layout)
    return _describe(
        config,
        layout,
        [(s.name, s.shape, math.prod(s.shape) * DTYPE_BYTES[s.dtypes[0]]) for s in specs],
    )


def _held_tokens(window: int) -> int:
    """Tokens of the pages that the window's last `window` - 1 keys and the next one can lie in."""
    return ((window - 2 + PAGE_TOKENS) // PAGE_TOKENS + 1) * PAGE_TOKENS


def _describe(
    config: _gptoss.Config,
    layout: str,
    tensors: Iterable[tuple[str, Iterable[int], int]],
    path: str = "",
    unused_tensors: tuple[str, ...] = (),
    has_tokenizer: bool = False,
) -> Description:
    """`tensors`: name, shape and bytes of each."""
    parts = {name: Part(name) for name in _PARTS}
    for name, shape, nbytes in tensors:
        home = next(part for part, pattern in _PARTS.items() if pattern.fullmatch(name))
        parts[home] = _add(parts[home], _count(config, name, math.prod(shape), nbytes))
    total = Part("Total")
    for part in parts.values():
        total = _add(total, part)
    token_bytes = 2 * config.n_kv_heads * config.head_dim * CACHE_BYTES
    windows = [window for window in config.layer_windows if window]
    return Description(
        path=path,
        layout=layout,
        sizes=_sizes(config),
        n_window_layers=len(windows),
        window=max(windows, default=0),
        parts=tuple(parts.values()),
        total=total,
        cache_bytes_per_token=token_bytes * (config.n_layers - len(windows)),
        cache_window_bytes=token_bytes * sum(_held_tokens(window) for window in windows),
        unused_tensors=unused_tensors,
        has_tokenizer=has_tokenizer,
    )


def _count(config: _gptoss.Config, name: str, n_elements: int, nbytes: int) -> Part:
    """One tensor as a part."""
    parameters = n_elements
    if name.endswith("blocks"):
        parameters *= CODES_PER_BYTE
    elif name.endswith("scales"):
        parameters = 0
    active = parameters
    if _EXPERTS.fullmatch(name):
        active = parameters * config.experts_per_token // config.n_experts
    elif name in _EMBEDDINGS:
        active = 0
    return Part(name, parameters, active, nbytes)


def _add(part: Part, other: Part) -> Part:
    return Part(
        part.name,
        part.parameters + other.parameters,
        part.active_parameters + other.active_parameters,
        part.nbytes + other.nbytes,
    )


def _sizes(config: _gptoss.Config) -> dict[str, float]:
    names = (
        "n_layers",
        "hidden_size",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "n_experts",
        "experts_per_token",
        "intermediate_size",
        "vocab_size",
        "max_context",
        "rope_theta",
        "rope_factor",
        "rope_original_context",
        "rms_norm_eps",
        "swiglu_limit",
    )
    return {name: getattr(config, name) for name in names}


def render(description: Description, console: Console) -> None:
    """Prints a description as two tables and what the cache takes."""
    from rich.table import Table

    source = description.path or "config"
    console.print(f"{source} ({description.layout} layout)", markup=False, highlight=False)
    shape = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in description.sizes.items():
        shape.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
    shape.add_row("window layers", f"{description.n_window_layers} of {description.window} tokens")
    shape.add_row("tokenizer.json", "yes" if description.has_tokenizer else "no")
    console.print(shape)

    counts = Table("", title="Parameters")
    for heading in ("all", "active", "bytes"):
        counts.add_column(heading, justify="right", no_wrap=True)
    for part in (*description.parts, description.total):
        if part is description.total:
            counts.add_section()
        counts.add_row(
            part.name,
            _format_count(part.parameters),
            _format_count(part.active_parameters),
            _format_bytes(part.nbytes),
        )
    console.print(counts)

    per_token, bound = description.cache_bytes_per_token, description.cache_window_bytes
    longest = int(description.sizes["max_context"])
    console.print(
        f"Cache: {per_token} bytes per token in the full layers, at most {_format_bytes(bound)} "
        f"in the window layers; {_format_bytes(bound + per_token * longest)} at {longest} tokens.",
        highlight=False,
    )
    if description.unused_tensors:
        some = ", ".join(description.unused_tensors[:3])
        n_unused = len(description.unused_tensors)
        console.print(f"Not used: {n_unused} tensors ({some})", markup=False, highlight=False)


def _format_count(count: int) -> str:
    """A number of parameters as the model card writes it: 20.91B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size / 100:
            return f"{count / size:.2f}{unit}"
    return str(count)


def _format_bytes(nbytes: int) -> str:
    """Bytes in the largest binary unit that gives at least 1: 12.8 GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
