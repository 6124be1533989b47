"""`gptoss demo`: the whole way from a checkpoint to text, on a model of random weights."""

from __future__ import annotations

import sys
import tempfile
from typing import Annotated

import typer

from .options import Threads


def demo(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "Hello",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many new tokens.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the sampling.")] = 0,
    threads: Threads = None,
) -> None:
    """Make a tiny random checkpoint in a temporary directory and generate from it.

    The weights are random numbers, so the text is noise: it shows that everything runs, and nothing
    more.
    """
    from .. import synth
    from ..model import Model
    from ..sampling import SamplingParams
    from .generate import print_stream, print_timings

    with tempfile.TemporaryDirectory(prefix="gptoss-demo-") as directory:
        print("Making a tiny gpt-oss checkpoint with random weights ...", file=sys.stderr)
        path = f"{directory}/tiny"
        synth.synthesize(path, preset="tiny", seed=seed, progress=False)
        with Model.load(path, "cpu", threads=threads, progress=False) as model:
            params = SamplingParams(max_new_tokens=max_new_tokens, seed=seed, ignore_eos=True)
            print("The weights are random, so what follows is noise, not language:\n")
            print(prompt, end="")
            timings = print_stream(model, prompt, params)
    print_timings(timings)
    print(
        "For real answers load OpenAI's weights: gptoss generate PATH --prompt TEXT",
        file=sys.stderr,
    )
