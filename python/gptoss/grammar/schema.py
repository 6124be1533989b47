"""What a JSON Schema must keep to before it is compiled.

Schemas come from strangers. The compiler recurses over them on the native stack, through references
too, so depth is bounded here; and it takes a schema that no finite text fulfils, from which a model
could never get out again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

JsonSchema = Mapping[str, Any]


class GrammarError(ValueError):
    """A response format, tool or schema that cannot be enforced; the message names it."""


@dataclass(frozen=True)
class GrammarLimits:
    """Bounds on one request's schemas.

    Attributes:
        schema_bytes: all schemas of a request together, as JSON in UTF-8.
        depth: arrays and objects within each other, as JSON; a nested object takes two.
        references: different `$ref`.
        reference_depth: depths of their targets together: the farthest that the compiler can
            recurse through references.
        string_length: characters of one property name, value or pattern. A mask costs time in
            proportion to it.
        multiples: all `multipleOf` of a schema together, without decimal point: the lexer takes as
            many states.
        tools: number of tools.
        seconds: wall clock for compiling one request's grammar.
    """

    schema_bytes: int = 128 * 1024
    depth: int = 64
    references: int = 256
    reference_depth: int = 1024
    string_length: int = 8192
    multiples: int = 20_000
    tools: int = 128
    seconds: float = 2.0


def check_schema(where: str, schema: JsonSchema, limits: GrammarLimits) -> str:
    """Checks a schema against the limits, and that some finite value fulfils it.

    Returns:
        The schema as JSON.

    Raises:
        GrammarError: names `where`, the schema's place in the request.
    """
    references = set()
    multiples = 0
    for value, depth in _walk(schema):
        if depth > limits.depth:
            raise GrammarError(f"{where} is nested more than {limits.depth} levels deep")
        if isinstance(value, str) and len(value) > limits.string_length:
            raise GrammarError(
                f"{where} holds a string of {len(value)} characters, at most "
                f"{limits.string_length} are allowed"
            )
        if isinstance(value, Mapping):
            if isinstance(value.get("$ref"), str):
                references.add(value["$ref"])
            multiples += _digits(value.get("multipleOf"))
    if multiples > limits.multiples:
        raise GrammarError(
            f"{where} has multipleOf with digits of {multiples} together, at most "
            f"{limits.multiples} are allowed"
        )
    text = _to_json(where, schema, limits)
    targets = {name: _resolve(schema, name) for name in sorted(references)}
    _check_references(where, schema, targets, limits)
    if not _is_finite(schema, _finite_references(targets)):
        raise GrammarError(f"{where} is not fulfilled by any finite value: it requires itself")
    return text


def _to_json(where: str, schema: JsonSchema, limits: GrammarLimits) -> str:
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        n_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"{where} holds a lone surrogate, which is no character") from None
    except (TypeError, ValueError) as error:
        raise GrammarError(f"{where} is not JSON: {error}") from None
    if n_bytes > limits.schema_bytes:
        raise GrammarError(f"{where} has {n_bytes} bytes, at most {limits.schema_bytes} allowed")
    return text


def _digits(number: object) -> int:
    """A number without its sign and decimal point: 15 of -1.5; 0 of what is no finite number."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 0
    if isinstance(number, int):
        return abs(number)
    digits = Decimal(repr(number)).as_tuple().digits if math.isfinite(number) else ()
    return int("".join(map(str, digits)) or "0")


def _walk(root: object) -> Iterator[tuple[object, int]]:
    """Every value and key under `root` with how many containers it is in, without recursion."""
    stack = [(root, 0)]
    while stack:
        value, depth = stack.pop()
        yield value, depth
        if isinstance(value, Mapping):
            stack.extend((item, depth + 1) for pair in value.items() for item in pair)
        elif isinstance(value, list | tuple):
            stack.extend((item, depth + 1) for item in value)


def _resolve(root: JsonSchema, reference: str) -> object:
    """What a JSON pointer such as "#/$defs/node" leads to, True (anything) if nowhere.

    The compiler refuses references that it cannot resolve.
    """
    value: object = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part == "":
            continue
        if isinstance(value, list | tuple):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if not isinstance(value, Mapping) or part not in value:
            return True
        value = value[part]
    return value


def _check_references(
    where: str, root: JsonSchema, targets: Mapping[str, object], limits: GrammarLimits
) -> None:
    if len(targets) > limits.references:
        raise GrammarError(
            f"{where} refers to {len(targets)} places, at most {limits.references} are allowed"
        )
    heights: dict[int, int] = {}
    _measure(root, heights)
    if sum(heights.get(id(target), 1) for target in targets.values()) > limits.reference_depth:
        raise GrammarError(
            f"{where} could nest more than {limits.reference_depth} levels deep by its references"
        )


def _measure(value: object, heights: dict[int, int]) -> int:
    """How many containers are within each other in `value`; `heights` has it by id for all."""
    if isinstance(value, Mapping):
        items: list[object] = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        return 0
    heights[id(value)] = 1 + max((_measure(item, heights) for item in items), default=0)
    return heights[id(value)]


def _finite_references(targets: Mapping[str, object]) -> set[str]:
    """The references that some finite value fulfils: the least fixed point, found by rounds."""
    finite: set[str] = set()
    left = list(targets)
    while True:
        n_before = len(left)
        for name in left:
            if _is_finite(targets[name], finite):
                finite.add(name)
        left = [name for name in reversed(left) if name not in finite]
        if len(left) == n_before:
            return finite


def _is_finite(schema: object, finite: set[str]) -> bool:
    """Whether a finite value can fulfil `schema`, given the references that one can fulfil.

    Only what forces nesting is looked at: references, combinations, required properties and items.
    """
    if not isinstance(schema, Mapping):
        return True
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
        return False
    if not all(_is_finite(part, finite) for part in _list(schema.get("allOf"))):
        return False
    for key in ("anyOf", "oneOf"):
        options = _list(schema.get(key))
        if options and not any(_is_finite(part, finite) for part in options):
            return False
    if schema.get("type") == "object":
        properties = schema.get("properties")
        required = [name for name in _list(schema.get("required")) if isinstance(name, str)]
        if isinstance(properties, Mapping):
            return all(_is_finite(properties.get(name), finite) for name in required)
    if schema.get("type") == "array":
        first = [*_list(schema.get("prefixItems")), schema.get("items")][0]
        at_least = schema.get("minItems")
        return not (isinstance(at_least, int) and at_least > 0) or _is_finite(first, finite)
    return True


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []
