"""What the model writes, token by token, as reasoning, content and tool calls.

A well-formed answer is a row of messages; its first "<|start|>assistant" is in the prompt:

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>

Models leave out and repeat parts of that. Whatever comes is taken as well as it can be, and text
that fits nowhere is content: no token is an error, and no text is lost but that of broken headers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from ..tokenizer import Detokenizer, Tokenizer
from . import vocabulary as v

DeltaKind = Literal["reasoning", "content", "tool_call"]

_ENDS = frozenset((v.END, v.RETURN, v.CALL, v.END_OF_TEXT))
_LONGEST_HEADER = 64  # tokens; one that goes on is no header

_CHANNELS = "analysis|commentary|final"
_ROLE = re.compile(
    rf"\s*(?:assistant({_CHANNELS})?|(user|system|developer|tool|functions\.[\w.-]+))(?=\s|$)"
)
_CHANNEL = re.compile(rf"\s*({_CHANNELS})(?=\W|$)")
_RECIPIENT = re.compile(r"\s*(?:to=([\w.:-]+)|(functions\.[\w.-]+)(?=\s|$))")
_CONTENT_TYPE = re.compile(r"\s*json")
_FUNCTION = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer, in the order in which it was written.

    Attributes:
        kind: "reasoning" (not for end users), "content", or "tool_call" (text of its arguments).
        text: never half a character; empty in the first delta of a tool call.
        index: which tool call of the answer, from 0.
        name: of the function, in the first delta of a tool call only.
        id: of the call, likewise.
    """

    kind: DeltaKind
    text: str
    index: int = 0
    name: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. `arguments` are as the model wrote them: JSON, if it did well."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """An answer. Several messages of one kind are joined by an empty line."""

    reasoning: str
    content: str
    tool_calls: list[ToolCall]


class MessageBuilder:
    """Puts deltas together to the answer that they are pieces of."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments

    def add(self, delta: Delta) -> None:
        """Take the next delta of the answer."""
        if delta.kind != "tool_call":
            self._texts[delta.kind].append(delta.text)
            return
        if delta.name is not None and delta.id is not None:
            self._calls.append((delta.id, delta.name, []))
        self._calls[delta.index][2].append(delta.text)

    @property
    def message(self) -> AssistantMessage:
        """The answer so far."""
        return AssistantMessage(
            "".join(self._texts["reasoning"]),
            "".join(self._texts["content"]),
            [ToolCall(id, name, "".join(arguments)) for id, name, arguments in self._calls],
        )


@dataclass(slots=True)
class _Segment:
    """Tokens of a header behind a marker: <|start|>, <|channel|>, <|constrain|>, or 0 for the
    beginning of a message whose <|start|> is in the prompt or left out."""

    marker: int
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Header:
    """What a header says. `rest` is text that is no part of a header."""

    assistant: bool = True
    channel: str | None = None
    recipient: str | None = None
    rest: str = ""


