"""From OpenAI's fields (response_format, tools, tool_choice) to what the grammar is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import GrammarError, GrammarLimits, check_schema

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

# Runs of white space are bounded: else a model may write nothing else until its length is up.
_WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,64}"


@dataclass(frozen=True)
class Binding:
    """A last message whose text must be JSON of a schema.

    Attributes:
        where: the schema's place in the request, for errors.
        function: whom the message calls; None for the final channel.
        schema: as JSON, with the compiler's options in it.
    """

    where: str
    function: str | None
    schema: str


@dataclass(frozen=True)
class Endings:
    """How a turn may end: with one of the bound messages, or with any text in the final channel."""

    bindings: tuple[Binding, ...]
    free_answer: bool


def read_fields(
    response_format: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    limits: GrammarLimits,
) -> Endings | None:
    """What `GrammarCompiler.harmony` documents; None where anything goes."""
    answer = _read_format(response_format, limits)
    functions = _read_tools(tools, limits)
    chosen = _read_choice(tool_choice, functions)
    if tool_choice == "auto" and answer is None:
        if not any(function.get("strict") for _, function in functions.values()):
            return None
    elif not tools and answer is None:
        return None
    calls = [_call(where, function, limits) for where, function in chosen.values()]
    if tool_choice not in ("auto", "none"):
        return Endings(_checked(calls, limits), free_answer=False)
    bindings = calls if answer is None else [*calls, answer]
    return Endings(_checked(bindings, limits), free_answer=answer is None)


def _read_format(value: Mapping[str, Any] | None, limits: GrammarLimits) -> Binding | None:
    if value is None:
        return None
    kind = _field("response_format", value, "type", str)
    if kind == "text":
        return None
    if kind == "json_object":
        return _bind("response_format", None, _ANY_OBJECT, False, limits)
    if kind != "json_schema":
        raise GrammarError(
            f'response_format.type is {kind!r}, expected "text", "json_object" or "json_schema"'
        )
    content = _field("response_format", value, "json_schema", Mapping)
    schema = _field("response_format.json_schema", content, "schema", Mapping)
    where = "response_format.json_schema.schema"
    return _bind(where, None, schema, _is_strict("response_format.json_schema", content), limits)


def _read_tools(
    tools: Sequence[Mapping[str, Any]], limits: GrammarLimits
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """By name: where the function stands in the request, and the function."""
    if len(tools) > limits.tools:
        raise GrammarError(f"tools has {len(tools)} entries, at most {limits.tools} are allowed")
    functions: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if _field(where, tool, "type", str) != "function":
            raise GrammarError(f'{where}.type is {tool["type"]!r}, expected "function"')
        function = _field(where, tool, "function", Mapping)
        name = _field(f"{where}.function", function, "name", str)
        if not _NAME.fullmatch(name):
            raise GrammarError(
                f"{where}.function.name must be 1 to 64 letters, digits, underscores or dashes"
            )
        if name in functions:
            raise GrammarError(f"{where}.function.name is {name!r}, as in a tool before it")
        _is_strict(f"{where}.function", function)
        functions[name] = (f"{where}.function", function)
    return functions


def _read_choice(
    choice: str | Mapping[str, Any], functions: dict[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The functions that may be called."""
    if choice == "none":
        return {}
    if choice == "auto":
        return functions
    if choice == "required":
        if not functions:
            raise GrammarError('tool_choice is "required", but tools is empty')
        return functions
    if not isinstance(choice, Mapping):
        raise GrammarError(
            f'tool_choice is {choice!r}, expected "none", "auto", "required" or a function'
        )
    if _field("tool_choice", choice, "type", str) != "function":
        raise GrammarError(f'tool_choice.type is {choice["type"]!r}, expected "function"')
    function = _field("tool_choice", choice, "function", Mapping)
    name = _field("tool_choice.function", function, "name", str)
    if name not in functions:
        raise GrammarError(f"tool_choice.function.name is {name[:64]!r}, which tools does not have")
    return {name: functions[name]}


def _call(where: str, function: Mapping[str, Any], limits: GrammarLimits) -> Binding:
    parameters = function.get("parameters")
    where = f"{where}.parameters"
    if parameters is None:
        parameters = _NO_ARGUMENTS
    if not isinstance(parameters, Mapping):
        raise GrammarError(f"{where} must be an object, not {type(parameters).__name__}")
    if parameters.get("type", "object") != "object":
        raise GrammarError(f'{where}.type is {parameters["type"]!r}, expected "object"')
    strict = bool(function.get("strict"))
    return _bind(where, function["name"], {**_ANY_OBJECT, **parameters}, strict, limits)


def _bind(
    where: str,
    function: str | None,
    schema: Mapping[str, Any],
    strict: bool,
    limits: GrammarLimits,
) -> Binding:
    # The options go into the schema, in place of any that a request brings.
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": not strict}
    text = check_schema(where, {**schema, "x-guidance": options}, limits)
    return Binding(where, function, text)


def _checked(bindings: Sequence[Binding], limits: GrammarLimits) -> tuple[Binding, ...]:
    n_bytes = sum(len(binding.schema.encode()) for binding in bindings)
    if n_bytes > limits.schema_bytes:
        raise GrammarError(
            f"the schemas have {n_bytes} bytes together, at most {limits.schema_bytes} are allowed"
        )
    return tuple(bindings)


def _is_strict(where: str, value: Mapping[str, Any]) -> bool:
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise GrammarError(f"{where}.strict must be true or false")
    return bool(strict)


def _field(where: str, value: object, name: str, kind: type) -> Any:
    if not isinstance(value, Mapping):
        raise GrammarError(f"{where} must be an object, not {type(value).__name__}")
    field = value.get(name)
    if not isinstance(field, kind):
        expected = "a string" if kind is str else "an object"
        raise GrammarError(f"{where}.{name} must be {expected}")
    return field
