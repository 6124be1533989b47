"""`gptoss inspect` and `gptoss synth`: look at a checkpoint, or make a random one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Checkpoint, Json, OutputDirectory, Quiet, show_progress


def inspect(path: Checkpoint, as_json: Json = False) -> None:
    """Show a checkpoint's shape, parameters, bytes by part and cache per token."""
    from .. import inspect as inspection

    description = inspection.describe(path)
    if as_json:
        print(json.dumps(dataclasses.asdict(description), default=str))
        return
    from rich.console import Console

    inspection.render(description, Console())


def synth(
    out: OutputDirectory,
    preset: Annotated[str, typer.Option(help="tiny, 20b or 120b.")] = "tiny",
    layout: Annotated[str, typer.Option(help="huggingface or original.")] = "huggingface",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Weight files; default: one for every 4.8 GB.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint at OUT.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json to copy.")
    ] = None,
    n_layers: Annotated[int | None, typer.Option("--layers")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="A multiple of 32.")] = None,
    n_heads: Annotated[int | None, typer.Option("--heads")] = None,
    n_kv_heads: Annotated[int | None, typer.Option("--kv-heads")] = None,
    n_experts: Annotated[int | None, typer.Option("--experts")] = None,
    experts_per_token: Annotated[int | None, typer.Option()] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="A multiple of 32.")] = None,
    vocab_size: Annotated[int | None, typer.Option()] = None,
    sliding_window: Annotated[int | None, typer.Option("--window")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint of random weights in the true format.

    Sizes that are given replace the preset's. tiny comes with a small tokenizer; the vocabulary of
    --tokenizer is as large as that file asks, or as --vocab-size says.
    """
    from ..synth import synthesize

    sizes = {
        "n_layers": n_layers,
        "hidden_size": hidden_size,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_experts": n_experts,
        "experts_per_token": experts_per_token,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "sliding_window": sliding_window,
    }
    path = synthesize(
        out,
        preset,
        layout,
        seed=seed,
        shards=shards,
        overwrite=overwrite,
        tokenizer=tokenizer,
        progress=show_progress(quiet),
        **{name: size for name, size in sizes.items() if size is not None},
    )
    if not quiet:
        print(f"Wrote {path} (random weights)", file=sys.stderr)
