"""gptoss serve beside llama-cpp-python's server: many clients, or the same prefix twice.

    python bench/serve.py CHECKPOINT --llama-python VENV/bin/python --clients 1,4,8
    python bench/serve.py CHECKPOINT --llama-python VENV/bin/python --again 2048

It starts the servers itself, in turns, one model in memory at a time, and sends both the very same
requests to /v1/completions: prompts of random words, each word one token, answers of a fixed length
(no stop token can win), greedy, streamed. The checkpoint needs a tokenizer.json; a GGUF is written
beside it if there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from gptoss.tokenizer import Tokenizer
from servers import peak_memory, running

HERE = Path(__file__).resolve().parent
ENGINES = ("llama", "exact", "fast")  # the last two are precisions of gptoss


@dataclass
class Answer:
    """One request, in seconds on one clock.

    Attributes:
        sent: when the request was sent.
        times: when each piece of the answer came.
        n_tokens: how many tokens were asked for and made.
    """

    sent: float
    times: list[float]
    n_tokens: int

    @property
    def first(self) -> float:
        """Time to the first piece."""
        return self.times[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean time of each token after the first."""
        return (self.times[-1] - self.times[0]) / max(self.n_tokens - 1, 1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    counts = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("checkpoint", help="directory with config.json, safetensors, tokenizer")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python[server]")
    parser.add_argument("--gguf", help="where the GGUF is or goes; default: CHECKPOINT.text.gguf")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["llama", "exact"])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each server")
    parser.add_argument("--clients", default="1,4,8", help="clients at once", **counts)
    parser.add_argument("--requests", type=int, default=2, help="of each client, one by one")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens all prompts share")
    parser.add_argument("--again", type=int, help="send this many tokens twice, with other ends")
    parser.add_argument("--json", help="file for all rows, one JSON object a line")
    arguments = parser.parse_args()
    if unknown := set(arguments.engines) - set(ENGINES):
        parser.error(f"--engines: {sorted(unknown)} are not among {ENGINES}")
    if "llama" in arguments.engines and not arguments.llama_python:
        parser.error("--engines llama needs --llama-python")
    if not 0 <= arguments.shared_prefix <= arguments.prompt:
        parser.error("--shared-prefix must be from 0 to --prompt")
    if min(arguments.prompt, arguments.output, arguments.requests, *arguments.clients) < 1:
        parser.error("--prompt, --output, --requests and --clients must be at least 1")
    return arguments


# --- prompts --------------------------------------------------------------------------------------


class Words:
    """Makes texts of a given number of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
        words = [text for text in texts if re.fullmatch(" [a-z]{2,12}", text)]
        self.words = [word for word in words if len(tokenizer.encode(word)) == 1]
        if not self.words:
            raise SystemExit("the tokenizer has no words that are one token each")

    def text(self, n_tokens: int, seed: str) -> str:
        """The same seed gives the same text."""
        text = "".join(random.Random(seed).choices(self.words, k=n_tokens))
        found = len(self.tokenizer.encode(text))
        if found != n_tokens:
            raise SystemExit(f"a text of {n_tokens} words has {found} tokens")
        return text


# --- servers --------------------------------------------------------------------------------------


def server_command(arguments: argparse.Namespace, engine: str, port: int) -> list[str]:
    """How to start a server on a port."""
    longest = max(arguments.prompt, (arguments.again or 0) + 64) + arguments.output
    context, threads = str(math.ceil((longest + 8) / 256) * 256), str(arguments.threads)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if engine == "llama":
        command = [arguments.llama_python, "-m", "llama_cpp.server", "--model", arguments.gguf]
        command += [*address, "--n_ctx", context, "--n_threads", threads]
        command += ["--n_threads_batch", threads, "--flash_attn", "true", "--verbose", "false"]
        # Off: keeping every logit, and ending one client's answer when another's request comes.
        return [*command, "--logits_all", "false", "--interrupt_requests", "false"]
    command = [sys.executable, "-m", "gptoss.cli", "serve", "--model", arguments.checkpoint]
    command += [*address, "--threads", threads, "--max-context", context, "--quiet"]
    command += ["--max-sequences", str(max(arguments.clients)), "--precision", engine]
    return command


# --- load -----------------------------------------------------------------------------------------


class Load:
    """Sends requests to one server."""

    def __init__(self, url: str, model: str, stop_tokens: list[int]) -> None:
        self.url = f"{url}/v1/completions"
        self.model = model
        self.biases = {str(token): -100 for token in stop_tokens}

    def body(self, prompt: str, n_tokens: int, stream: bool) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": n_tokens,
            "temperature": 0,
            "logit_bias": self.biases,
            "stream": stream,
        }

    async def check(self, words: Words, n_tokens: int) -> None:
        """A first request, not timed: the server must count tokens as we do."""
        async with httpx.AsyncClient(timeout=None) as client:
            body = self.body(words.text(n_tokens, "check"), 4, stream=False)
            response = await client.post(self.url, json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:1000]}")
        usage = response.json()["usage"]
        if (usage["prompt_tokens"], usage["completion_tokens"]) != (n_tokens, 4):
            raise RuntimeError(f"of {n_tokens} and 4 tokens the server made {usage}")

    async def ask(self, client: httpx.AsyncClient, prompt: str, n_tokens: int) -> Answer:
        """One request and its streamed answer."""
        times: list[float] = []
        reason = None
        body = self.body(prompt, n_tokens, stream=True)
        sent = time.perf_counter()
        async with client.stream("POST", self.url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise RuntimeError(f"{response.status_code}: {text[:1000]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                times.append(time.perf_counter())
                content = json.loads(line.removeprefix("data: "))
                if "choices" not in content:
                    raise RuntimeError(line[:1000])
                reason = content["choices"][0]["finish_reason"]
        if reason != "length":
            raise RuntimeError(f"an answer ended with {reason!r} before its length was up")
        return Answer(sent, times, n_tokens)

    async def run(self, prompts: list[list[str]], n_tokens: int) -> list[Answer]:
        """One client for each list of prompts; each sends its next when its last is answered."""
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(timeout=None, limits=limits) as client:

            async def go(own: list[str]) -> list[Answer]:
                return [await self.ask(client, prompt, n_tokens) for prompt in own]

            answers = await asyncio.gather(*map(go, prompts))
        return [answer for own in answers for answer in own]


def percentile(values: list[float], percent: int) -> float:
    """The value that this percent of `values` do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def measure_load(arguments: argparse.Namespace, words: Words, load: Load) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    own = arguments.prompt - arguments.shared_prefix
    prefix = words.text(arguments.shared_prefix, "shared")
    rows = []
    for clients in arguments.clients:
        prompts = [
            [prefix + words.text(own, f"{clients} {c} {r}") for r in range(arguments.requests)]
            for c in range(clients)
        ]
        answers = asyncio.run(load.run(prompts, arguments.output))
        seconds = max(a.times[-1] for a in answers) - min(a.sent for a in answers)
        row = {"clients": clients, "tokens_per_second": len(answers) * arguments.output / seconds}
        for name in ("first", "per_token"):
            values = [getattr(answer, name) for answer in answers]
            row |= {f"{name}_p{percent}": percentile(values, percent) for percent in (50, 99)}
        rows.append(row)
    return rows


