"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..sampling import SamplingParams

Checkpoint = Annotated[
    str, typer.Argument(metavar="PATH", help="Checkpoint directory.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: all it may use.", show_default=False)
]
Precision = Annotated[str, typer.Option(help="exact, or on the CPU fast (8-bit).")]
MaxContext = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of prompt and answer; default: the model's.", show_default=False
    ),
]
MaxSequences = Annotated[
    int | None,
    typer.Option(
        help="Most sequences at a time; default: as memory allows, at most 256.", show_default=False
    ),
]

# Of one generation.
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", "-n", help="Most new tokens.")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest; 0: all.")]
TopP = Annotated[
    float, typer.Option(help="Draw from the likeliest with this much probability together.")
]
MinP = Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: avoid tokens of prompt and output.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Subtracted from the logits of tokens already generated.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="The same, for each time they were generated.")
]
LogitBias = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to a logit; repeatable.")
]
Seed = Annotated[int | None, typer.Option(help="Repeat a generation; default: a fresh one.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; repeatable.")]
StopToken = Annotated[list[int] | None, typer.Option(help="Stop at this token id; repeatable.")]
Logprobs = Annotated[
    int | None, typer.Option(help="With --json: this many likeliest tokens for each.")
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after the model's stop tokens.")
]

Speculate = Annotated[
    int,
    typer.Option(
        help="Guess up to so many tokens ahead where text repeats itself: the same result, sooner."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no statistics.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OutputDirectory = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")]


def show_progress(quiet: bool) -> bool:
    """Whether to draw progress bars: only for someone who watches."""
    return not quiet and sys.stderr.isatty()


def sampling(**fields: Any) -> SamplingParams:
    """SamplingParams; what they refuse is a mistake in the command line."""
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def integers(text: str, option: str) -> list[int]:
    """Parse "1,2,3". Raises typer.BadParameter naming the option."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of integers like 1,2,3", param_hint=option
        ) from None
