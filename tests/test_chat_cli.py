"""`gptoss chat`: fed by a pipe, and by someone at a terminal."""

import errno
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_program import scripted_model
from gptoss import Model
from gptoss.cli import main
from harmony_text import final, thought

TIMEOUT = 120  # seconds; for a machine that is busy with other things
ANSWERS = {
    "Hi": thought("Hm.") + final("Hello 🦙"),
    "a\nb": final("Two lines"),
    "/x": final("A slash"),
    "evil": final("\x1b]0;title\x07 done"),
    "long": "slow:" + thought("Well.") + final("word " * 1000),
    "think": "slow:" + thought("ponder " * 1000) + final("never"),
}

Chat = Callable[..., tuple[object, str, str]]


@pytest.fixture
def chat(
    harmony_model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Chat:
    """Runs `gptoss chat` on these lines of stdin; gives (exit code, stdout, stderr)."""
    model = scripted_model(harmony_model.tokenizer, ANSWERS)
    model.__dict__["harmony"] = harmony_model.harmony  # made once for all tests
    monkeypatch.setattr(Model, "load", lambda *_, **__: model)
    monkeypatch.setattr(Model, "close", lambda _: None)
    monkeypatch.setenv("GPTOSS_DEBUG", "0")

    def run(lines: str, *arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as exit:
            main(["chat", "model", "--temperature", "0", *arguments])
        return exit.value.code, *capsys.readouterr()

    return run


def test_a_conversation_through_a_pipe(chat: Chat) -> None:
    code, out, err = chat("Hi\n\nagain\na\\\nb\n//x\n")
    assert (code, out) == (0, "Hello 🦙\nassistant=1 system=1 user=2\nTwo lines\nA slash\n")
    assert len(re.findall(r"^\d+ tokens \(\d of reasoning\), [\d.]+ tok/s; prompt", err, re.M)) == 4
    assert chat("Hi\n", "--quiet") == (0, "Hello 🦙\n", "")
    assert chat("Hi", "-q")[1] == "Hello 🦙\n"  # no newline at its end
    assert chat("", "-q") == (0, "", "")


def test_reasoning_on_request(chat: Chat) -> None:
    assert chat("Hi\n/reasoning\nHi\n", "--show-reasoning")[1] == "Hm.\n\nHello 🦙\nHello 🦙\n"
    assert chat("Hi\n", "--hide-reasoning")[1] == "Hello 🦙\n"


def test_commands(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    lines = f"Hi\n/system Be brief.\nn\n/save {path}\n/reset\nn\n/system\nn\n/save {path}\n/stats\n"
    code, out, err = chat(lines, "--system", "Be long.")
    assert code == 0
    assert out.splitlines() == [
        "Hello 🦙",
        "assistant=1 developer=1 system=1 user=2",
        "developer=1 system=1 user=1",
        "assistant=1 system=1 user=2",
    ]
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "user", "content": "n"},
            {"role": "assistant", "content": "developer=1 system=1 user=1"},
            {"role": "user", "content": "n"},
            {"role": "assistant", "content": "assistant=1 system=1 user=2"},
        ]
    }
    assert re.search(r"^4 answers, \d+ tokens \(2 of reasoning\), .* of 3000 tokens", err, re.M)
    assert "/save" in chat("/help\n")[2] and "/effort" in chat("/help\n", "-q")[2]


def test_effort(chat: Chat, harmony_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    efforts = []
    whole = Model.chat

    def spy(model: Model, messages: list, **options: object) -> object:
        efforts.append(options["reasoning_effort"])
        return whole(model, messages, **options)

    monkeypatch.setattr(Model, "chat", spy)
    chat("Hi\n/effort high\nHi\n", "--effort", "low")
    assert efforts == ["low", "high"]


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("/nothing\n", "no command /nothing"),
        ("/effort extreme\n", "/effort needs one of low, medium, high"),
        ("/save\n", "/save needs the name of a file"),
        ("/save tests/no/such/place\n", "/save: .*No such file"),
        (f"/save {__file__}\n", "/save: .*File exists"),
        ("word " * 3000 + "\n", "max_context"),
    ],
)
def test_an_error_in_a_script_ends_it(chat: Chat, lines: str, error: str) -> None:
    code, out, err = chat("Hi\n" + lines + "Hi\n", "-q")
    assert (code, out) == (1, "Hello 🦙\n")
    assert re.fullmatch(f"error: .*{error}.*\n", err)


