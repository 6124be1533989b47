"""`gptoss serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, MaxContext, MaxSequences, Precision, Quiet, Threads, show_progress

if TYPE_CHECKING:
    from ..server.settings import Settings


def serve(
    model: Annotated[str, typer.Option(metavar="PATH", help="Checkpoint directory.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; all but loopback need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of one line that only you can read: clients must send this key."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="PATH's name")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name the Host header may have; repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of web pages that may call; repeatable.")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, max=65536, help="Requests that may wait; more get a 429.")
    ] = 256,
    speculate: Annotated[
        int, typer.Option(help="Guess up to so many tokens ahead, from the text so far; 0: none.")
    ] = 0,
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep the cache of prompts for others that begin alike.")
    ] = True,
    drain: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds running requests have at shutdown.")
    ] = 30,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "exact",
    max_context: MaxContext = None,
    max_sequences: MaxSequences = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API has it. Logs go to stderr as JSON lines.

    SIGTERM and Ctrl-C end it once running requests are done, or after --drain seconds.
    """
    _check_installed()
    from ..model import Model
    from ..server.app import create_app
    from ..server.logs import set_up_logs
    from ..server.serve import bind
    from ..server.serve import serve as run
    from ..server.served import ServedModel

    settings = _settings(
        api_key_file,
        model_name=Path(model).resolve().name if model_name is None else model_name,
        host=host,
        port=port,
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        drain_timeout=drain,
    )
    bound = bind(settings)  # before the model takes its time
    with (
        bound,
        Model.load(
            model,
            device,
            max_context=max_context,
            max_sequences=max_sequences,
            threads=threads,
            precision=precision,
            prefix_cache=prefix_cache,
            speculate=speculate,
            progress=show_progress(quiet),
        ) as loaded,
    ):
        loaded.engine.max_waiting = max_waiting
        served = ServedModel(loaded, settings.model_name)
        if served.can_chat():
            _ = served.grammar  # now, not in the first request that needs it
        set_up_logs("warning" if quiet else "info")
        run(create_app(served, settings), settings, bound)


def _check_installed() -> None:
    """Raises RuntimeError naming what the server needs and cannot import."""
    try:
        from ..server import app, serve  # noqa: F401
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the server needs {error.name}, which is not installed: pip install 'gptoss[serve]'"
        ) from None


def _settings(api_key_file: Path | None, **fields: Any) -> Settings:
    """Settings; what they refuse is a mistake in the command line."""
    from ..server.settings import Settings, read_key_file

    try:
        key = read_key_file(api_key_file) if api_key_file is not None else None
        return Settings(api_key=key, **fields)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
