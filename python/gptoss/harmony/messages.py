"""A conversation as OpenAI's chat completions has it, checked and turned into harmony's messages.

What is said to whom, and what is left out (https://github.com/openai/harmony, docs/format.md):

- The texts of system and developer messages are the instructions of a developer message.
- An assistant's content is a message to the user: in "final" if it ends the turn, in "commentary"
  if tool calls follow it (a preamble).
- Its reasoning goes to "analysis", and is dropped once a later message in "final" has ended what it
  was for. Reasoning behind the last of those led to tool calls that are still being worked on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TOOL_RUN = 1000
"""Characters of a tool's description or schema without a space, or of nothing but spaces:
openai-harmony takes time that grows with the square of it."""

MAX_TOOLS_CHARACTERS = 1 << 20
MAX_DEPTH = 64

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONG_RUN = re.compile(rf"\S{{{MAX_TOOL_RUN + 1}}}|\s{{{MAX_TOOL_RUN + 1}}}")


@dataclass(frozen=True, slots=True)
class HarmonyMessage:
    """A message of the format. `author` is a role, or the full name of a tool."""

    author: str
    text: str
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call. `parameters`: a JSON schema, None if it takes nothing."""

    name: str
    description: str
    parameters: dict[str, Any] | None


@dataclass(slots=True)
class _Given:
    """A checked message."""

    role: str
    text: str | None
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments
    tool: str = ""


def harmony_messages(messages: Any) -> tuple[str | None, list[HarmonyMessage]]:
    """Check a conversation and turn it into harmony's.

    Returns:
        The instructions at its beginning, None if there are none, and the messages behind them.

    Raises:
        ValueError: something is not as it must be; names the field, such as messages[3].role.
    """
    given = _check(messages)
    instructions = []
    while given and given[0].role in ("system", "developer"):
        instructions.append(given.pop(0).text or "")
    is_final = _ends_turn(given)
    last_final = max([i for i, final in enumerate(is_final) if final], default=-1)
    result: list[HarmonyMessage] = []
    for index, message in enumerate(given):
        if message.role == "assistant":
            keep = index > last_final
            result += _assistant(message, keep, is_final[index])
        elif message.role == "tool":
            name = f"functions.{message.tool}"
            result.append(HarmonyMessage(name, message.text or "", "commentary", "assistant"))
        elif message.role == "user":
            result.append(HarmonyMessage("user", message.text or ""))
        else:
            result.append(HarmonyMessage("developer", f"# Instructions\n\n{message.text}"))
    return "\n\n".join(instructions) if instructions else None, result


def tool_definitions(tools: Any) -> list[ToolDefinition]:
    """Check OpenAI function tools.

    Raises:
        ValueError: names the field, such as tools[0].function.name.
    """
    if tools is None:
        return []
    result: list[ToolDefinition] = []
    n_characters = 0
    for index, tool in enumerate(_sequence(tools, "tools")):
        path = f"tools[{index}]"
        if _mapping(tool, path).get("type") != "function":
            raise ValueError(f'{path}.type must be "function", not {_shown(tool.get("type"))}')
        function = _mapping(tool.get("function"), f"{path}.function")
        path = f"{path}.function"
        name = _name(function.get("name"), f"{path}.name")
        if any(other.name == name for other in result):
            raise ValueError(f"{path}.name: there are two tools named {name!r}")
        description = _text(function.get("description") or "", f"{path}.description")
        parameters = function.get("parameters")
        if parameters is not None:
            parameters = dict(_mapping(parameters, f"{path}.parameters"))
        for text in (description, *check_json(parameters, f"{path}.parameters")):
            n_characters += len(text)
            if _LONG_RUN.search(text):
                raise ValueError(
                    f"{path}: more than {MAX_TOOL_RUN} characters without a space, or of spaces"
                )
        if n_characters > MAX_TOOLS_CHARACTERS:
            raise ValueError(f"tools: more than {MAX_TOOLS_CHARACTERS} characters")
        result.append(ToolDefinition(name, description, _without_emptiness(parameters)))
    return result


