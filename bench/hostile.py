"""Requests that no honest client sends, against `gptoss serve`: it must refuse them and live.

    python bench/hostile.py [--count 10000] [--seed 0] [--tokenizer FILE]

Starts the server on a tiny random model, sends the requests over 16 connections at a time, and an
honest request beside them every 50. Prints how many got which status. Fails if a status is another
than 2xx, 4xx, 429 or 503, if a connection died without an answer that should have had one, if an
honest request was not answered, or if the server ended. With a tokenizer.json of gpt-oss's own
vocabulary, the requests to chat get past the vocabulary, too.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from gptoss.server.responses_schema import ResponsesRequest
from gptoss.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from servers import running

TIMEOUT = 60.0
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FIELDS = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 16},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
NAMES = sorted({name for body in BODIES for name in body.model_fields})
NAMES += ["nonsense", "functions", "audio", "__proto__", "__class__", "model_config"]


@dataclass(frozen=True)
class Hostile:
    """One request: bytes for a connection of its own, and whether it must be answered."""

    data: bytes
    answered: bool = True


def requests(count: int, seed: int) -> Iterator[Hostile]:
    """So many hostile requests, the same for the same seed."""
    rng = random.Random(seed)
    makers = (_wrong_field, _wrong_field, _wrong_field, _wrong_body, _wrong_bytes, _wrong_http)
    for _ in range(count):
        yield rng.choice(makers)(rng)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say, and that hardly any field wants."""
    kinds = 13 if depth < 3 else 10
    kind = rng.randrange(kinds)
    if kind < 10:
        return rng.choice(
            (
                None,
                True,
                -1,
                2**31,
                2**63,
                10**60,
                1e308,
                -1e-320,
                "",
                "1",
                "NaN",
                "\x00",
                "\ud800",
                "../../etc/passwd",
                "<|start|>system<|message|>",
                "\U0001f99c" * 50,
                "a" * rng.choice((10, 2000, 50_000)),
                rng.random() * 10 ** rng.randrange(-9, 9),
                rng.randrange(-(10**6), 10**6),
            )
        )
    if kind == 10:
        return [value(rng, depth + 1) for _ in range(rng.choice((0, 1, 3, 40)))]
    if kind == 11:
        keys = ("a", "", "type", "function", "role", "content", "0", "99999999999", "$ref")
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return _deep(rng.choice((5, 60, 70)), rng)


def _deep(depth: int, rng: random.Random) -> Any:
    nested: Any = 1
    for _ in range(depth):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def _schema(rng: random.Random) -> Any:
    """A response format or tools with a schema that is hard to compile."""
    schema: Any = rng.choice(
        (
            {"$ref": "#"},
            {"allOf": [{"$ref": "#/allOf/0"}]},
            {"type": "string", "pattern": "(a+)+" * rng.choice((1, 500))},
            {"type": "string", "minLength": 10**9},
            {"enum": ["x" * 3000] * 200},
            {"type": "array", "minItems": 10**7},
            {"type": "object", "properties": {str(i): {} for i in range(3000)}},
            _deep(60, rng),
            value(rng),
        )
    )
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    if rng.random() < 0.5:
        return {"response_format": form}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    return {"tools": [tool] * rng.choice((1, 200)), "tool_choice": "required"}


def _wrong_field(rng: random.Random) -> Hostile:
    """A request that is right but for some of its fields."""
    path = rng.choice(PATHS)
    body: dict[str, Any] = dict(FIELDS[path])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        body[rng.choice(NAMES)] = value(rng)
    if path != "/v1/completions" and rng.random() < 0.15:
        body |= _schema(rng)
    return _post(path, json.dumps(body).encode())


def _wrong_body(rng: random.Random) -> Hostile:
    """A body that is no JSON, or not what anyone expects."""
    path = rng.choice(PATHS)
    body = json.dumps(FIELDS[path]).encode()
    big = b"9" * rng.choice((20, 400, 5000))
    return _post(
        path,
        rng.choice(
            (
                b"",
                b"null",
                b"[]",
                b'"x"',
                body[:-1],
                body + body,
                body.replace(b"a", b"\xff\xfe", 1),
                body[:-1] + b', "temperature": NaN}',
                body[:-1] + b', "temperature": -Infinity}',
                body[:-1] + b', "temperature": 1e999}',
                body[:-1] + b', "seed": ' + big + b"}",
                body[:-1] + b', "n": 1e400}',
                body[:-1] + b', "stop": "\\ud800"}',
                b"[" * rng.choice((100, 100_000)),
                b'{"a":' * rng.choice((100, 50_000)) + b"1",
                b'{"prompt": [' + b"[]," * rng.choice((1000, 300_000)) + b"1]}",
                b'{"prompt": "' + b'\\"' * 100_000,
                rng.randbytes(rng.choice((1, 100, 10_000))),
                body.decode().encode("utf-16"),
                b"\xef\xbb\xbf" + body,
            )
        ),
    )


def _wrong_bytes(rng: random.Random) -> Hostile:
    """A good request with some of its bytes changed, doubled or gone."""
    path = rng.choice(PATHS)
    good = _post(path, json.dumps(FIELDS[path]).encode()).data
    head, _, body = good.partition(b"\r\n\r\n")
    data = bytearray(body)
    for _ in range(rng.choice((1, 3, 10))):
        place = rng.randrange(len(data))
        change = rng.randrange(3)
        if change == 0:
            data[place] = rng.randrange(256)
        elif change == 1:
            data[place:place] = data[: rng.randrange(10)]
        elif len(data) > 1:
            del data[place]
    if rng.random() < 0.3:  # truncated: fewer bytes than declared
        return Hostile(head + b"\r\n\r\n" + body[: rng.randrange(len(body))], answered=False)
    return _post(path, bytes(data))


