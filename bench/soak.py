"""Many clients on one server for a long time: errors, memory, cache pages, cancelling.

    python bench/soak.py [--minutes 10] [--clients 32] [--tokenizer FILE]

Starts the server on a tiny random model in a process of its own. Of the clients' requests a fifth
leave in mid-stream, a tenth read slowly, the rest are streams and whole answers of all lengths;
with a tokenizer.json of gpt-oss's own vocabulary, half go to chat. Prints how many of each there
were, errors nobody asked for, resident memory after warm-up (a fifth of the time) and at the end,
pages still held at the end, and the most steps begun between a cancel and its pages' return.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from gptoss.engine import Generation
from servers import running

MIB = 1 << 20
MAX_CONTEXT = 2048
SLOW, LEAVES = 0.1, 0.2  # shares of the requests


class CancelWatch:
    """Counts the steps between a cancel and the moment when the generation holds no cache."""

    def __init__(self, driver: Any) -> None:
        self.n_steps = 0
        self.n_cancels = 0
        self.most_steps = 0
        self._pending: dict[Generation, int] = {}
        self._forget, driver.forget = driver.forget, self.forget
        self._step, driver.engine.step = driver.engine.step, self.step

    def counts(self) -> dict[str, int]:
        """What was counted so far."""
        names = ("n_steps", "n_cancels", "most_steps")
        return {name: getattr(self, name) for name in names}

    def forget(self, generations: Iterable[Generation]) -> None:
        """In the place of the driver's."""
        generations = list(generations)
        for generation in generations:
            if generation.finish_reason is None and generation.sequence is not None:
                self._pending[generation] = self.n_steps
                self.n_cancels += 1
        self._forget(generations)

    def step(self) -> Any:
        """In the place of the engine's."""
        for generation, begun in list(self._pending.items()):
            if generation.sequence is None:
                self.most_steps = max(self.most_steps, self.n_steps - begun)
                del self._pending[generation]
        self.n_steps += 1
        return self._step()


def serve(path: str, port: int) -> None:
    """The server's process."""
    from gptoss import Model
    from gptoss.server.app import create_app
    from gptoss.server.logs import set_up_logs
    from gptoss.server.serve import bind
    from gptoss.server.serve import serve as run
    from gptoss.server.served import ServedModel
    from gptoss.server.settings import Settings

    settings = Settings(model_name="soak", port=port)
    with Model.load(
        path, "cpu", max_context=MAX_CONTEXT, max_sequences=32, progress=False
    ) as model:
        set_up_logs("error")
        app = create_app(ServedModel(model, "soak"), settings)
        watch = CancelWatch(app.state.driver)
        app.add_api_route("/soak", watch.counts)
        run(app, settings, bind(settings))


class Clients:
    """All clients, for as long as they shall run."""

    def __init__(self, url: str, with_chat: bool, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._url = url
        self._with_chat = with_chat
        self._rng = random.Random(seed)

    async def run(self, n_clients: int, seconds: float) -> None:
        """Send requests, each client one after the other."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=300, limits=limits) as client:
            await asyncio.gather(*[self._one(client, end) for _ in range(n_clients)])

    async def _one(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            try:
                await self._request(client)
            except Exception as error:
                self.errors.append(repr(error))

    async def _request(self, client: httpx.AsyncClient) -> None:
        rng = self._rng
        words = "".join(rng.choices(("the ", "a ", "token ", "model "), k=rng.choice((5, 60, 300))))
        body: dict[str, Any] = {"max_tokens": rng.choice((5, 50, 200)), "ignore_eos": True}
        if self._with_chat and rng.random() < 0.5:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": words}]
        else:
            path = "/v1/completions"
            body["prompt"] = words
        kind = rng.random()
        if kind > 0.8:
            self.counts["whole"] += 1
            response = await client.post(path, json=body)
            usage = response.json()["usage"] if response.status_code == 200 else {}
            if not usage.get("completion_tokens"):
                self.errors.append(f"{response.status_code}: {response.text[:200]}")
            return
        leaves = kind < LEAVES
        slow = LEAVES <= kind < LEAVES + SLOW
        self.counts["leaves" if leaves else "slow" if slow else "streams"] += 1
        pause = 0.05 if slow else 0.0
        await self._stream(client, path, body, rng.randrange(1, 20) if leaves else None, pause)

    async def _stream(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict[str, Any],
        leave_after: int | None,
        pause: float,
    ) -> None:
        last = ""
        async with client.stream("POST", path, json=body | {"stream": True}) as response:
            n_lines = 0
            async for line in response.aiter_lines():
                if not line:
                    continue
                last = line
                n_lines += 1
                if n_lines == leave_after:
                    return
                if pause:
                    await asyncio.sleep(pause)
        if last != "data: [DONE]":
            self.errors.append(f"{response.status_code}: {last[:200]}")


def resident(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) * 1024 / MIB


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """(seconds, MiB) every 5 s."""
    started = time.monotonic()
    while True:
        samples.append((time.monotonic() - started, resident(pid)))
        await asyncio.sleep(5)


async def soak(arguments: argparse.Namespace, url: str, pid: int) -> bool:
    """All of it. Returns whether nothing was wrong."""
    seconds = arguments.minutes * 60
    clients = Clients(url, arguments.tokenizer is not None, arguments.seed)
    samples: list[tuple[float, float]] = []
    memory = asyncio.create_task(watch_memory(pid, samples))
    await clients.run(arguments.clients, seconds)
    memory.cancel()
    async with httpx.AsyncClient(base_url=url) as client:
        held = -1
        for _ in range(100):  # those who left last may still be noticed
            text = (await client.get("/metrics")).text
            held = sum(
                map(float, re.findall(r"^gptoss_cache_pages_in_use\{.*\} (\S+)", text, re.M))
            )
            if held == 0:
                break
            await asyncio.sleep(0.05)
        watch = (await client.get("/soak")).json()
        tokens = float(re.search(r"^gptoss_generated_tokens_total (\S+)", text, re.M)[1])
    warm = [mib for at, mib in samples if at >= seconds / 5]
    print(f"requests: {dict(clients.counts)}; {tokens:.0f} tokens; {watch['n_steps']} steps")
    print(f"errors: {len(clients.errors)}", *clients.errors[:10], sep="\n  ")
    print(
        f"resident memory, MiB: {warm[0]:.1f} after warm-up, {warm[-1]:.1f} at the end, "
        f"{min(warm):.1f} to {max(warm):.1f} between"
    )
    print(f"pages still held: {held:.0f}")
    print(f"cancelled: {watch['n_cancels']}; most steps until the cache was free: ", end="")
    print(watch["most_steps"])
    return not clients.errors and held == 0 and watch["most_steps"] <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json of gpt-oss's vocabulary")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], int(arguments.serve[1]))
        return
    from gptoss.synth import synthesize

    with tempfile.TemporaryDirectory(prefix="gptoss-soak-") as directory:
        shape: dict[str, Any] = {"n_layers": 2}
        if arguments.tokenizer is not None:
            shape |= {"tokenizer": arguments.tokenizer, "vocab_size": 201088, "hidden_size": 64}
        path = synthesize(Path(directory) / "model", progress=False, **shape)
        command = [sys.executable, __file__, "--serve", str(path)]
        with running(lambda port: [*command, str(port)]) as (url, pid):
            good = asyncio.run(soak(arguments, url, pid))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
