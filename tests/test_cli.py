"""The command line: what each command prints, and that an error is one line and an exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gptoss import Model, SamplingParams, __version__
from gptoss.cli import main

COMMANDS = ["generate", "chat", "inspect", "synth", "bench", "demo", "serve"]


@pytest.fixture
def gptoss(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command line in this process; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("GPTOSS_DEBUG", "0")

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return exit.value.code, *capsys.readouterr()

    return run


def test_version_and_help(gptoss) -> None:
    assert gptoss("--version") == (0, f"gptoss {__version__}\n", "")
    code, out, _ = gptoss("--help")
    assert code == 0 and all(command in out for command in COMMANDS)
    assert gptoss() == (0, out, "")
    for command in COMMANDS:
        assert gptoss(command, "-h")[0] == 0


def test_generate_text(gptoss, tiny: Model, tiny_path: Path) -> None:
    options = ["-n", 8, "--seed", 3, "--ignore-eos", "--device", "cpu"]
    params = SamplingParams(max_new_tokens=8, seed=3, ignore_eos=True)
    expected = tiny.generate("Hello", params)
    code, out, err = gptoss("generate", tiny_path, "--prompt", "Hello", *options)
    assert (code, out) == (0, expected.text + "\n")
    assert "prompt:" in err and "tok/s" in err
    assert gptoss("generate", tiny_path, "-p", "Hello", "-q", *options)[2] == ""


def test_generate_json(gptoss, tiny: Model, tiny_path: Path) -> None:
    options = ["--temperature", 0, "-n", 4, "--logprobs", 2, "--logit-bias", "5=-100", "--json"]
    code, out, _ = gptoss("generate", tiny_path, "--tokens", "1,2,3", *options)
    params = SamplingParams(temperature=0, max_new_tokens=4, logprobs=2, logit_bias={5: -100})
    expected = tiny.generate([1, 2, 3], params)
    found = json.loads(out)
    assert code == 0
    assert (found["prompt_tokens"], found["tokens"]) == ([1, 2, 3], expected.tokens)
    assert found["finish_reason"] == expected.finish_reason
    assert len(found["logprobs"][0]["top"]) == 2


def test_generate_without_a_tokenizer(gptoss, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    assert gptoss("synth", path, "--vocab-size", 100, "--layers", 1, "-q")[0] == 0
    options = ["-n", 5, "--temperature", 0]
    code, out, _ = gptoss("generate", path, "--tokens", "1,2", *options)
    assert code == 0 and [int(token) for token in out.split()]
    code, _, err = gptoss("generate", path, "--prompt", "Hello")
    assert code == 1 and "tokenizer" in err


def test_synth_and_inspect(gptoss, tmp_path: Path) -> None:
    path = tmp_path / "model"
    options = ["--layers", 3, "--experts", 16, "--hidden-size", 96, "--layout", "original"]
    code, _, err = gptoss("synth", path, *options)
    assert code == 0 and "random" in err
    code, out, _ = gptoss("inspect", path)
    assert code == 0 and "original" in out
    code, out, _ = gptoss("inspect", path, "--json")
    assert code == 0 and isinstance(json.loads(out), dict)
    code, _, err = gptoss("synth", path)
    assert code == 1 and str(path) in err
    assert gptoss("synth", path, "--overwrite", "-q")[0] == 0


def test_bench(gptoss, tiny_path: Path) -> None:
    options = ["--prompt", "16,600", "--decode", 4, "--context", "0,20", "--repeats", 1]
    code, out, _ = gptoss("bench", tiny_path, *options, "--threads", 1, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["context"], row["prompt_tokens"]) for row in rows] == [
        (0, 16),
        (0, 600),
        (20, 16),
        (20, 600),
    ]
    for row in rows:
        assert row["prompt_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert row["threads"] == 1
    code, out, _ = gptoss("bench", tiny_path, "--prompt", 8, "--decode", 2, "--repeats", 1)
    assert code == 0 and "tok/s" in out


def test_demo(gptoss) -> None:
    code, out, _ = gptoss("demo", "-n", 5)
    assert code == 0 and "random" in out and "noise" in out


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["nonsense"], 2, "nonsense"),
        (["generate"], 2, "PATH"),
        (["generate", "TINY"], 2, "--prompt or --tokens"),
        (["generate", "TINY", "-p", "a", "--tokens", "1"], 2, "--prompt or --tokens"),
        (["generate", "TINY", "--tokens", "1,x"], 2, "--tokens"),
        (["generate", "TINY", "-p", "a", "--top-p", "2"], 2, "top_p must be"),
        (["generate", "TINY", "-p", "a", "--top-k", "x"], 2, "--top-k"),
        (["generate", "TINY", "-p", "a", "--logit-bias", "7"], 2, "--logit-bias"),
        (["generate", "TINY", "-p", "a", "--temperature", "nan"], 2, "temperature must be"),
        (["generate", "TINY", "-p", "a", "--device", "tpu"], 1, "device must be"),
        (["generate", "TINY", "-p", "a", "--precision", "int8"], 1, "precision must be"),
        (["generate", "TINY", "--tokens", "1,512"], 1, "from 0 to 511"),
        (["generate", "TINY", "-p", ""], 1, "empty"),
        (["generate", "/nowhere", "-p", "a"], 1, "/nowhere"),
        (["inspect", "/nowhere"], 1, "/nowhere"),
        (["synth", "x", "--preset", "huge"], 1, "huge"),
        (["bench", "TINY", "--prompt", "0"], 2, "--prompt at least 1"),
        (["bench", "TINY", "--context", "9999999"], 1, "max_context"),
    ],
)
def test_errors_are_one_line(
    gptoss, tiny_path: Path, arguments: list[str], code: int, message: str
) -> None:
    arguments = [str(tiny_path) if argument == "TINY" else argument for argument in arguments]
    found, out, err = gptoss(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_DEBUG", "0")
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "inspect", "/nowhere"])


def command(*arguments: object, **options: object) -> subprocess.Popen:
    """Starts the command line as a process of its own."""
    line = [sys.executable, "-m", "gptoss.cli", *map(str, arguments)]
    return subprocess.Popen(line, text=True, **options)


def test_prompt_from_stdin_and_a_reader_that_leaves(tiny_path: Path) -> None:
    options = ["--prompt", "-", "--ignore-eos", "-n", 2000, "-q", "--device", "cpu"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with command("generate", tiny_path, *options, **pipes) as process:
        process.stdin.write("Hello")
        process.stdin.close()
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) == 1


def test_a_terminal_that_knows_ascii_only(tiny_path: Path) -> None:
    options = ["--prompt", "a", "--ignore-eos", "-n", 40, "--seed", 0, "-q", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with command(
        "generate", tiny_path, *options, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.wait(20) == 0


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_quietly(tiny_path: Path) -> None:
    options = ["--prompt", "a", "--ignore-eos", "-n", 100_000, "-q", "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with command("generate", tiny_path, *options, **pipes) as process:
        process.stdout.read(1)
        started = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert time.perf_counter() - started < 5