def _check(messages: Any) -> list[_Given]:
    result = []
    tool_of_call: dict[str, str] = {}
    for index, message in enumerate(_sequence(messages, "messages")):
        path = f"messages[{index}]"
        role = _mapping(message, path).get("role")
        if role not in _ROLES:
            raise ValueError(f"{path}.role must be one of {', '.join(_ROLES)}, not {_shown(role)}")
        text = _content(message.get("content"), f"{path}.content")
        given = _Given(role, text)
        if role == "assistant":
            reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
            given.reasoning = _text(reasoning, f"{path}.reasoning")
            _check_calls(given, message.get("tool_calls"), f"{path}.tool_calls", tool_of_call)
        elif text is None:
            raise ValueError(f"{path}.content is missing")
        if role == "tool":
            call = message.get("tool_call_id")
            if not isinstance(call, str) or call not in tool_of_call:
                raise ValueError(
                    f"{path}.tool_call_id: no tool call before it has the id {_shown(call)}"
                )
            given.tool = tool_of_call[call]
        result.append(given)
    if not result:
        raise ValueError("messages is empty")
    return result


def _check_calls(given: _Given, calls: Any, path: str, tool_of_call: dict[str, str]) -> None:
    for index, call in enumerate(_sequence([] if calls is None else calls, path)):
        where = f"{path}[{index}]"
        id = _mapping(call, where).get("id")
        if not isinstance(id, str) or not id:
            raise ValueError(f"{where}.id must be a string, not {_shown(id)}")
        if call.get("type", "function") != "function":
            raise ValueError(f'{where}.type must be "function", not {_shown(call["type"])}')
        function = _mapping(call.get("function"), f"{where}.function")
        name = _name(function.get("name"), f"{where}.function.name")
        arguments = _text(function.get("arguments"), f"{where}.function.arguments")
        given.calls.append((name, arguments))
        tool_of_call[id] = name


def _ends_turn(given: Sequence[_Given]) -> list[bool]:
    """Of each message, whether it is an assistant's last word before the user's next."""
    result = []
    calls_follow = False
    for message in reversed(given):
        if message.role == "user":
            calls_follow = False
        calls_follow = calls_follow or bool(message.calls)
        result.append(message.role == "assistant" and bool(message.text) and not calls_follow)
    return result[::-1]


def _assistant(message: _Given, keep_reasoning: bool, final: bool) -> Iterator[HarmonyMessage]:
    if message.reasoning and keep_reasoning:
        yield HarmonyMessage("assistant", message.reasoning, "analysis")
    if message.text:
        yield HarmonyMessage("assistant", message.text, "final" if final else "commentary")
    for name, arguments in message.calls:
        yield HarmonyMessage(
            "assistant", arguments, "commentary", f"functions.{name}", "<|constrain|>json"
        )


def _content(content: Any, path: str) -> str | None:
    """A text, given as one or in parts."""
    if content is None or isinstance(content, str):
        return content and _text(content, path)
    parts = []
    for index, part in enumerate(_sequence(content, path)):
        where = f"{path}[{index}]"
        kind = _mapping(part, where).get("type")
        if kind != "text":
            raise ValueError(f'{where}.type must be "text", not {_shown(kind)}')
        parts.append(_text(part.get("text"), f"{where}.text"))
    return "".join(parts)


def _without_emptiness(parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """None for a schema of no properties: the format writes such a function as taking nothing."""
    if parameters is None or not parameters:
        return None
    nothing = parameters.get("type") == "object" and not parameters.get("properties")
    return None if nothing and not parameters.get("additionalProperties") else parameters


def check_json(value: Any, path: str) -> list[str]:
    """Every text in a JSON value, keys included.

    Raises:
        ValueError: it is no JSON value, or nested more than `MAX_DEPTH` deep; names `path`.
    """
    texts = []
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"{path} is nested more than {MAX_DEPTH} deep")
        if isinstance(item, str):
            texts.append(_text(item, path))
        elif isinstance(item, Mapping):
            texts += [_text(key, path) for key in item]
            stack += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, (list, tuple)):
            stack += [(part, depth + 1) for part in item]
        elif not (item is None or isinstance(item, bool) or _is_number(item)):
            raise ValueError(f"{path} is not JSON, or out of range: {_shown(item)}")
    return texts


def _is_number(value: Any) -> bool:
    """Whether a value is a number that fits a double."""
    if isinstance(value, int):
        return value.bit_length() <= 1023
    return isinstance(value, float) and math.isfinite(value)


def _name(name: Any, path: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{path} must be 1 to 64 letters, digits, _, . or -, not {_shown(name)}")
    return name


def _text(text: Any, path: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{path} must be a string, not {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} is not valid Unicode: it has a lone surrogate") from None
    return text


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be an object, not {_shown(value)}")
    return value


def _sequence(value: Any, path: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"{path} must be a list, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """A value for an error message, without much of what may be a user's text."""
    if value is None:
        return "missing"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a very large integer"
    if isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    return type(value).__name__
