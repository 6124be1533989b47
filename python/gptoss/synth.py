"""Writes random gpt-oss checkpoints in the true format: for tests, benchmarks and demonstrations.

The weights mean nothing but behave as a model's do (see `synth_weights`). The same seed gives the
same bytes. Memory stays small at any size: tensors are made and written in chunks.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _gptoss
from .config import DTYPE_BYTES, HEAD_DIM, parse_config
from .progress import Progress, byte_progress

if TYPE_CHECKING:
    import numpy as np

WORKERS = 2
QUEUED_CHUNKS = 8  # made ahead of the disk
DEFAULT_SHARD_BYTES = 4_800_000_000  # as OpenAI's repositories are cut
SPARE_DISK_BYTES = 64 << 20
LARGEST_TOKENIZER = 1 << 14  # above this, nearly all tokens would be reserved ones
OPENAI_SPECIAL_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|call|>": 200012,
}
_OWN_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json"
    r"|model[\w.-]*\.safetensors(\.index\.json)?"
)


@dataclass(frozen=True)
class Shape:
    """What can be chosen about a synthetic checkpoint; the rest is as in every gpt-oss."""

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    n_experts: int
    experts_per_token: int
    intermediate_size: int
    vocab_size: int
    sliding_window: int = 128
    swiglu_limit: float = 7.0
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_original_context: int = 4096


PRESETS = {
    "tiny": Shape(4, 128, 8, 2, 8, 4, 96, 512),
    "20b": Shape(24, 2880, 64, 8, 32, 4, 2880, 201088),
    "120b": Shape(36, 2880, 64, 8, 128, 4, 2880, 201088),
}


@dataclass(frozen=True)
class _TokenizerFile:
    """What a checkpoint's tokenizer.json holds (None: there is none), and its special tokens."""

    text: str | None
    special: dict[str, int]
    smallest_vocabulary: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: list[int]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def synthesize(
    out: str | os.PathLike[str],
    preset: str = "tiny",
    layout: str = "huggingface",
    *,
    seed: int = 0,
    shards: int | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress = True,
    **shape: Any,
) -> Path:
    """Writes a random checkpoint.

    It is written under a temporary name beside `out` and renamed when whole; if anything stops it,
    nothing is left.

    Args:
        out: the directory to make; it may exist if it is empty.
        preset: "tiny", "20b" (12.8 GiB) or "120b" (60.8 GiB).
        layout: "huggingface" or "original".
        seed: the same seed gives the same bytes.
        shards: how many weight files; default: as few as `max_shard_bytes` allows.
        max_shard_bytes: where to cut files, default 4.8 GB; a larger tensor has a file of its own.
        overwrite: replace a checkpoint at `out`; a directory with anything else in it is refused.
        tokenizer: a tokenizer.json to copy, in place of the preset's; unless `vocab_size` is given,
            the vocabulary is as large as its largest token id asks.
        progress: True for a bar on stderr, False for none, or a function of (bytes done, all).
        **shape: fields of `Shape` that replace the preset's, such as n_layers or vocab_size.

    Returns:
        The absolute path of `out`.

    Raises:
        ValueError: an argument or the shape makes no sense; names the argument or config field.
        FileNotFoundError: there is no file `tokenizer`.
        FileExistsError: `out` is there and is not to be, or may not be, overwritten.
        OSError: the disk has too little room (ENOSPC), or writing failed.
    """
    out = Path(os.path.abspath(out))
    if layout not in ("huggingface", "original"):
        raise ValueError(f'layout is {layout!r}, expected "huggingface" or "original"')
    _check_count("seed", seed, 0)
    given = None
    if tokenizer is not None:
        given = _read_tokenizer(Path(tokenizer))
        shape.setdefault("vocab_size", given.smallest_vocabulary)
    values = _original_json(_choose_shape(preset, shape))
    config = parse_config(values, out / "config.json")
    chosen = given or _choose_tokenizer(preset, config.vocab_size)
    if config.vocab_size < chosen.smallest_vocabulary:
        raise ValueError(
            f"vocab_size is {config.vocab_size}, expected at least {chosen.smallest_vocabulary}: "
            f"{tokenizer} has so many token ids"
        )
    if layout == "huggingface":
        values = _hugging_face_json(config, chosen.special)
    tensors = [
        Tensor(spec.name, "U8" if "U8" in spec.dtypes else "BF16", list(spec.shape))
        for spec in _gptoss.expected_tensors(config, layout)
    ]
    files = _plan_files(tensors, layout, shards, max_shard_bytes)
    _check_destination(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(out, _total_bytes(files))

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_json(partial / "config.json", values)
        _write_tokenizer(partial, chosen)
        _write_weights(partial, files, config, seed, progress)
        _put_in_place(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _check_count(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an integer from {low}")


def _choose_shape(preset: str, overrides: dict[str, Any]) -> Shape:
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    known = [field.name for field in fields(Shape)]
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name} is no field of the shape, expected one of {', '.join(known)}")
    return replace(PRESETS[preset], **overrides)


def _choose_tokenizer(preset: str, vocab_size: int) -> _TokenizerFile:
    """A small one for tiny; for others none, with the ids that special tokens would have."""
    from .synth_tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, build_tokenizer

    if preset == "tiny" and SMALLEST_VOCABULARY <= vocab_size <= LARGEST_TOKENIZER:
        first = vocab_size - len(SPECIAL_TOKENS)
        ids = {token: first + index for index, token in enumerate(SPECIAL_TOKENS)}
        return _TokenizerFile(build_tokenizer(vocab_size), ids)
    fits = vocab_size > max(OPENAI_SPECIAL_IDS.values())
    return _TokenizerFile(None, OPENAI_SPECIAL_IDS if fits else {})


def _read_tokenizer(path: Path) -> _TokenizerFile:
    """A tokenizer.json that the caller names."""
    from .synth_tokenizer import SPECIAL_TOKENS
    from .tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    ids = {token: tokenizer.token_id(token) for token in SPECIAL_TOKENS}
    special = {token: id for token, id in ids.items() if id is not None}
    return _TokenizerFile(path.read_text(encoding="utf-8"), special, tokenizer.max_id + 1)


def _original_json(shape: Shape) -> dict[str, Any]:
    """config.json as OpenAI's reference reads it."""
    return {
        "num_hidden_layers": shape.n_layers,
        "num_experts": shape.n_experts,
        "experts_per_token": shape.experts_per_token,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "swiglu_limit": shape.swiglu_limit,
        "head_dim": HEAD_DIM,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "sliding_window": shape.sliding_window,
        "initial_context_length": shape.rope_original_context,
        "rope_theta": shape.rope_theta,
        "rope_scaling_factor": shape.rope_factor,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }


def _hugging_face_json(config: _gptoss.Config, special: dict[str, int]) -> dict[str, Any]:
    """config.json as transformers reads it, with the fields of OpenAI's repositories."""
    kinds = {True: "sliding_attention", False: "full_attention"}
    not_converted = ["self_attn", "mlp.router"]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": special.get("<|startoftext|>"),
        "eos_token_id": special.get("<|return|>"),
        "experts_per_token": config.experts_per_token,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.rope_original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [kinds[window > 0] for window in config.layer_windows],
        "max_position_embeddings": config.max_context,
        "model_type": "gpt_oss",
        "num_attention_heads": config.n_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "num_local_experts": config.n_experts,
        "output_router_logits": False,
        "pad_token_id": special.get("<|endoftext|>"),
        "quantization_config": {
            "modules_to_not_convert": [
                *[f"model.layers.*.{module}" for module in not_converted],
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": max(config.layer_windows),
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _plan_files(
    tensors: list[Tensor], layout: str, shards: int | None, max_shard_bytes: int | None
) -> dict[str, list[Tensor]]:
    """File names and their tensors, which keep their order."""
    if shards is not None and max_shard_bytes is not None:
        raise ValueError("shards and max_shard_bytes are both given, expected one of them")
    if shards is not None:
        _check_count("shards", shards, 1)
        if shards > len(tensors):
            raise ValueError(f"shards is {shards}, expected at most {len(tensors)}, one per tensor")
        parts = _cut_evenly(tensors, shards)
    else:
        limit = DEFAULT_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes
        _check_count("max_shard_bytes", limit, 1)
        parts = _cut_by_size(tensors, limit)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    dash = "--" if layout == "original" else "-"
    return {
        f"model{dash}{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, start=1)
    }


def _total_bytes(files: dict[str, list[Tensor]]) -> int:
    return sum(tensor.nbytes for content in files.values() for tensor in content)


def _cut_by_size(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = []
    size = limit
    for tensor in tensors:
        if not parts or size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def _cut_evenly(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """Exactly `count` parts, none of them empty, of about the same size."""
    parts: list[list[Tensor]] = []
    rest = list(tensors)
    for left in range(count, 0, -1):
        target = sum(tensor.nbytes for tensor in rest) / left
        part = [rest.pop(0)]
        while len(rest) >= left and (
            left == 1 or sum(tensor.nbytes for tensor in [*part, rest[0]]) <= target
        ):
            part.append(rest.pop(0))
        parts.append(part)
    return parts


def _check_destination(out: Path, overwrite: bool) -> None:
    """Refuses to touch anything but an empty directory or, if asked to, a checkpoint."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(errno.EEXIST, "exists and is no directory", str(out))
    content = list(out.iterdir())
    if content and not overwrite:
        raise FileExistsError(errno.EEXIST, "exists and is not empty", str(out))
    for entry in content:
        if entry.is_dir() or not _OWN_FILES.fullmatch(entry.name):
            raise FileExistsError(
                errno.EEXIST,
                f"not overwritten: holds {entry.name}, no part of a checkpoint",
                str(out),
            )


def _check_room(out: Path, total: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < total + SPARE_DISK_BYTES:
        raise OSError(
            errno.ENOSPC, f"the checkpoint takes {total} bytes, {free} are free", str(out)
        )


def _put_in_place(partial: Path, out: Path) -> None:
    """Renames the finished directory; what was at `out` goes only after that has worked."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(directory: Path, tokenizer: _TokenizerFile) -> None:
    """generation_config.json, and tokenizer.json where there is one."""
    special = tokenizer.special
    stops = [special[t] for t in ("<|return|>", "<|endoftext|>", "<|call|>") if t in special]
    generation = {
        "bos_token_id": special.get("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": stops or None,
        "pad_token_id": special.get("<|endoftext|>"),
    }
    _write_json(directory / "generation_config.json", generation)
    if tokenizer.text is None:
        return
    (directory / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(directory / "tokenizer_config.json", names)


def _write_weights(
    directory: Path,
    files: dict[str, list[Tensor]],
    config: _gptoss.Config,
    seed: int,
    progress: Progress,
) -> None:
    """The files of `_plan_files`, with an index where there are several."""
    with byte_progress("Writing", _total_bytes(files), progress) as advance:
        for file, content in files.items():
            _write_safetensors(directory / file, content, config, seed, advance)
    if len(files) > 1:
        _write_index(directory / "model.safetensors.index.json", files)


def _write_index(path: Path, files: dict[str, list[Tensor]]) -> None:
    weight_map = {tensor.name: file for file, content in files.items() for tensor in content}
    _write_json(path, {"metadata": {"total_size": _total_bytes(files)}, "weight_map": weight_map})


def _write_safetensors(
    path: Path,
    tensors: list[Tensor],
    config: _gptoss.Config,
    seed: int,
    advance: Callable[[int], object],
) -> None:
    """Writes one weight file, chunk by chunk (https://huggingface.co/docs/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for data in _make_chunks(tensors, config, seed):
            stream.write(data.data)
            advance(data.nbytes)


def _make_chunks(tensors: list[Tensor], config: _gptoss.Config, seed: int) -> Iterator[np.ndarray]:
    """The bytes of these tensors in order, made a few chunks ahead of whoever takes them."""
    from .synth_weights import tensor_chunks

    with ThreadPoolExecutor(WORKERS) as pool:
        queued: deque[Future[np.ndarray]] = deque()
        for tensor in tensors:
            itemsize = DTYPE_BYTES[tensor.dtype]
            for chunk in tensor_chunks(tensor.name, tensor.shape, itemsize, config, seed):
                queued.append(pool.submit(chunk.make))
                if len(queued) > QUEUED_CHUNKS:
                    yield queued.popleft().result()
        while queued:
            yield queued.popleft().result()
