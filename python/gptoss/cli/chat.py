"""`gptoss chat`: talk to a model in the terminal.

Lines are edited by Python's own readline, with the history of this session: prompt_toolkit would do
more, but is one more package to install, and takes over the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..sampling import SamplingParams
from .options import (
    Checkpoint,
    Device,
    FrequencyPenalty,
    MaxContext,
    MaxNewTokens,
    MinP,
    Precision,
    PresencePenalty,
    Quiet,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    sampling,
    show_progress,
)
from .terminal import dim, has_styles, printable

if TYPE_CHECKING:
    from ..chat import ChatResult
    from ..harmony import Delta
    from ..model import Model

_DEFAULT = SamplingParams()
_THINKING = "thinking ..."


def chat(
    path: Checkpoint,
    system: Annotated[
        str | None, typer.Option(help="Instructions for the model.", show_default=False)
    ] = None,
    effort: Annotated[str, typer.Option(help="Of reasoning: low, medium or high.")] = "medium",
    show_reasoning: Annotated[
        bool | None,
        typer.Option(
            "--show-reasoning/--hide-reasoning", help="Default: shown if stdout is a terminal."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = _DEFAULT.temperature,
    top_k: TopK = _DEFAULT.top_k,
    top_p: TopP = _DEFAULT.top_p,
    min_p: MinP = _DEFAULT.min_p,
    repetition_penalty: RepetitionPenalty = _DEFAULT.repetition_penalty,
    presence_penalty: PresencePenalty = _DEFAULT.presence_penalty,
    frequency_penalty: FrequencyPenalty = _DEFAULT.frequency_penalty,
    seed: Seed = None,
    stop: Stop = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "exact",
    max_context: MaxContext = None,
    quiet: Quiet = False,
) -> None:
    """Chat. In a terminal, /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Reads messages from stdin, a line each. Answers go to stdout as they come, statistics to stderr.
    """
    from ..harmony import REASONING_EFFORTS

    if effort not in REASONING_EFFORTS:
        raise typer.BadParameter(f"{effort!r} is not low, medium or high", param_hint="--effort")
    params = sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
    )
    from ..model import Model

    with Model.load(
        path,
        device,
        max_context=max_context,
        threads=threads,
        precision=precision,
        progress=show_progress(quiet),
    ) as model:
        if show_reasoning is None:
            show_reasoning = sys.stdout.isatty()
        _ = model.harmony  # a checkpoint that cannot chat is refused before anything is typed
        ChatSession(model, params, effort, system, show_reasoning, quiet).run()


class ChatSession:
    """One chat: the conversation, how it is led and shown."""

    def __init__(
        self,
        model: Model,
        params: SamplingParams,
        effort: str,
        system: str | None,
        show_reasoning: bool,
        quiet: bool,
    ) -> None:
        self._model = model
        self._params = params
        self._effort = effort
        self._system = system
        self._show_reasoning = show_reasoning
        self._quiet = quiet
        self._interactive = sys.stdin.isatty()
        self._messages: list[dict[str, Any]] = []
        self._results: list[ChatResult] = []
        self._saved: set[Path] = set()
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/reset": (self._reset, "forget the conversation"),
            "/save": (self._save, "FILE  write the conversation as JSON"),
            "/effort": (self._set_effort, "low, medium or high  how much to reason"),
            "/system": (self._set_system, "TEXT  instructions for the model; without text: none"),
            "/reasoning": (self._toggle_reasoning, "show or hide the reasoning"),
            "/stats": (self._stats, "tokens and speed so far"),
        }

    def run(self) -> None:
        """Read and answer until there is nothing more to read."""
        if self._interactive:
            with suppress(ImportError):  # without it, the terminal's own editing
                import readline  # noqa: F401  # from now on, input() edits lines
            self._say("/help lists commands. Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                line = self._read()
                if line.strip():
                    self._take(line)
            except EOFError:
                if self._interactive:
                    print()
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
            except ValueError as error:
                if not self._interactive:
                    raise
                self._say(f"error: {error}", always=True)

    def _read(self) -> str:
        """The next line; EOFError at the end. One that ends in a backslash goes on."""
        lines = []
        while not lines or lines[-1].endswith("\\"):
            if self._interactive and sys.stdout.isatty():
                lines.append(input("... " if lines else "> "))
            else:
                line = sys.stdin.readline()
                if not line:
                    raise EOFError
                lines.append(line.removesuffix("\n"))
        return "\n".join([*[line[:-1] for line in lines[:-1]], lines[-1]])

    def _take(self, line: str) -> None:
        """Do what a line says: a command, or something for the model."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line)
            return
        name, _, argument = line.strip().partition(" ")
        if name not in self._commands:
            raise ValueError(f"there is no command {name}; /help lists them, // begins a message")
        self._commands[name][0](argument.strip())

    def _ask(self, text: str) -> None:
        user = {"role": "user", "content": text}
        stream = self._model.chat(
            [*self._conversation(), user],
            stream=True,
            reasoning_effort=self._effort,
            params=self._params,
        )
        printer = _Printer(self._show_reasoning)
        try:
            with stream:
                for delta in stream:
                    printer.show(delta)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        finally:
            printer.end()
        result = stream.result
        self._results.append(result)
        self._messages.append(user)
        if result.content:
            self._messages.append(result.message)
        self._report(result)

    def _conversation(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _report(self, result: ChatResult) -> None:
        """One line about an answer."""
        usage, timings = result.usage, result.timings
        reasons = {"length": ", cut off at the most it may have", "cancelled": ", stopped"}
        self._say(
            f"{usage.completion_tokens} tokens ({usage.reasoning_tokens} of reasoning), "
            f"{timings.decode_tokens_per_second:.1f} tok/s; prompt {usage.prompt_tokens} tokens, "
            f"{timings.prefill_seconds:.2f} s{reasons.get(result.finish_reason, '')}"
        )

    def _say(self, text: str, always: bool = False) -> None:
        """Something that is no part of the chat."""
        if always or not self._quiet:
            print(dim(printable(text, sys.stderr), sys.stderr), file=sys.stderr, flush=True)

    def _help(self, _: str) -> None:
        for name, (_command, text) in self._commands.items():
            self._say(f"{name:11} {text}", always=True)
        self._say("A line that ends in \\ goes on; // begins a message with /.", always=True)
        self._say("Ctrl-C stops an answer, Ctrl-D leaves.", always=True)

    def _reset(self, _: str) -> None:
        self._messages.clear()
        self._say("The conversation is forgotten.")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        path = Path(name).expanduser().absolute()
        text = json.dumps({"messages": self._conversation()}, ensure_ascii=False, indent=2)
        try:
            # What this chat has not written itself stays.
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:
            raise ValueError(f"/save: {error}") from None
        self._saved.add(path)
        self._say(f"Saved {len(self._messages)} messages to {path}")

    def _set_effort(self, effort: str) -> None:
        from ..harmony import REASONING_EFFORTS

        if effort not in REASONING_EFFORTS:
            raise ValueError(f"/effort needs one of {', '.join(REASONING_EFFORTS)}")
        self._effort = effort
        self._say(f"Reasoning effort is {effort}.")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._say("Instructions are set." if text else "There are no instructions.")

    def _toggle_reasoning(self, _: str) -> None:
        self._show_reasoning = not self._show_reasoning
        self._say(f"Reasoning is {'shown' if self._show_reasoning else 'hidden'}.")

    def _stats(self, _: str) -> None:
        results = self._results
        n_tokens = sum(r.usage.completion_tokens for r in results)
        n_reasoning = sum(r.usage.reasoning_tokens for r in results)
        n_decoded = sum(r.timings.decode_tokens for r in results)
        seconds = sum(r.timings.decode_seconds for r in results)
        last = results[-1].usage if results else None
        in_use = last.prompt_tokens + last.completion_tokens if last else 0
        speed = n_decoded / seconds if seconds else 0.0
        self._say(
            f"{len(results)} answers, {n_tokens} tokens ({n_reasoning} of reasoning), "
            f"{speed:.1f} tok/s; last context {in_use} of {self._model.max_context} tokens; "
            f"effort {self._effort}",
            always=True,
        )


class _Printer:
    """Shows one answer as it comes: reasoning dimmed or not at all, then the content."""

    def __init__(self, show_reasoning: bool) -> None:
        self._show_reasoning = show_reasoning
        self._waiting = False  # whether a line says that the model is thinking
        self._shown: str | None = None  # kind of what was shown last

    def show(self, delta: Delta) -> None:
        if delta.kind == "reasoning" and not self._show_reasoning:
            if not self._waiting and has_styles(sys.stdout):
                self._waiting = True
                self._write(dim(_THINKING, sys.stdout))
            return
        self._stop_waiting()
        if self._shown not in (None, delta.kind):
            self._write("\n\n")
        self._shown = delta.kind
        text = printable(delta.text)
        self._write(dim(text, sys.stdout) if delta.kind == "reasoning" else text)

    def end(self) -> None:
        """Leave the cursor at the beginning of a line."""
        self._stop_waiting()
        if self._shown is not None:
            self._write("\n")

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
