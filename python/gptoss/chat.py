"""Chat: a conversation in, the assistant's next answer out. The work behind `Model.chat`."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .answer import Answer
from .engine import Constraint, Engine, Request, Timings
from .harmony import Delta, MessageBuilder, ToolCall
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .model import Model

ChatFinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class ChatOptions(TypedDict, total=False):
    """What `Model.chat` takes besides messages.

    Attributes:
        reasoning_effort: "low", "medium" (default) or "high".
        tools: OpenAI function tools that the model may call.
        tool_choice: "auto" (default), "none", "required", or {"type": "function", "function":
            {"name": ...}}.
        response_format: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name":
            ..., "schema": ...}}: what the answer must be.
        params: how to sample; None for the defaults and as many tokens as the context holds. Stop
            strings are looked for in the answer's content only.
        date: today as YYYY-MM-DD; None for the system's date.
    """

    reasoning_effort: str
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    response_format: Mapping[str, Any] | None
    params: SamplingParams | None
    date: str | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer: `reasoning_tokens` are among the `completion_tokens`, which also count
    the format's own."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class ChatResult:
    """An answer.

    Attributes:
        reasoning: the chain of thought. It is not meant for end users.
        content: the answer itself, empty if the model calls tools instead.
        tool_calls: functions that the model wants called, with their arguments as JSON text.
        finish_reason: "stop", "tool_calls", "length" (`max_new_tokens` reached), or "cancelled" (a
            stream that was closed, or is not at its end).
        usage: tokens of prompt and answer.
        timings: how long prompt and decoding took.
    """

    reasoning: str
    content: str
    tool_calls: list[ToolCall]
    finish_reason: ChatFinishReason
    usage: Usage
    timings: Timings

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message, to append to the conversation.

        The reasoning goes along: the format keeps it as long as tools are being called for it.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content or None}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


class ChatStream:
    """An answer as it comes: an iterator over its pieces.

    Computing starts with the first piece. Closing it, leaving its `with`, or letting go of it stops
    the generation and frees its cache.
    """

    def __init__(self, engine: Engine, request: Request, answer: Answer) -> None:
        """See `Model.chat`."""
        self._progress = _Progress(request, answer)
        self._deltas = self._progress.run(engine)

    @property
    def result(self) -> ChatResult:
        """The answer so far; all of it once the iteration is over."""
        return self._progress.result()

    def finish(self) -> ChatResult:
        """Generate what is missing; return all of the answer."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop. Harmless when repeated, or at the end."""
        self._deltas.close()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Progress:
    """What a stream has come to. It does not know the stream, which so ends when its user lets go
    of it."""

    def __init__(self, request: Request, answer: Answer) -> None:
        self._request = request
        self._answer = answer
        self._built = MessageBuilder()
        self._timings: Timings | None = None
        self._started = self._first = self._last = 0.0  # when it began; when tokens came

    def run(self, engine: Engine) -> Generator[Delta, None, None]:
        self._started = self._first = self._last = time.perf_counter()
        with closing(engine.run([self._request])) as run:
            for _, event in run:
                self._last = time.perf_counter()
                if self._answer.n_tokens == 0:
                    self._first = self._last
                self._timings = event.timings
                for piece in self._answer.push([event]):
                    self._built.add(piece.delta)
                    yield piece.delta
                if self._answer.stopped:
                    return

    def result(self) -> ChatResult:
        message = self._built.message
        n_prompt, answer = len(self._request.tokens), self._answer
        return ChatResult(
            reasoning=message.reasoning,
            content=message.content,
            tool_calls=message.tool_calls,
            finish_reason=answer.finish_reason or "cancelled",
            usage=Usage(n_prompt, answer.n_tokens, answer.n_reasoning_tokens),
            timings=self._timings or self._timings_so_far(),
        )

    def _timings_so_far(self) -> Timings:
        """Of an answer that has not come to its end by itself, as its reader sees them."""
        n_new = self._answer.n_tokens
        return Timings(
            prefill_tokens=len(self._request.tokens) if n_new else 0,
            prefill_seconds=self._first - self._started,
            decode_tokens=max(n_new - 1, 0),
            decode_seconds=self._last - self._first,
        )


def chat_request(
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    *,
    reasoning_effort: str = "medium",
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] = "auto",
    response_format: Mapping[str, Any] | None = None,
    params: SamplingParams | None = None,
    date: str | None = None,
) -> tuple[Request, Answer]:
    """What `Model.chat` documents, checked: the engine's request, and what takes its tokens."""
    params = SamplingParams(max_new_tokens=None) if params is None else params
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
    offered = () if tools is None or tool_choice == "none" else tools
    harmony = model.harmony
    prompt = harmony.render(
        messages,
        reasoning_effort=reasoning_effort,
        tools=offered,
        response_format=response_format,
        date=date,
    )
    request = model.request(
        prompt,
        replace(params, stop=()),
        stop_tokens=() if params.ignore_eos else harmony.stop_tokens,
        constraint=_constraint(model, response_format, offered, tool_choice),
    )
    names = [tool["function"]["name"] for tool in offered]
    return request, Answer(harmony.parser(names), params.stop)


def _constraint(
    model: Model,
    response_format: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
) -> Constraint | None:
    """The grammar that the answer is bound to, if it is to any."""
    free = response_format is None or response_format.get("type") == "text"
    strict = any(tool["function"].get("strict") for tool in tools)
    if free and not strict and tool_choice in ("auto", "none"):
        return None
    return model.grammar.harmony(response_format, tools, tool_choice)
