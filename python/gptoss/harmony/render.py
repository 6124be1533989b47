"""From a conversation to the tokens of a prompt.

openai-harmony writes the frame of each message and the definitions of tools; texts from outside
are put between by the checkpoint's tokenizer. That makes the same tokens (a text is never one with
what is around it, and both know the same merges), but takes time linear in any text, and no text
becomes a special token.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..tokenizer import Tokenizer
from . import vocabulary
from .messages import HarmonyMessage, ToolDefinition, check_json, harmony_messages, tool_definitions
from .parser import StreamParser

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding

REASONING_EFFORTS = ("low", "medium", "high")


class Harmony:
    """The format over one checkpoint's tokenizer. Safe to use from several threads."""

    stop_tokens = frozenset((vocabulary.RETURN, vocabulary.CALL, vocabulary.END_OF_TEXT))
    """End an answer. <|end|> does not: it ends one message of an answer."""

    def __init__(self, tokenizer: Tokenizer, encoding: HarmonyEncoding) -> None:
        """See `for_tokenizer`."""
        self.tokenizer = tokenizer
        self._encoding = encoding

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer | None) -> Harmony:
        """Harmony for a checkpoint's tokenizer, after checking all of its vocabulary (0.5 s).

        Writes openai-harmony's vocabulary file into the user's cache ($XDG_CACHE_HOME/gptoss) if
        it is not there; needs no network.

        Raises:
            ValueError: the checkpoint has no tokenizer, or not gpt-oss's.
            ImportError: openai-harmony is not installed; names the extra that brings it.
        """
        if tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so it cannot chat")
        return cls(tokenizer, vocabulary.load_encoding(tokenizer))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        reasoning_effort: str = "medium",
        tools: Sequence[Mapping[str, Any]] | None = (),
        response_format: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> list[int]:
        """The prompt for the assistant's next answer, up to and with "<|start|>assistant".

        Args:
            messages: as OpenAI's chat completions has them. Roles system, developer, user,
                assistant (content, reasoning or reasoning_content, tool_calls) and tool
                (tool_call_id); content is text, or a list of {"type": "text", "text": ...}.
            reasoning_effort: "low", "medium" or "high".
            tools: OpenAI function tools.
            response_format: as chat completions has it; a JSON schema is told to the model, which
                alone does not make it keep to it.
            date: the current date as YYYY-MM-DD; None for today's.

        Raises:
            ValueError: names the field, such as messages[3].role.
        """
        if reasoning_effort not in REASONING_EFFORTS:
            efforts = ", ".join(REASONING_EFFORTS)
            raise ValueError(f"reasoning_effort must be one of {efforts}, not {reasoning_effort!r}")
        instructions, conversation = harmony_messages(messages)
        definitions = tool_definitions(tools)
        tokens = self._system(reasoning_effort, _date(date), bool(definitions))
        sections = [] if instructions is None else ["# Instructions", instructions]
        if definitions:
            sections.append(self._tools_section(definitions))
        sections += _response_format(response_format)
        if sections:
            tokens += self._message(HarmonyMessage("developer", "\n\n".join(sections)))
        for message in conversation:
            tokens += self._message(message)
        return [*tokens, vocabulary.START, *self.tokenizer.encode("assistant")]

    def parser(self, tools: Collection[str] | None = None) -> StreamParser:
        """A parser for one answer.

        Args:
            tools: names of the functions that may be called: a message to any other is text. None
                takes every message to "functions.NAME" as a call.
        """
        return StreamParser(self.tokenizer, tools)

    def _system(self, reasoning_effort: str, date: str, has_tools: bool) -> list[int]:
        from openai_harmony import Message, ReasoningEffort, RenderOptions, Role, SystemContent

        content = SystemContent(
            reasoning_effort=ReasoningEffort(reasoning_effort.capitalize()),
            conversation_start_date=date,
        )
        return self._encoding.render(
            Message.from_role_and_content(Role.SYSTEM, content),
            RenderOptions(conversation_has_function_tools=has_tools),
        )

    def _tools_section(self, tools: list[ToolDefinition]) -> str:
        """The part of a developer message that defines functions, in TypeScript."""
        from openai_harmony import DeveloperContent, Message, Role, ToolDescription

        functions = [
            ToolDescription(name=t.name, description=t.description, parameters=t.parameters)
            for t in tools
        ]
        content = DeveloperContent().with_function_tools(functions)
        tokens = self._encoding.render(Message.from_role_and_content(Role.DEVELOPER, content))
        begin = tokens.index(vocabulary.MESSAGE) + 1
        return self._encoding.decode_utf8(tokens[begin:-1])

    def _message(self, message: HarmonyMessage) -> list[int]:
        """One message: its frame around its text."""
        from openai_harmony import Author, Message, Role

        if message.author.startswith("functions."):
            author = Author(role=Role.TOOL, name=message.author)
        else:
            author = Author(role=Role(message.author))
        frame = Message(
            author=author,
            channel=message.channel,
            recipient=message.recipient,
            content_type=message.content_type,
        )
        *header, end = self._encoding.render(frame)
        return [*header, *self.tokenizer.encode(message.text), end]


def _date(date: str | None) -> str:
    if date is None:
        return datetime.date.today().isoformat()
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"date must be YYYY-MM-DD, not {date!r}") from None


def _response_format(response_format: Mapping[str, Any] | None) -> list[str]:
    """The section of a developer message that names a JSON schema, if one is asked for."""
    if response_format is None:
        return []
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind in ("text", "json_object"):
        return []
    if kind != "json_schema":
        raise ValueError("response_format.type must be one of text, json_object, json_schema")
    given = response_format.get("json_schema")
    if not isinstance(given, Mapping) or not isinstance(given.get("schema"), Mapping):
        raise ValueError("response_format.json_schema.schema must be an object")
    check_json(given, "response_format.json_schema")
    schema = json.dumps(given["schema"], ensure_ascii=False, separators=(",", ":"))
    comment = [f"// {line}" for line in str(given.get("description") or "").splitlines()]
    name = given.get("name") or "answer"
    return ["# Response Formats", f"## {name}", "\n".join([*comment, schema])]