def test_bad_options(chat: Chat) -> None:
    assert chat("", "--effort", "extreme")[0] == 2
    assert chat("", "--top-p", "7")[0] == 2


def test_a_checkpoint_that_cannot_chat(tiny_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "gptoss.cli", "chat", str(tiny_path), "--device", "cpu"],
        input="Hi\n",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: this checkpoint's tokenizer (512 tokens) is not that of")


class Terminal:
    """Someone at a terminal: types, and waits for what they expect to see."""

    def __init__(self, arguments: list[str]) -> None:
        self._terminal, inner = pty.openpty()
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "INPUTRC")}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env=environment | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
        )
        os.close(inner)
        self._unread = ""
        self._bytes = b""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def interrupt_line(self) -> None:
        """Ctrl-C at the prompt, until it ends the line: one that comes between Python's display of
        a key and its wait for the next is only seen with the next (CPython's readline)."""
        deadline = time.monotonic() + TIMEOUT
        self.type("\x03")
        while not select.select([self._terminal], [], [], 2)[0] and time.monotonic() < deadline:
            self.type("\x03")
        self.expect(r"\^C|\r\n")

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait until the screen shows this, behind what was expected before."""
        deadline = time.monotonic() + TIMEOUT
        while not (match := re.search(pattern, self._unread)):
            ready, _, _ = select.select([self._terminal], [], [], deadline - time.monotonic())
            assert ready, f"{pattern!r} did not come; on the screen: {self._unread!r}"
            try:
                data = os.read(self._terminal, 4096)
            except OSError as error:  # how Linux says that nobody writes any more
                assert error.errno == errno.EIO
                data = b""
            assert data, f"{pattern!r} did not come before the end: {self._unread!r}"
            self._bytes += data
            text = self._bytes.decode(errors="ignore")  # half a character waits
            self._bytes = self._bytes[len(text.encode()) :]
            self._unread += text
        self._unread = self._unread[match.end() :]
        return match

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def terminal(harmony_path: Path) -> Iterator[Terminal]:
    program = Path(__file__).with_name("chat_program.py")
    tokenizer = harmony_path / "tokenizer.json"
    terminal = Terminal([str(program), str(tokenizer), json.dumps(ANSWERS)])
    yield terminal
    terminal.close()


def test_at_a_terminal(terminal: Terminal) -> None:
    dim = re.escape("\x1b[2m"), re.escape("\x1b[22m")
    terminal.expect(r"Ctrl-D leaves\.")
    terminal.expect("> ")
    terminal.type("Hj\x7fi\n")  # edited
    terminal.expect(rf"{dim[0]}Hm{dim[1]}{dim[0]}\.{dim[1]}\r\n\r\nHello 🦙\r\n")
    terminal.expect(r"tok/s; prompt \d+ tokens")
    terminal.expect("> ")

    terminal.type("/reasoning\n")
    terminal.expect("Reasoning is hidden")
    terminal.type("\x1b[A\x1b[A\n")  # the line before the last again
    terminal.expect(rf"{dim[0]}thinking \.\.\.{dim[1]}\r\x1b\[KHello 🦙\r\n")

    terminal.type("evil\n")
    terminal.expect("\ufffd]0;title\ufffd done\r\n")

    terminal.type("/nothing\n")
    terminal.expect("error: there is no command /nothing")

    terminal.type("long\n")  # stopped: what was said stays in the conversation
    terminal.expect("word word")
    terminal.type("\x03")
    terminal.expect(r"\r\n.*tok/s; prompt \d+ tokens, [\d.]+ s, stopped")
    terminal.type("n\n")
    terminal.expect("assistant=4 system=1 user=5\r\n")

    terminal.type("think\n")  # stopped before it said anything
    terminal.expect(r"thinking \.\.\.")
    terminal.type("\x03")
    terminal.expect(r"\x1b\[K.*, stopped")
    terminal.expect("> ")
    terminal.type("half a line")  # stopped before it was asked anything
    terminal.expect("half a line")
    terminal.interrupt_line()
    terminal.expect("> ")
    terminal.type("n\n")
    terminal.expect("assistant=5 system=1 user=7\r\n")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(TIMEOUT) == 0
