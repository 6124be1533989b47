"""Small synthetic checkpoints for the tests, and ways to spoil them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss import _gptoss
from gptoss.synth import synthesize
from safetensors.torch import load_file, save_file

LAYOUTS = ["huggingface", "original"]


def write_small(path: Path, layout: str = "huggingface", shards: int = 1) -> Path:
    """A checkpoint of 2 layers, hidden size 64 and 300 tokens, with tokenizer; returns `path`."""
    return synthesize(
        path,
        layout=layout,
        shards=shards,
        progress=False,
        n_layers=2,
        hidden_size=64,
        n_heads=2,
        n_kv_heads=1,
        intermediate_size=32,
        vocab_size=300,
    )


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    """Changes the object in a JSON file in place."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    """Changes the tensors of a checkpoint with one weight file in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def config_of(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config.json."""
    return json.loads((path / "config.json").read_text())


def fields_of(config: _gptoss.Config) -> dict[str, Any]:
    """A config's fields by name, to be compared."""
    names = [name for name in dir(config) if not name.startswith("_")]
    return {name: getattr(config, name) for name in names}
