"""The `gptoss` command. Each command has its own file and imports what is slow when it runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from . import bench, chat, checkpoints, demo, generate, serve

app = typer.Typer(
    name="gptoss",
    help="Run OpenAI's gpt-oss models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(checkpoints.inspect)
app.command()(checkpoints.synth)
app.command()(serve.serve)
app.command()(bench.bench)
app.command()(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"gptoss {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from (or GPTOSS_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    if traceback:
        os.environ["GPTOSS_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    An error is one line on stderr. Exit code 2: the command line is wrong; 1: anything else; 130:
    Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # models write what not every terminal can show
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(arguments or ["--help"], prog_name="gptoss", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # the reader went away, as `| head` does; let the exit not trip over it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if os.environ.get("GPTOSS_DEBUG", "0") not in ("", "0"):
            raise
        format_message = getattr(error, "format_message", None)  # click's errors of usage have it
        message = format_message() if format_message else str(error) or type(error).__name__
        print("error:", " ".join(message.split()), file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    sys.exit(code if isinstance(code, int) else 0)
