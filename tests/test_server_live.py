"""The server under uvicorn on loopback: clients that leave, stall or send rubbish, a full queue,
and the end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_tools import Live, live, scripted, until

LONG = {"prompt": [1, 2], "max_tokens": 4000, "ignore_eos": True}


def request_bytes(body: Any, path: str = "/v1/completions", headers: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n{headers}\r\n".encode() + data


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def healthy(server: Live) -> bool:
    with server.client() as client:
        answer = client.post("/v1/completions", json={"prompt": [3], "max_tokens": 1})
        return answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(stream: bool) -> None:
    with live(scripted("x", delay=0.005)) as server:
        core = server.scripted.core
        with server.socket() as connection:
            connection.sendall(request_bytes(LONG | {"stream": stream}))
            until(lambda: core.n_steps > 5)
            assert len(core.sequences) == 1
        until(lambda: not core.sequences)
        assert core.n_steps < 1000, "it did not run to its end"
        stats = server.scripted.model.engine.stats()
        assert stats.running == stats.waiting == 0
        assert healthy(server)


def test_a_client_that_leaves_the_queue() -> None:
    with live(scripted("x", delay=0.005, max_sequences=1)) as server:
        engine = server.scripted.model.engine
        with server.socket() as first, server.socket() as second:
            first.sendall(request_bytes(LONG))
            until(lambda: engine.stats().running == 1)
            second.sendall(request_bytes(LONG))
            until(lambda: engine.stats().waiting == 1)
            second.close()
            until(lambda: engine.stats().waiting == 0)
            assert engine.stats().running == 1
        until(lambda: engine.stats().running == 0)


def test_a_client_that_leaves_while_its_prompt_is_scored() -> None:
    with live(scripted("x", delay=0.02)) as server:
        core = server.scripted.core
        body = {"prompt": [1] * 4000, "max_tokens": 0, "echo": True, "logprobs": 1}
        with server.socket() as connection:
            connection.sendall(request_bytes(body))
            until(lambda: core.n_steps > 2)
        until(lambda: not core.sequences)
        assert core.n_steps < 4000 // 64
        assert healthy(server)


def test_cancelling_takes_at_most_a_step() -> None:
    """From the moment the server knows that the client is gone."""
    with live(scripted("x", delay=0.01)) as server:
        core = server.scripted.core
        driver = server.scripted.app.state.driver
        seen = []
        forget = driver.forget

        def watched(generations: Any) -> None:
            forget(generations)
            seen.append(core.n_steps)

        driver.forget = watched
        with server.socket() as connection:
            connection.sendall(request_bytes(LONG | {"stream": True}))
            until(lambda: core.n_steps > 5)
        until(lambda: not core.sequences)
        assert core.n_steps - seen[0] <= 1


def test_a_full_queue_says_when_to_come_back() -> None:
    with live(
        scripted("x", delay=0.01, max_sequences=1, max_batch_tokens=64, n_pages=64)
    ) as server:
        engine = server.scripted.model.engine
        engine.max_waiting = 2
        sockets = []
        for _ in range(3):
            sockets.append(server.socket())
            sockets[-1].sendall(request_bytes(LONG))
            until(lambda: engine.stats().running == 1)
        until(lambda: engine.stats().waiting == 2)
        with server.client() as client:
            for fields in ({}, {"stream": True}, {"n": 2}):
                refused = client.post("/v1/completions", json=LONG | fields)
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
        assert engine.stats().waiting == 2
        for connection in sockets:
            connection.close()
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
        assert healthy(server)


def test_all_choices_are_queued_or_none() -> None:
    with live(scripted("x", delay=0.01, max_sequences=1)) as server:
        engine = server.scripted.model.engine
        engine.max_waiting = 3
        with server.client() as client:
            assert client.post("/v1/completions", json=LONG | {"n": 60}).status_code == 429
        until(lambda: engine.stats().running == engine.stats().waiting == 0)


def test_slow_headers() -> None:
    with live(scripted("x", settings={"header_timeout": 0.2})) as server:
        for start in (b"", b"GET /health HTTP/1.1\r\nHost: local"):
            with server.socket() as connection:
                connection.sendall(start)
                answer = read_all(connection)
                assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "timeout"' in answer
        with server.socket() as connection:  # on a connection that has served one
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: b'"ok"' in connection.recv(65536))
            connection.sendall(b"GET /health")
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")
        assert healthy(server)


def test_headers_that_drip_do_not_reset_the_clock() -> None:
    settings = {"header_timeout": 0.3}
    with live(scripted("x", settings=settings)) as server, server.socket() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):
            for _ in range(400):  # 20 s
                connection.sendall(b"a: b\r\n")
                time.sleep(0.05)


def test_slow_bodies() -> None:
    with (
        live(scripted("x", settings={"body_timeout": 0.2})) as server,
        server.socket() as connection,
    ):
        connection.sendall(request_bytes(LONG)[:-5])
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer
        assert healthy(server)


def test_truncated_bodies() -> None:
    with live(scripted("x")) as server:
        with server.socket() as connection:
            connection.sendall(request_bytes(LONG)[:-5])
            connection.shutdown(socket.SHUT_WR)
            assert b" 200 " not in read_all(connection)
        assert server.scripted.core.n_steps == 0
        assert healthy(server)


@pytest.mark.parametrize(
    "data, status",
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n", b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n", b"400"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Content-Length: 5\r\n\r\n",
            b"400",
        ),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"400",
        ),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 40000, b"400"),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n",
            b"413",
        ),
    ],
)
def test_what_is_no_http(data: bytes, status: bytes) -> None:
    with live(scripted("x")) as server:
        with server.socket() as connection:
            connection.sendall(data)
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 " + status)
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert healthy(server)


def test_as_many_connections_as_allowed() -> None:
    with live(scripted("x", settings={"max_connections": 3})) as server:
        kept = [server.socket() for _ in range(3)]
        for connection in kept:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda c=connection: b'"ok"' in c.recv(65536))
        with server.socket() as connection:
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in answer
        for connection in kept:
            connection.close()
        until(lambda: healthy(server))


def stalled(server: Live, body: Any) -> socket.socket:
    """A client that asks, and does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(request_bytes(body))
    return connection


