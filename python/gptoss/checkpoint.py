"""Opens gpt-oss checkpoints and streams their tensors into the core.

A checkpoint is a directory with a config.json and safetensors files, in one of two layouts that
the tensor names tell apart: "huggingface" (`model.layers.0...`) and "original" (`block.0...`, as in
the `original/` of OpenAI's repositories). Opening reads JSON and safetensors headers only.
`Checkpoint.check` compares all headers with what the core expects, so that a checkpoint that cannot
work is refused before any large memory is taken.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open

from . import _gptoss
from .config import Fields, parse_config, read_json_object
from .progress import Progress, byte_progress

BATCH_BYTES = 256 << 20  # mapped file pages count as resident: unmap after this many
LARGE_BYTES = 512 << 20  # tensors from here on are loaded first, while little else is resident
END_TOKEN = 200007  # <|end|> ends a message, never a turn: no checkpoint may make it a stop token
DEFAULT_EOS = (200002, 199999, 200012)  # <|return|>, <|endoftext|>, <|call|>
_LAYER_PREFIXES = {"huggingface": "model.layers.", "original": "block."}
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REPOSITORY_FILES = ["config.json", "generation_config.json", "tokenizer*", "model*.safetensors*"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what its header says.

    Attributes:
        file: the safetensors file.
        dtype: as safetensors spells it: "BF16", "F32", "U8" and others.
        shape: sizes, outermost first.
        offset: position of its first byte in the file.
        nbytes: its size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; its tensors are still on disk.

    Attributes:
        directory: where config.json is.
        weights: the index, or the single weight file, for messages.
        config: the shape of the model.
        layout: "huggingface" or "original".
        tensors: every tensor of the checkpoint by name.
        tokenizer_path: its tokenizer.json, if it has one.
        eos_token_ids: tokens that end a generation; never <|end|>.
        generation: the fields of generation_config.json, as they are; empty without one.
    """

    directory: Path
    weights: Path
    config: _gptoss.Config
    layout: str
    tensors: dict[str, TensorInfo]
    tokenizer_path: Path | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def expected(self) -> dict[str, _gptoss.TensorSpec]:
        """What a checkpoint of this config and layout must hold, by name."""
        return {spec.name: spec for spec in _gptoss.expected_tensors(self.config, self.layout)}

    @property
    def unused(self) -> list[str]:
        """Names of tensors that the model has no use for."""
        return sorted(self.tensors.keys() - self.expected.keys())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the model uses."""
        return sum(info.nbytes for name, info in self.tensors.items() if name in self.expected)

    def check(self) -> None:
        """Compares all headers with what the core expects.

        Tensors that it does not know are no error: see `unused`.

        Raises:
            ValueError: a tensor is missing or has another rank, shape or dtype, or blocks and
                scales disagree; names file and tensor.
        """
        missing = [name for name in self.expected if name not in self.tensors]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            shape = list(self.expected[missing[0]].shape)
            raise ValueError(f"{self.weights}: tensor {missing[0]} {shape}{more} missing")
        for name in self.expected:
            self._check_scales(name)
        for name, spec in self.expected.items():
            _check_tensor(name, self.tensors[name], spec)

    def _check_scales(self, blocks_name: str) -> None:
        """Blocks [..., 16] must come with scales [...]: one scale for each block of 16 bytes."""
        if not blocks_name.endswith("blocks"):
            return
        scales_name = blocks_name.removesuffix("blocks") + "scales"
        blocks, scales = self.tensors[blocks_name], self.tensors[scales_name]
        if blocks.shape[:-1] != scales.shape:
            raise ValueError(
                f"{scales.file}: tensor {scales_name} {list(scales.shape)} does not fit "
                f"{blocks_name} {list(blocks.shape)}: expected one scale for each block"
            )

    def load_into(self, core: _gptoss.Core, progress: Progress = True) -> None:
        """Checks the headers, then streams every tensor into `core`.

        Beside the core's own memory at most `BATCH_BYTES`, or one tensor if that is larger, is
        resident at any time. Calling `core.finish_loading()` is left to the caller.

        Args:
            core: made from `config`.
            progress: True for a bar on stderr, False for none, or a function of (bytes done, all).

        Raises:
            ValueError: a tensor is not as expected, or a file has changed since it was opened.
        """
        self.check()
        remaining = self.nbytes
        with byte_progress("Loading", remaining, progress) as advance:
            for file, names in self._batches():
                try:
                    with safe_open(file, framework="pt") as shard:
                        for name in names:
                            core.load_tensor(name, shard.get_tensor(name))
                            advance(self.tensors[name].nbytes)
                except SafetensorError as error:
                    raise ValueError(f"{file}: {error}") from error
                # Leaving the `with` unmapped the batch, so its pages may now be dropped.
                done = [self.tensors[name] for name in names]
                remaining -= sum(info.nbytes for info in done)
                if _free_memory() < remaining:
                    _drop_file_pages(file, done)

    def _batches(self) -> Iterator[tuple[Path, list[str]]]:
        """What to read from one mapping of one file: large tensors first, then in disk order."""
        used = [(name, self.tensors[name]) for name in self.expected]
        used.sort(key=lambda item: (item[1].nbytes < LARGE_BYTES, item[1].file, item[1].offset))
        batch: list[str] = []
        size = 0
        for position, (name, info) in enumerate(used):
            batch.append(name)
            size += info.nbytes
            following = used[position + 1][1] if position + 1 < len(used) else None
            if following and following.file == info.file and size + following.nbytes <= BATCH_BYTES:
                continue
            yield info.file, batch
            batch, size = [], 0


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint and reads its config and all its headers; no tensor is read.

    Args:
        path: a directory in either layout, a directory whose `original/` is one, or, with the extra
            `hub`, a repository id ("owner/name").

    Raises:
        FileNotFoundError: there is no such directory or repository, or a file of it is missing.
        ValueError: a file of it is not as it must be; names file and field or tensor.
    """
    directory = _find_directory(path)
    config_path = directory / "config.json"
    config_values = read_json_object(config_path)
    config = parse_config(config_values, config_path)
    weights, tensors = _read_tensors(directory)
    generation_path = _companion(directory, "generation_config.json")
    generation = read_json_object(generation_path) if generation_path else {}
    eos = _eos_token_ids(Fields(config_path, config_values), config.vocab_size)
    if generation_path and generation.get("eos_token_id") is not None:
        eos = _read_token_ids(
            Fields(generation_path, generation), "eos_token_id", config.vocab_size
        )
    return Checkpoint(
        directory=directory,
        weights=weights,
        config=config,
        layout=_layout(weights, tensors),
        tensors=tensors,
        tokenizer_path=_companion(directory, "tokenizer.json"),
        eos_token_ids=tuple(token for token in eos if token != END_TOKEN),
        generation=generation,
    )


