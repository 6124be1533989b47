"""A server for the tests: a scripted model behind the real engine, over HTTP on loopback or within
the process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import tokenizers
from fastapi import FastAPI
from gptoss.model import Model
from gptoss.server.app import create_app
from gptoss.server.serve import bind, make_server
from gptoss.server.served import ServedModel
from gptoss.server.settings import Settings
from gptoss.synth_tokenizer import build_tokenizer
from gptoss.tokenizer import Tokenizer
from scripted_core import Script, ScriptedCore

VOCAB_SIZE = 512
NAME = "scripted"


def small_tokenizer() -> Tokenizer:
    """512 tokens, harmony's special ones among them."""
    return Tokenizer(tokenizers.Tokenizer.from_str(build_tokenizer(VOCAB_SIZE)))


@dataclass
class Scripted:
    """A scripted model, and the application that serves it."""

    core: ScriptedCore
    model: Model
    app: FastAPI

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.model.tokenizer is not None
        return self.model.tokenizer


def scripted(
    script: Script | str | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    settings: dict[str, Any] | None = None,
    max_waiting: int | None = 64,
    **core: Any,
) -> Scripted:
    """A model that answers by `script`: a function from the prompt's tokens to the answer's, or the
    text of the same answer to everything. Without one it says the prompt backwards, and stops."""
    tokenizer = tokenizer or small_tokenizer()
    stop = tokenizer.token_id("<|return|>")
    assert stop is not None
    if isinstance(script, str):
        said = [*tokenizer.encode(script), stop]
        script = lambda _: said  # noqa: E731
    elif script is None:
        script = lambda prompt: [*reversed(prompt), stop]  # noqa: E731
    fake = ScriptedCore(script, max(tokenizer.vocab_size, VOCAB_SIZE), **core)
    model = Model(fake, tokenizer, [stop])
    model.engine.max_waiting = max_waiting
    app = create_app(
        ServedModel(model, NAME), Settings(**{"model_name": NAME, "port": 0, **(settings or {})})
    )
    return Scripted(fake, model, app)


@asynccontextmanager
async def in_process(app: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client that calls the application without a network, while its lifespan runs."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    options = {"base_url": "http://127.0.0.1", "timeout": 30} | options
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, **options) as client,
    ):
        yield client


def exchange(app: FastAPI, work: Callable[[httpx.AsyncClient], Any], **options: Any) -> Any:
    """Run `work` with such a client, and give its result."""

    async def run() -> Any:
        async with in_process(app, **options) as client:
            return await work(client)

    return asyncio.run(run())


@dataclass
class Live:
    """A server that listens on loopback."""

    port: int
    scripted: Scripted

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **options})

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def live(served: Scripted) -> Iterator[Live]:
    """The application under uvicorn, in a thread of this process."""
    settings: Settings = served.app.state.settings
    started = threading.Event()
    server = make_server(served.app, settings, started.set)
    bound = bind(settings)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield Live(bound.getsockname()[1], served)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is so; fail if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)
