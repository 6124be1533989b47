"""Structured output: what is refused, and what ends a generation."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from gptoss import SamplingParams
from gptoss.grammar import GrammarCompiler, GrammarError, GrammarLimits
from gptoss.tokenizer import Tokenizer
from grammar_cases import PERSON, TOOLS, Schema, Walk, an_object, function, json_schema, named
from harmony_text import tokens_of
from server_tools import exchange, scripted


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_path / "tokenizer.json")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, limits=GrammarLimits(seconds=60))  # on a busy machine, too


def test_strict_is_to_the_letter(compiler: GrammarCompiler) -> None:
    schema = an_object(a={"not": {"type": "string"}})
    with pytest.raises(GrammarError, match=r"json_schema\.schema cannot be enforced.*not"):
        compiler.harmony(json_schema(schema))
    assert compiler.harmony(json_schema(schema, strict=False)) is not None
    with pytest.raises(GrammarError, match=r"tools\[1\]\.function\.parameters.*not"):
        compiler.harmony(None, [TOOLS[0], function("f", schema, strict=True)])


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chain(length: int, **more: Any) -> Schema:
    """Each definition refers to the next."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **more} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def test_deepest_schemas_compile(compiler: GrammarCompiler) -> None:
    """The compiler recurses on the native stack: what the limits allow must not overflow it."""
    link = {"$ref": "#/$defs/d{}"}
    for _ in range(28):
        link = {"allOf": [link]}
    text = json.dumps(link)
    deep = {f"d{i}": json.loads(text.replace("{}", str(i + 1))) for i in range(17)}
    schemas = (nested(62), chain(255), {"$defs": {**deep, "d17": {}}, "$ref": "#/$defs/d0"})
    for schema in schemas:
        assert compiler.harmony(json_schema(schema)) is not None