def _find_directory(path: str | os.PathLike[str]) -> Path:
    """The directory that holds config.json: `path`, its `original/`, or a downloaded repository."""
    directory = Path(path)
    if not directory.exists():
        if not _REPOSITORY_ID.fullmatch(os.fspath(path)):
            raise FileNotFoundError(f"{directory}: no such directory")
        directory = _download(os.fspath(path))
    if not directory.is_dir():
        raise ValueError(f"{directory}: is a file, expected the directory of a checkpoint")
    original = directory / "original"
    if not (directory / "config.json").exists() and (original / "config.json").exists():
        return original
    return directory


def _download(repository: str) -> Path:
    """The local snapshot of a repository on the Hugging Face hub, downloaded if need be."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise FileNotFoundError(
            f"{repository}: no such directory (to download a repository: pip install 'gptoss[hub]')"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=_REPOSITORY_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{repository}: no such directory, and not to be had from the hub: {reason}"
        ) from error


def _companion(directory: Path, name: str) -> Path | None:
    """A file beside the weights or, for `original/`, in the repository's top directory."""
    places = [directory, directory.parent] if directory.name == "original" else [directory]
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_tensors(directory: Path) -> tuple[Path, dict[str, TensorInfo]]:
    """Finds the weights: one file, an index with its shards, or numbered shards without an index.

    Returns:
        The file to name when a tensor is missing, and all tensors by name.
    """
    single = directory / "model.safetensors"
    if single.exists():
        return single, _read_header(single)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return index, _read_indexed(index)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{directory}: no model.safetensors, no {index.name}, no shards")
    _check_numbering(shards)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_header(shard).items():
            if name in tensors:
                raise ValueError(f"{shard}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = info
    return directory, tensors


def _check_numbering(shards: list[Path]) -> None:
    """Shards are numbered 1 to n, or 0 to n as in OpenAI's repositories, and each must be there."""
    for shard in shards:
        match = re.fullmatch(r"(model-+)(\d{1,5})-of-(\d{1,5})\.safetensors", shard.name)
        if not match:
            raise ValueError(f"{shard}: expected a name like model-00001-of-00002.safetensors")
        prefix, number, last = match[1], match[2], match[3]
        for expected in range(1, int(last) + 1):
            file = f"{prefix}{expected:0{len(number)}d}-of-{last}.safetensors"
            if not (shard.parent / file).exists():
                raise FileNotFoundError(
                    f"{shard.parent / file}: no such file, but {shard.name} is there"
                )


def _read_indexed(index: Path) -> dict[str, TensorInfo]:
    """The tensors that an index names, each from the shard it names."""
    fields = Fields(index, read_json_object(index))
    weight_map = fields.table("weight_map").values
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise ValueError(
                f"{index}: weight_map.{name} is {file!r}, expected a file inside the directory"
            )
        if file not in headers:
            if not (index.parent / file).exists():
                raise FileNotFoundError(
                    f"{index.parent / file}: no such file, but {index.name} names it"
                )
            headers[file] = _read_header(index.parent / file)
        if name not in headers[file]:
            raise ValueError(
                f"{index.parent / file}: tensor {name} missing, but {index.name} places it here"
            )
        tensors[name] = headers[file][name]
    return tensors


def _is_inside(file: str) -> bool:
    """Whether a name stays inside its directory. Links may leave it: caches are made of them."""
    for path in (PurePosixPath(file), PureWindowsPath(file)):
        if path.anchor or ".." in path.parts or not path.parts:
            return False
    return "\0" not in file


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after the library has checked header and length."""
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file")
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"{file}: {size} bytes, truncated or not safetensors: {error}") from error
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        offset = 8 + header_size + begin
        tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), offset, end - begin)
    return tensors


def _layout(weights: Path, tensors: dict[str, TensorInfo]) -> str:
    """Which layout the tensor names belong to."""
    for layout, prefix in _LAYER_PREFIXES.items():
        if any(name.startswith(prefix) for name in tensors):
            return layout
    some = ", ".join(sorted(tensors)[:3]) or "none"
    raise ValueError(
        f"{weights}: no gpt-oss tensors, neither model.layers.* nor block.*; found {some}"
    )


def _eos_token_ids(config: Fields, vocab_size: int) -> list[int]:
    """Stop tokens if generation_config.json names none: harmony's, where the vocabulary has them,
    and config.json's."""
    eos = [token for token in DEFAULT_EOS if token < vocab_size]
    own = _read_token_ids(config, "eos_token_id", vocab_size) if config.has("eos_token_id") else []
    return list(dict.fromkeys([*eos, *own]))


def _read_token_ids(fields: Fields, name: str, vocab_size: int) -> list[int]:
    """One token id or a list of them."""
    value = fields.values[name]
    tokens = value if isinstance(value, list) else [value]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            fields.fail(name, f"token ids from 0 to {vocab_size - 1}")
    return tokens


def _check_tensor(name: str, found: TensorInfo, expected: _gptoss.TensorSpec) -> None:
    shape = list(expected.shape)
    where = f"{found.file}: tensor {name}"
    if len(found.shape) != len(shape):
        raise ValueError(
            f"{where} has {len(found.shape)} dimensions {list(found.shape)}, "
            f"expected {len(shape)}: {shape}"
        )
    if list(found.shape) != shape:
        raise ValueError(f"{where} has shape {list(found.shape)}, expected {shape}")
    if found.dtype not in expected.dtypes:
        raise ValueError(
            f"{where} has dtype {found.dtype}, expected {' or '.join(expected.dtypes)}"
        )


def _free_memory() -> float:
    """Bytes of memory that hold nothing, not even file pages; infinite where that is not told."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return float("inf")
    match = re.search(r"^MemFree:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else float("inf")


def _drop_file_pages(file: Path, consumed: list[TensorInfo]) -> None:
    """Drops consumed ranges from the page cache, lest the kernel evict what is still to be read."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for info in consumed:
            os.posix_fadvise(descriptor, info.offset, info.nbytes, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
