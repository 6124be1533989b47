"""`gptoss generate`: continue a prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..sampling import SamplingParams
from .options import (
    Checkpoint,
    Device,
    FrequencyPenalty,
    IgnoreEos,
    Json,
    LogitBias,
    Logprobs,
    MaxContext,
    MaxNewTokens,
    MaxSequences,
    MinP,
    Precision,
    PresencePenalty,
    Quiet,
    RepetitionPenalty,
    Seed,
    Speculate,
    Stop,
    StopToken,
    Temperature,
    Threads,
    TopK,
    TopP,
    integers,
    sampling,
    show_progress,
)
from .terminal import printable

if TYPE_CHECKING:
    from ..engine import Timings
    from ..model import Model, Prompt

_DEFAULT = SamplingParams()


def generate(
    path: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads it from stdin.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids to continue, like 1,2,3, instead of text.")
    ] = None,
    max_new_tokens: MaxNewTokens = _DEFAULT.max_new_tokens,
    temperature: Temperature = _DEFAULT.temperature,
    top_k: TopK = _DEFAULT.top_k,
    top_p: TopP = _DEFAULT.top_p,
    min_p: MinP = _DEFAULT.min_p,
    repetition_penalty: RepetitionPenalty = _DEFAULT.repetition_penalty,
    presence_penalty: PresencePenalty = _DEFAULT.presence_penalty,
    frequency_penalty: FrequencyPenalty = _DEFAULT.frequency_penalty,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token: StopToken = None,
    logprobs: Logprobs = None,
    ignore_eos: IgnoreEos = False,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "exact",
    max_context: MaxContext = None,
    max_sequences: MaxSequences = None,
    speculate: Speculate = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue a prompt. Text goes to stdout as it comes, statistics go to stderr.

    A checkpoint without a tokenizer takes --tokens and prints token ids.
    """
    given = _prompt(prompt, tokens)
    params = sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=_logit_bias(logit_bias or []),
        seed=seed,
        stop=stop or (),
        stop_token_ids=stop_token or (),
        logprobs=logprobs,
        ignore_eos=ignore_eos,
    )

    from ..model import Model

    with Model.load(
        path,
        device,
        max_context=max_context,
        max_sequences=max_sequences,
        threads=threads,
        precision=precision,
        speculate=speculate,
        progress=show_progress(quiet),
    ) as model:
        if as_json:
            print(json.dumps(dataclasses.asdict(model.generate(given, params))))
            return
        timings = print_stream(model, given, params)
    if not quiet:
        print_timings(timings)


def print_stream(model: Model, prompt: Prompt, params: SamplingParams) -> Timings:
    """Print a generation to stdout as it comes: text, or token ids where there is no tokenizer."""
    for event in model.stream(prompt, params):
        text = event.text if model.tokenizer else f"{event.token} "
        print(printable(text), end="", flush=True)
    print()
    assert event.timings is not None
    return event.timings


def print_timings(timings: Timings) -> None:
    """One line of statistics on stderr."""
    print(
        f"prompt: {timings.prefill_tokens} tokens in {timings.prefill_seconds:.2f} s "
        f"({timings.prefill_tokens_per_second:.1f} tok/s), "
        f"decode: {timings.decode_tokens} tokens in {timings.decode_seconds:.2f} s "
        f"({timings.decode_tokens_per_second:.1f} tok/s)",
        file=sys.stderr,
    )


def _prompt(text: str | None, tokens: str | None) -> str | list[int]:
    """What to continue: the one of the two options that was given."""
    if text is not None and tokens is None:
        return sys.stdin.read() if text == "-" else text
    if tokens is not None and text is None:
        return integers(tokens, "--tokens")
    raise typer.BadParameter("give either --prompt or --tokens")


def _logit_bias(pairs: list[str]) -> dict[int, float]:
    """Parse "ID=BIAS" options."""
    biases = {}
    for pair in pairs:
        token, _, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise typer.BadParameter(
                f"{pair!r} is not ID=BIAS, like 42=-1.5", param_hint="--logit-bias"
            ) from None
    return biases