def measure_again(arguments: argparse.Namespace, words: Words, load: Load) -> list[dict[str, Any]]:
    """Three times: a prompt nobody has sent, then one with the same beginning."""
    rows = []
    for number in range(3):
        prefix = words.text(arguments.again, f"again {number}")
        ends = [words.text(32, f"{number} {end}") for end in "ab"]
        answers = asyncio.run(load.run([[prefix + end for end in ends]], 2))
        first, second = (answer.first for answer in answers)
        rows.append({"first": first, "second": second, "times_sooner": first / second})
    return rows


# --- report ---------------------------------------------------------------------------------------


def show(engine: str, row: dict[str, Any]) -> None:
    """One row, times in milliseconds."""
    parts = []
    for name, value in row.items():
        if name.startswith(("first", "second", "per_token")):
            parts.append(f"{name} {value * 1e3:.1f} ms")
        elif isinstance(value, float):
            parts.append(f"{name} {value:.2f}")
        else:
            parts.append(f"{name} {value}")
    print(f"{engine:6}", "  ".join(parts), flush=True)


def show_medians(rows: list[dict[str, Any]], engines: list[str]) -> None:
    """Medians over the rounds, and how they stand to the first engine's."""
    keys = sorted({row.get("clients", 0) for row in rows})
    names = [name for name in rows[0] if name not in ("engine", "round", "clients")]
    print("\nmedians; ratios to", engines[0])
    for key in keys:
        for name in names:
            medians = [
                statistics.median(
                    row[name]
                    for row in rows
                    if row["engine"] == engine and row.get("clients", 0) == key
                )
                for engine in engines
            ]
            ratios = "".join(f"{median / medians[0]:>10.2f}" for median in medians[1:])
            label = f"{key} clients, {name}" if key else name
            print(f"{label:<36}" + "".join(f"{median:>12.4f}" for median in medians) + ratios)


def main() -> None:
    """Runs the servers in turns."""
    arguments = parse_arguments()
    checkpoint = Path(arguments.checkpoint).resolve()
    arguments.checkpoint = str(checkpoint)
    arguments.gguf = str(Path(arguments.gguf or f"{checkpoint}.text.gguf").resolve())
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    words = Words(tokenizer)
    stops = [tokenizer.token_id(f"<|{name}|>") for name in ("return", "call", "endoftext")]
    if "llama" in arguments.engines and not Path(arguments.gguf).exists():
        print("writing", Path(arguments.gguf).name, flush=True)
        command = [sys.executable, str(HERE / "write_gguf.py"), str(checkpoint), arguments.gguf]
        subprocess.run(command, check=True)  # in a process of its own: its memory goes with it
    measure = measure_again if arguments.again else measure_load
    rows: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        for engine in arguments.engines if number % 2 == 0 else reversed(arguments.engines):
            with running(partial(server_command, arguments, engine)) as (url, pid):
                model = arguments.gguf if engine == "llama" else checkpoint.name
                load = Load(url, model, [stop for stop in stops if stop is not None])
                asyncio.run(load.check(words, arguments.prompt))
                for row in measure(arguments, words, load):
                    row["peak_gib"] = peak_memory(pid)
                    show(engine, row)
                    rows.append({"engine": engine, "round": number} | row)
    show_medians(rows, arguments.engines)
    if arguments.json:
        options = {"threads": arguments.threads, "prompt": arguments.prompt}
        options |= {"output": arguments.output, "shared_prefix": arguments.shared_prefix}
        text = "".join(json.dumps(options | row) + "\n" for row in rows)
        Path(arguments.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
