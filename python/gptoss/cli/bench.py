"""`gptoss bench`: how fast a checkpoint reads and writes on this machine."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    Checkpoint,
    Device,
    Json,
    MaxContext,
    MaxSequences,
    Precision,
    Quiet,
    Threads,
    integers,
    show_progress,
)

if TYPE_CHECKING:
    from .._gptoss import Core


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians of the repeats: a prompt read behind `context` tokens, then decoding behind both."""

    device: str
    isa: str
    precision: str
    threads: int
    context: int
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float
    repeats: int


def bench(
    path: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Prompt lengths, like 128,512.")] = "512",
    decode: Annotated[int, typer.Option(min=1, help="Tokens to decode behind each.")] = 64,
    context: Annotated[
        str, typer.Option(help="Tokens in the cache before the prompt, like 0,4096.")
    ] = "0",
    repeats: Annotated[int, typer.Option(min=1, help="Of which the median counts.")] = 3,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "exact",
    max_context: MaxContext = None,
    max_sequences: MaxSequences = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prompt and decode speed of one sequence of random token ids.

    Every repeat starts from an empty cache; filling it up to --context is not timed. With --json
    one line per row.
    """
    cases = list(product(integers(context, "--context"), integers(prompt, "--prompt")))
    if any(n_context < 0 or n_prompt < 1 for n_context, n_prompt in cases):
        raise typer.BadParameter("--context must be at least 0 and --prompt at least 1")

    from ..model import Model

    with Model.load(
        path,
        device,
        max_context=max_context,
        max_sequences=max_sequences,
        threads=threads,
        precision=precision,
        progress=show_progress(quiet),
    ) as model:
        longest = max(n_context + n_prompt for n_context, n_prompt in cases) + decode
        if longest > model.max_context:
            raise ValueError(f"{longest} tokens are more than max_context {model.max_context}")
        core = model.core
        _measure(core, 0, min(32, core.max_context - 2), 2)  # wakes threads, touches the weights
        rows = []
        for n_context, n_prompt in cases:
            rows.append(_row(core, n_context, n_prompt, decode, repeats))
            if as_json:
                print(json.dumps(dataclasses.asdict(rows[-1])), flush=True)
    if not as_json:
        _print_table(rows)


def _row(core: Core, context: int, prompt: int, decode: int, repeats: int) -> Row:
    runs = [_measure(core, context, prompt, decode) for _ in range(repeats)]
    prompt_seconds, decode_seconds = map(statistics.median, zip(*runs, strict=True))
    return Row(
        device=core.device,
        isa=core.isa,
        precision=core.precision,
        threads=core.threads,
        context=context,
        prompt_tokens=prompt,
        prompt_tokens_per_second=round(prompt / prompt_seconds, 2),
        decode_tokens=decode,
        decode_tokens_per_second=round(decode / decode_seconds, 2),
        repeats=repeats,
    )


def _measure(core: Core, context: int, prompt: int, decode: int) -> tuple[float, float]:
    """Seconds for the prompt (its first new token included) and for `decode` further tokens."""
    from ..engine import make_sampler
    from ..sampling import SamplingParams

    vocab_size = core.config.vocab_size
    draw = random.Random(0)  # the same tokens, hence the same experts, in every repeat
    tokens = [draw.randrange(vocab_size) for _ in range(context + prompt)]
    sampler = make_sampler(vocab_size, SamplingParams(temperature=0, seed=0))
    sequence = core.new_sequence()

    def feed(part: list[int]) -> int:
        for start in range(0, len(part), core.max_batch_tokens):
            chunk = part[start : start + core.max_batch_tokens]
            ((sample,),) = core.step([(sequence, chunk, 1, sampler)])
        return sample.token

    try:
        if context:
            feed(tokens[:context])
        started = time.perf_counter()
        token = feed(tokens[context:])
        read = time.perf_counter()
        for _ in range(decode):
            token = feed([token])
        return read - started, time.perf_counter() - read
    finally:
        sequence.close()


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"{first.device} {first.isa}, {first.precision}, {first.threads} threads, "
        f"median of {first.repeats}"
    )
    for column in ("context", "prompt", "prompt tok/s", "decode", "decode tok/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row.context),
            str(row.prompt_tokens),
            f"{row.prompt_tokens_per_second:.1f}",
            str(row.decode_tokens),
            f"{row.decode_tokens_per_second:.1f}",
        )
    Console().print(table)