@pytest.mark.parametrize(
    "settings", [{"write_timeout": 0.3}, {"max_backlog": 500, "write_timeout": 1000.0}]
)
def test_a_client_that_does_not_read(settings: dict[str, Any]) -> None:
    """It is let go after its time, or once too much waits for it."""
    served = scripted("x", settings=settings, max_context=100_000, n_pages=100_000)
    with live(served) as server:
        body = {"prompt": [1], "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        with stalled(server, body | {"logprobs": 20}):
            until(lambda: served.core.n_steps > 100)
            until(lambda: not served.core.sequences, 60)
            assert served.core.n_steps < 90_000
        assert healthy(server)


def test_a_slow_reader_gets_it_all() -> None:
    served = scripted("x")
    with live(served) as server, stalled(server, LONG | {"stream": True}) as connection:
        until(lambda: served.core.n_steps > 300)
        response = http.client.HTTPResponse(connection)
        response.begin()
        text = b""
        while part := response.read1(3000):
            text += part
            time.sleep(0.0005)
        events = [line.removeprefix("data: ") for line in text.decode().splitlines() if line]
        assert events.pop() == "[DONE]"
        pieces = [json.loads(line)["choices"][0]["text"] for line in events]
        stop = served.tokenizer.decode([served.tokenizer.token_id("<|return|>")])
        assert "".join(pieces) == "x" + stop * 3999


def test_requests_on_one_connection() -> None:
    with live(scripted("x")) as server, server.socket() as connection:
        one = request_bytes({"prompt": [1], "max_tokens": 1})
        last = request_bytes({"prompt": [1], "max_tokens": 1}, headers="Connection: close\r\n")
        connection.sendall(one + one + last)  # without waiting for the answers
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 3


def test_many_clients_at_once() -> None:
    served = scripted(max_sequences=8)  # says prompts backwards
    with live(served) as server, server.client() as client:
        found: dict[int, str] = {}

        def work(index: int) -> None:
            body = {"prompt": [index + 1, 300 + index], "max_tokens": 2, "stream": index % 2 == 0}
            found[index] = client.post("/v1/completions", json=body).text

        threads = [threading.Thread(target=work, args=(index,)) for index in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, text in found.items():
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
            answers = [json.loads(line) for line in lines if line != "[DONE]"]
            said = "".join(answer["choices"][0]["text"] for answer in answers)
            assert said == served.tokenizer.decode([300 + index, index + 1])
        assert len(found) == 40
        until(lambda: not served.core.sequences)


# The command, as a process of its own.


class Command:
    """`gptoss serve` on a tiny model."""

    def __init__(self, path: Path, *options: object) -> None:
        line = [sys.executable, "-m", "gptoss.cli", "serve", "--model", str(path), "--port", "0"]
        self.process = subprocess.Popen(
            [*line, "--device", "cpu", "--threads", "1", *map(str, options)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"GPTOSS_DEBUG": "0"},
        )
        assert self.process.stderr is not None
        self.log: list[dict[str, Any]] = []
        for line in self.process.stderr:
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == "serving":
                break
        self.url = f"http://127.0.0.1:{self.log[-1]['port']}"

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal; the rest of the log is in `log`."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=60)
        self.log += [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
        return self.process.returncode


def test_the_command_drains(tiny_path: Path) -> None:
    with Command(tiny_path, "--drain", 30) as command:
        with httpx.stream(
            "POST",
            f"{command.url}/v1/completions",
            json={"prompt": "Hello", "max_tokens": 600, "ignore_eos": True, "stream": True},
            timeout=60,
        ) as response:
            lines = response.iter_lines()
            next(lines)
            command.process.send_signal(signal.SIGTERM)
            until(lambda: refused(command.url))
            text = "\n".join(lines)
            assert text.rstrip().endswith("data: [DONE]") and '"length"' in text
        assert command.stop() == 0
    (line,) = [line for line in command.log if line.get("route") == "/v1/completions"]
    assert line["status"] == 200 and line["completion_tokens"] == 600


def refused(url: str) -> bool:
    """Whether no new connection is taken."""
    try:
        httpx.get(f"{url}/health", timeout=5)
    except httpx.TransportError:
        return True
    return False


def test_draining_has_a_limit(tiny_path: Path) -> None:
    with Command(tiny_path, "--drain", 0.2) as command:
        body = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{command.url}/v1/completions", json=body, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            assert command.stop() == 0
            last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_ctrl_c(tiny_path: Path) -> None:
    with Command(tiny_path, "--model-name", "tiny-one", "--max-waiting", 3) as command:
        models = httpx.get(f"{command.url}/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["tiny-one"]
        assert command.stop(signal.SIGINT) == 130


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host", "0.0.0.0"], "API key"),
        (["--api-key-file", "/nowhere/key"], "/nowhere/key"),
        (["--port", "99999"], "port"),
        (["--model-name", "a b"], "model_name"),
        (["--allow-origin", "example.org"], "example.org"),
    ],
)
def test_the_command_refuses(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from gptoss.cli import main

    with pytest.raises(SystemExit) as exit:
        main(["serve", "--model", "/nowhere", *options])
    error = capsys.readouterr().err
    assert exit.value.code in (1, 2) and message in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    from gptoss.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as exit:
        main(["serve", "--model", "/nowhere", "--port", str(taken.getsockname()[1])])
    error = capsys.readouterr().err
    assert exit.value.code == 1 and "127.0.0.1" in error and error.count("\n") == 1