class StreamParser:
    """Takes the tokens of one answer; never raises on any of them.

    Reasoning is what comes in the channel "analysis", and whatever a model writes in another's
    name; a message to a function is a tool call; all else is content.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Collection[str] | None = None) -> None:
        """`tools`: the functions that may be called; None for any. See `Harmony.parser`."""
        self._tokenizer = tokenizer
        self._tools = tools
        self._header: list[_Segment] | None = [_Segment(0)]  # None in a message's content
        self._detokenizer: Detokenizer = tokenizer.detokenizer()
        self._kind: DeltaKind = "content"
        self._begun = False  # whether this message has any text
        self._built = MessageBuilder()
        self._n_calls = 0
        self._written: set[DeltaKind] = set()  # kinds that have text

    @property
    def message(self) -> AssistantMessage:
        """The answer so far."""
        return self._built.message

    def push(self, token: int) -> list[Delta]:
        """Take the next token; return what has become certain with it."""
        if token in _ENDS:
            return self._end([_Segment(0)], complete=True)
        if token == v.START:
            return self._end([_Segment(token)], complete=True)
        if token == v.CHANNEL or (token == v.CONSTRAIN and self._header is not None):
            if self._header is None:
                return self._end([_Segment(0), _Segment(token)], complete=True)
            self._header.append(_Segment(token))
            return []
        if token == v.MESSAGE:
            return [] if self._header is None else self._open(self._header, closed=True)
        if not 0 <= token < v.START_OF_TEXT:
            return []  # a control token where it means nothing, or no token at all
        if self._header is None:
            return self._write(self._detokenizer.push(token))
        self._header[-1].tokens.append(token)
        if sum(len(segment.tokens) for segment in self._header) <= _LONGEST_HEADER:
            return []
        return self._open(self._header, closed=False)

    def finish(self) -> list[Delta]:
        """No more tokens come: return what was held back."""
        return self._end([_Segment(0)], complete=False)

    def _end(self, header: list[_Segment], complete: bool) -> list[Delta]:
        """End the message under way, `complete` or cut off; the next one begins with `header`."""
        deltas = []
        if self._header is not None and any(segment.tokens for segment in self._header):
            deltas += self._open(self._header, closed=False, cut=not complete)
        if self._header is None:
            deltas += self._write(self._detokenizer.flush())
            if complete and self._kind == "tool_call" and not self._begun:
                deltas += self._write("{}")  # no arguments at all
        self._header = header
        return deltas

    def _open(self, segments: list[_Segment], closed: bool, cut: bool = False) -> list[Delta]:
        """Begin a message's content. `closed`: its header ended as it should, with <|message|>;
        else what the header has too much is the message's text. `cut`: it may not be whole."""
        header = self._parse_header(segments, closed)
        self._header = None
        self._detokenizer = self._tokenizer.detokenizer()
        self._begun = False
        name = self._function(header)
        if name is None or (cut and not header.rest):
            reasoning = header.channel == "analysis" or not header.assistant
            self._kind = "reasoning" if reasoning else "content"
            # A single word is a content type or some unknown name.
            lost = closed and len(header.rest.split()) <= 1
            return [] if lost else self._write(header.rest)
        self._kind = "tool_call"
        self._n_calls += 1
        id = f"call_{secrets.token_hex(12)}"
        first = self._delta(Delta("tool_call", "", self._n_calls - 1, name, id))
        return [first] if closed else [first, *self._write(header.rest)]

    def _write(self, text: str) -> list[Delta]:
        """Add text to the current message."""
        if not text:
            return []
        if self._kind == "tool_call":
            self._begun = self._begun or not text.isspace()
            return [self._delta(Delta("tool_call", text, self._n_calls - 1))]
        if not self._begun and self._kind in self._written:
            text = "\n\n" + text
        self._begun = True
        self._written.add(self._kind)
        return [self._delta(Delta(self._kind, text))]

    def _delta(self, delta: Delta) -> Delta:
        self._built.add(delta)
        return delta

    def _function(self, header: _Header) -> str | None:
        """The function that a message calls, if it calls one."""
        if header.recipient is None or not header.assistant:
            return None
        name = header.recipient.removeprefix("functions.")
        if self._tools is None:
            called = name != header.recipient and _FUNCTION.fullmatch(name) is not None
            return name if called else None
        if header.recipient in self._tools:
            return header.recipient
        return name if name in self._tools else None

    def _parse_header(self, segments: list[_Segment], closed: bool) -> _Header:
        """Read role, channel and recipient, in whichever places they are."""
        header = _Header()
        for segment in segments:
            text = self._tokenizer.decode(segment.tokens)
            if len(segments) == 1 and segment.marker == 0 and not closed:
                return _Header(rest=text)  # an answer without any header
            if segment.marker in (0, v.START) and (match := _ROLE.match(text)):
                header.channel = match[1]
                header.assistant = match[2] is None
                text = text[match.end() :]
            elif segment.marker == v.CHANNEL and (match := _CHANNEL.match(text)):
                header.channel = match[1]
                text = text[match.end() :]
            elif segment.marker == v.CONSTRAIN and (match := _CONTENT_TYPE.match(text)):
                text = text[match.end() :]
            match = _RECIPIENT.match(text)
            if match and (closed or match[1]):
                header.recipient = match[1] or match[2]
                text = text[match.end() :]
            header.rest += text
        if header.recipient and (match := _CONTENT_TYPE.match(header.rest)):
            header.rest = header.rest[match.end() :]
        if not closed and (header.channel or header.recipient):
            header.rest = header.rest.lstrip()
        return header