HOSTILE = {
    "not an object": ([1], "must be an object"),
    "deep": (nested(3000), "nested more than 64"),
    "deep dictionary": (nested(33) | {"x": {"a": nested(63)}}, "nested more than 64"),
    "chain": (chain(3000), "at most 256 are allowed"),
    "deep chain": (chain(200, x=nested(7)), "nest more than 1024"),
    "large": ({"enum": [f"value {i}" for i in range(20000)]}, "bytes, at most 131072"),
    "long string": ({"const": "x" * 9000}, "string of 9000 characters"),
    "long key": (an_object(**{"x" * 9000: {}}), "string of 9000 characters"),
    "surrogate": ({"const": "\ud800"}, "surrogate"),
    "nan": ({"type": "number", "minimum": float("nan")}, "not JSON"),
    "infinite": (
        {"$defs": {"n": an_object(c={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"},
        "not fulfilled by any finite value",
    ),
    "itself": ({"$ref": "#"}, "not fulfilled by any finite value"),
    "ring": (an_object(a={"allOf": [{"$ref": "#"}]}), "not fulfilled by any finite value"),
    "items": ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "finite value"),
    "unknown type": ({"type": "strin"}, "Invalid type"),
    "wrong keyword": ({"type": "object", "properties": [1]}, "properties must be"),
    "contradiction": ({"type": "string", "minLength": 5, "maxLength": 2}, "cannot be enforced"),
    "file": ({"$ref": "file:///etc/passwd"}, "cannot be enforced"),
    "parentheses": ({"type": "string", "pattern": "(" * 4000 + ")" * 4000}, "cannot be enforced"),
    "product": (
        {"allOf": [{"anyOf": [an_object(**{f"{i}{j}": {}}) for i in range(6)]} for j in range(8)]},
        "schema too large",
    ),
    "multiple": (an_object(a={"type": "integer", "multipleOf": 99991}), "multipleOf"),
    "multiples": (
        an_object(**{f"p{i}": {"type": "number", "multipleOf": 99.91 + i} for i in range(3)}),
        "multipleOf with digits of 30273",
    ),
    "product of multiples": (
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (997, 991, 983)]},
        "cannot be enforced",
    ),
    "options": (
        {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2500)}},
        "cannot be enforced",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("strict", [True, False])
def test_hostile_schemas(compiler: GrammarCompiler, name: str, strict: bool) -> None:
    schema, message = HOSTILE[name]
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.harmony(json_schema(schema, strict))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_options_of_the_compiler_are_not_for_requests(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    schema = {**PERSON, "x-guidance": {"lenient": True, "item_separator": ";"}}
    constraint = compiler.harmony(json_schema(schema))
    assert constraint is not None
    _, text = Walk(tokenizer, constraint, 1).run().messages()[-1]
    jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (({"type": "xml"},), r"response_format\.type is 'xml'"),
        (({},), r"response_format\.type must be a string"),
        (({"type": "json_schema"},), r"response_format\.json_schema must be an object"),
        (({"type": "json_schema", "json_schema": {}},), r"json_schema\.schema must be an object"),
        ((json_schema({}, strict=1),), r"json_schema\.strict must be true or false"),
        ((None, [{"type": "function"}]), r"tools\[0\]\.function must be an object"),
        ((None, [function("a b")]), r"tools\[0\]\.function\.name must be 1 to 64"),
        ((None, [function("a"), function("a")]), r"tools\[1\]\.function\.name is 'a'"),
        ((None, [function("f")] * 129), "tools has 129 entries"),
        ((None, TOOLS, "sometimes"), "tool_choice is 'sometimes'"),
        ((None, TOOLS, named("nobody")), r"tool_choice\.function\.name is 'nobody'"),
        ((None, [], "required"), "tools is empty"),
        ((None, [function("f", {"type": "array"})], "required"), r"parameters\.type is 'array'"),
        (
            (None, [function(f"f{i}", {"const": "x" * 8000}) for i in range(20)], "required"),
            "bytes together",
        ),
    ],
)
def test_bad_fields(compiler: GrammarCompiler, fields: tuple[Any, ...], message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        compiler.harmony(*fields)


def test_compile_time_is_bounded(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, limits=GrammarLimits(seconds=0.05))
    done = threading.Event()
    compiler._worker.submit(done.wait)  # as if another schema took long
    try:
        with pytest.raises(GrammarError, match=r"json_schema\.schema took more than 0\.05 s"):
            compiler.harmony(json_schema(PERSON))
    finally:
        done.set()


def test_tokenizer_without_harmony(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    tokenizer = Tokenizer(Backend(models.BPE()))
    with pytest.raises(ValueError, match=r"no special token <\|start\|>"):
        GrammarCompiler(tokenizer)


TOO_COMPLEX = an_object(a={"type": "string", "pattern": r"^(\p{L}|\p{N}|\w){1,10000}$"})


def letters(tokenizer: Tokenizer, n_tokens: int) -> list[int]:
    """Tokens of a text of letters that does not repeat itself."""
    choose = random.Random(1).choice
    return tokenizer.encode("".join([choose("abcdefghijklmnop") for _ in range(4 * n_tokens)]))


def test_parser_limits_end_one_generation(tokenizer: Tokenizer) -> None:
    """A schema that outgrows the parser while it is written ends its own generation only."""
    said = tokens_of(tokenizer, '<|channel|>final<|message|>{"a":"')
    said += letters(tokenizer, 3000)
    model = scripted(lambda _: said, tokenizer).model
    compiler = GrammarCompiler(tokenizer, model.config.vocab_size)
    params = SamplingParams(max_new_tokens=3000, temperature=0)
    bound = model.engine.submit(
        model.request([1], params, constraint=compiler.harmony(json_schema(TOO_COMPLEX)))
    )
    free = model.engine.submit(model.request([2], params))
    while free.finish_reason is None:
        model.engine.step()
    assert free.finish_reason == "length"
    assert bound.finish_reason == "error"
    assert isinstance(bound.error, GrammarError)
    assert str(bound.error).startswith("the grammar cannot go on")


def test_parser_limits_are_the_clients_error(harmony_path: Path) -> None:
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    said = tokens_of(tokenizer, '<|channel|>final<|message|>{"a":"')
    said += letters(tokenizer, 3000)
    body = {
        "messages": [{"role": "user", "content": "?"}],
        "response_format": json_schema(TOO_COMPLEX),
    }
    app = scripted(lambda _: said, tokenizer).app
    response = exchange(app, lambda client: client.post("/v1/chat/completions", json=body))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "schema_too_complex"