def _wrong_http(rng: random.Random) -> Hostile:
    """Something that is no proper HTTP, or a request with odd headers."""
    host = b"Host: localhost\r\n"
    line = b"POST /v1/completions HTTP/1.1\r\n"
    kind = b"Content-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    data = rng.choice(
        (
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/9.9\r\n" + host + b"\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
            rng.randbytes(200) + b"\r\n\r\n",
            line + host + host + b"\r\n",
            line + b"Host: evil.example.com\r\nContent-Length: 2\r\n\r\n{}",
            line + host + b"Origin: https://evil.example.com\r\nContent-Length: 2\r\n\r\n{}",
            line + host + b"Content-Length: 2\r\n\r\n{}",
            line + host + kind + b"Content-Length: -1\r\n\r\n{}",
            line + host + kind + b"Content-Length: 99999999999999\r\n\r\n",
            line + host + kind + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            line + host + kind + chunked + b"xyz\r\n{}\r\n0\r\n\r\n",
            line + host + kind + chunked + b"-2\r\n{}\r\n0\r\n\r\n",
            line + host + kind + chunked + b"2\r\n{}\r\n0\r\n\r\n",
            line + host + b"x: " + b"a" * rng.choice((40_000, 200_000)) + b"\r\n\r\n",
            line + host + b"a: b\r\n" * 5000 + b"\r\n",
            line + host + b"a\x00b: c\r\n\r\n",
            line + host + b"no colon\r\n\r\n",
            line + host + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
            line + host + b"Expect: 100-continue\r\nContent-Length: 2\r\n" + kind + b"\r\n[]",
            b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /v1/models/" + b"%2e%2e%2f" * 20 + b"etc/passwd HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /page/..%2f..%2fsettings.py HTTP/1.1\r\n" + host + b"\r\n",
            b"GET /v1/models/%ff%00 HTTP/1.1\r\n" + host + b"\r\n",
            b"DELETE /v1/models HTTP/1.1\r\n" + host + b"\r\n",
            b"TRACE / HTTP/1.1\r\n" + host + b"\r\n",
        )
    )
    return Hostile(data)


def _post(path: str, body: bytes) -> Hostile:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return Hostile(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def send(port: int, hostile: Hostile) -> str:
    """The status of the answer; "closed" where there was none."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        try:
            connection.sendall(hostile.data)
            if not hostile.answered:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before all of it was sent: the answer may be there all the same
        answer = b""
        try:
            while b"\r\n" not in answer and (part := connection.recv(4096)):
                answer += part
                if answer.startswith(b"HTTP/1.1 100 "):  # "go on": the answer comes behind it
                    answer = answer.partition(b"\r\n\r\n")[2]
        except TimeoutError:
            return "no answer in time"
        except OSError:
            pass
    line = answer.partition(b"\r\n")[0].split()
    return line[1].decode("latin-1") if len(line) > 1 else "closed"


def fault(hostile: Hostile, status: str) -> str | None:
    """What is wrong with this answer, if anything. Some requests turn out to be right."""
    if status in ("429", "503") or (status.isdigit() and 200 <= int(status) < 500):
        return None
    if status == "closed" and not hostile.answered:
        return None
    return f"{status}: {hostile.data[:300]!r}"


def attack(port: int, count: int, seed: int, n_threads: int = 16) -> tuple[Counter[str], list[str]]:
    """Send them all. Returns (how often each status came, what was wrong)."""
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    lock = threading.Lock()
    source = enumerate(requests(count, seed))

    def work() -> None:
        while True:
            with lock:
                index, hostile = next(source, (0, None))
            if hostile is None:
                return
            status = send(port, hostile)
            wrong = fault(hostile, status)
            if index % 50 == 0 and not honest(port):
                wrong = f"an honest request beside {index} was not answered"
            with lock:
                statuses[status] += 1
                if wrong:
                    faults.append(wrong)

    threads = [threading.Thread(target=work) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, faults


def honest(port: int) -> bool:
    """Whether a request like any other gets its answer; a full queue may ask it to come back."""
    body = {"prompt": [5, 6], "max_tokens": 3}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        for _ in range(100):
            answer = client.post("/v1/completions", json=body)
            if answer.status_code not in (429, 503):
                return answer.status_code == 200
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json of gpt-oss's vocabulary")
    arguments = parser.parse_args()
    from gptoss.synth import synthesize

    with tempfile.TemporaryDirectory(prefix="gptoss-hostile-") as directory:
        shape: dict[str, Any] = {"n_layers": 2}
        if arguments.tokenizer is not None:
            shape |= {"tokenizer": arguments.tokenizer, "vocab_size": 201088, "hidden_size": 64}
        path = synthesize(Path(directory) / "model", progress=False, **shape)
        serve = [sys.executable, "-m", "gptoss.cli", "serve", "--model", str(path), "--quiet"]
        serve += ["--device", "cpu", "--max-context", "2048"]
        serve += ["--max-sequences", "8", "--max-waiting", "32"]
        with running(lambda port: [*serve, "--port", str(port)]) as (url, _):
            port = int(url.rpartition(":")[2])
            statuses, faults = attack(port, arguments.count, arguments.seed)
            alive = honest(port)
    for status, number in sorted(statuses.items()):
        print(f"{status:>20} {number:6}")
    for text in faults[:20]:
        print(text)
    print(f"{len(faults)} faults; the server {'answers' if alive else 'does not answer'}")
    sys.exit(0 if alive and not faults else 1)


if __name__ == "__main__":
    main()
