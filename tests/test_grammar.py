"""Structured output: whatever is drawn under the masks is harmony with valid JSON in its place.

Walks draw any allowed token; those that end something are drawn more often, or a walk would hardly
ever end.
"""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest
from gptoss import Model, SamplingParams
from gptoss.grammar import GrammarCompiler, GrammarConstraint, GrammarError, GrammarLimits
from gptoss.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gptoss.harmony import Harmony

Schema = dict[str, Any]


def an_object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PERSON = an_object(
    name={"type": "string"},
    age={"type": "integer", "minimum": 0, "maximum": 150},
    tags={"type": "array", "items": {"enum": ["a", "b", 'c"\\']}, "maxItems": 3},
)
TREE = {
    "$defs": {
        "node": an_object(
            value={"type": ["number", "null"]},
            children={"type": "array", "items": {"$ref": "#/$defs/node"}},
        )
    },
    "$ref": "#/$defs/node",
}
ORDER = an_object(
    id={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    when={"type": "string", "format": "date"},
    item={"anyOf": [an_object(kind={"const": "a"}), an_object(kind={"const": "b"}, n=PERSON)]},
    text={"type": "string", "maxLength": 12},
)
INJECTION = an_object(**{'"} \n start: /.*/ ': {"const": "\n%json {} <[1]> <|return|>"}})
SCHEMAS = {"person": PERSON, "tree": TREE, "order": ORDER, "injection": INJECTION}


def function(name: str, parameters: Schema | None = None, strict: bool | None = None) -> Schema:
    content = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {k: v for k, v in content.items() if v is not None}}


def named(name: str) -> Schema:
    return {"type": "function", "function": {"name": name}}


def json_schema(schema: Any, strict: Any = True) -> Schema:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


TOOLS = [
    function("get", PERSON, strict=True),
    function("get_weather", an_object(city={"type": "string"})),
    function("now"),
]
ARGUMENTS = {"get": PERSON, "get_weather": an_object(city={"type": "string"}), "now": an_object()}


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_path / "tokenizer.json")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=600)  # more logits than tokens, as in the true one


class Walk:
    """Draws a turn at random under its masks, and takes it apart by its special tokens."""

    def __init__(self, tokenizer: Tokenizer, constraint: GrammarConstraint, seed: int) -> None:
        self.tokenizer = tokenizer
        self.constraint = constraint
        self.random = random.Random(seed)
        ends = ("<|return|>", "<|call|>")
        self.last = {id: name for name in ends if (id := tokenizer.token_id(name)) is not None}
        self.closing = closing_tokens(tokenizer)
        self.tokens: list[int] = []

    def allowed(self) -> np.ndarray:
        mask = self.constraint.mask()
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))

    def run(self, limit: int = 4000) -> "Walk":
        while not self.tokens or self.tokens[-1] not in self.last:
            allowed = self.allowed()
            assert len(allowed) > 0, self.tokenizer.decode(self.tokens)
            closing = [token for token in self.closing if token in allowed]
            choices = closing if closing and self.random.random() < 0.5 else allowed
            token = int(self.random.choice(choices))
            self.constraint.accept(token)
            self.tokens.append(token)
            assert len(self.tokens) < limit, self.tokenizer.decode(self.tokens)
        return self

    def messages(self) -> list[tuple[str, str]]:
        """(header, text) of every message; the header of the last without what ends it."""
        end = self.last[self.tokens[-1]]
        text = self.tokenizer.decode(self.tokens).removesuffix(end)
        found = [part.partition("<|message|>") for part in text.split("<|end|><|start|>assistant")]
        return [(header, content) for header, _, content in found]


Walker = Callable[..., Walk]


@pytest.fixture
def walk(tokenizer: Tokenizer, compiler: GrammarCompiler) -> Walker:
    def walk(seed: int, *fields: Any, **more: Any) -> Walk:
        constraint = compiler.harmony(*fields, **more)
        assert constraint is not None
        return Walk(tokenizer, constraint, seed).run()

    return walk


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end something, or lead to an end."""
    names = ("<|end|>", "<|return|>", "<|call|>")
    special = [id for name in names if (id := tokenizer.token_id(name)) is not None]
    return special + [tokenizer.encode(text)[0] for text in ('"', "}", "]", ",")]


def header_of_call(header: str) -> str | None:
    """The function a header calls, however it is written."""
    header = header.removesuffix("<|constrain|>json").removesuffix(" json").strip()
    for before, after in (
        ("<|channel|>commentary to=functions.", ""),
        ("to=functions.", "<|channel|>commentary"),
    ):
        if header.startswith(before) and header.endswith(after):
            return header.removeprefix(before).removesuffix(after)
    return None


def assert_thoughts(messages: list[tuple[str, str]]) -> None:
    assert {header for header, _ in messages} <= {"<|channel|>analysis", "<|channel|>commentary"}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("seed", range(6))
def test_final_channel_is_bound(walk: Walker, name: str, seed: int) -> None:
    *thoughts, (header, text) = walk(seed, json_schema(SCHEMAS[name])).messages()
    assert_thoughts(thoughts)
    assert header.replace(" ", "") in ("<|channel|>final", "<|channel|>final<|constrain|>json")
    jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("seed", range(8))
def test_json_object(walk: Walker, seed: int) -> None:
    _, text = walk(seed, {"type": "json_object"}).messages()[-1]
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("choice", ["required", "get", "get_weather", "now"])
def test_call_is_forced(walk: Walker, choice: str, seed: int) -> None:
    tool_choice = choice if choice == "required" else named(choice)
    walked = walk(seed, json_schema(TREE), TOOLS, tool_choice)  # the format does not let it out
    *thoughts, (header, text) = walked.messages()
    assert_thoughts(thoughts)
    called = header_of_call(header)
    assert called in (["get", "get_weather", "now"] if choice == "required" else [choice])
    assert walked.last[walked.tokens[-1]] == "<|call|>"
    jsonschema.validate(json.loads(text), ARGUMENTS[called])


def test_auto_calls_or_answers(walk: Walker) -> None:
    ends = set()
    for seed in range(30):
        walked = walk(seed, None, TOOLS)
        header, text = walked.messages()[-1]
        ends.add(called := header_of_call(header))
        assert (called is None) == (walked.last[walked.tokens[-1]] == "<|return|>")
        if called == "get":
            jsonschema.validate(json.loads(text), PERSON)
    assert ends == {"get", "get_weather", "now", None}


def test_auto_with_format(walk: Walker) -> None:
    ends = set()
    for seed in range(30):
        header, text = walk(seed, json_schema(PERSON), [function("now")], "auto").messages()[-1]
        ends.add(called := header_of_call(header))
        jsonschema.validate(json.loads(text), PERSON if called is None else an_object())
    assert ends == {"now", None}


@pytest.mark.parametrize("seed", range(8))
def test_none_never_calls(walk: Walker, seed: int) -> None:
    messages = walk(seed, None, TOOLS, "none").messages()
    assert all("functions" not in header for header, _ in messages)
    assert messages[-1][0] == "<|channel|>final"


def test_nothing_to_bind(compiler: GrammarCompiler) -> None:
    assert compiler.harmony() is None
    assert compiler.harmony({"type": "text"}, [], "none") is None
    assert compiler.harmony(None, [function("now", an_object())], "auto") is None


def test_thinking_is_free(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """In the analysis channel every token that is text may come, whatever the schema."""
    constraint = compiler.harmony(json_schema(PERSON))
    assert constraint is not None
    walk = Walk(tokenizer, constraint, 0)
    start = [tokenizer.token_id("<|channel|>"), *tokenizer.encode("analysis")]
    for token in [*start, tokenizer.token_id("<|message|>")]:
        assert token in walk.allowed()
        constraint.accept(token)
    special = tokenizer.special_token_ids
    ascii_tokens = {
        token
        for token in set(range(tokenizer.vocab_size)) - special
        if tokenizer.token_bytes(token).isascii()
    }
    allowed = set(walk.allowed().tolist())
    assert ascii_tokens <= allowed
    assert allowed & special == {tokenizer.token_id("<|end|>")}
    assert max(allowed) < tokenizer.vocab_size
    assert constraint.mask().dtype == np.uint32 and constraint.mask().shape == (19,)


def test_end_is_never_far(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Behind a whole value only its end may come: no text, and no second value."""
    constraint = compiler.harmony(json_schema(an_object(n={"type": "null"})))
    assert constraint is not None
    walk = Walk(tokenizer, constraint, 0)
    tokens = [tokenizer.token_id("<|channel|>"), *tokenizer.encode("final")]
    tokens += [tokenizer.token_id("<|message|>"), *tokenizer.encode('{"n": null}')]
    for token in tokens:
        assert token in walk.allowed()
        constraint.accept(token)
    assert walk.allowed().tolist() == [tokenizer.token_id("<|return|>")]


def test_white_space_is_bounded(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.harmony({"type": "json_object"})
    assert constraint is not None
    walk = Walk(tokenizer, constraint, 0)
    tokens = [tokenizer.token_id("<|channel|>"), *tokenizer.encode("final")]
    for token in [*tokens, tokenizer.token_id("<|message|>"), *tokenizer.encode("{")]:
        constraint.accept(token)
    space = tokenizer.encode("\n")[0]
    n_spaces = 0
    while space in walk.allowed():
        constraint.accept(space)
        n_spaces += 1
    assert n_spaces == 64


def test_refused_token(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.harmony({"type": "json_object"})
    assert constraint is not None
    with pytest.raises(GrammarError, match="cannot go on"):
        constraint.accept(tokenizer.token_id("<|message|>"))


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
    "multiples": (
        {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949)]},
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


def test_options_of_the_compiler_are_not_for_requests(walk: Walker) -> None:
    schema = {**PERSON, "x-guidance": {"lenient": True, "item_separator": ";"}}
    jsonschema.validate(json.loads(walk(1, json_schema(schema)).messages()[-1][1]), PERSON)


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


def test_threads_and_cache(tokenizer: Tokenizer) -> None:
    """Many threads and a cache too small for them: every walk is as it is alone."""
    small_cache = GrammarCompiler(tokenizer, cache_size=2)

    def turn(index: int) -> list[int]:
        name = list(SCHEMAS)[index % len(SCHEMAS)]
        constraint = small_cache.harmony(json_schema(SCHEMAS[name]))
        assert constraint is not None
        return Walk(tokenizer, constraint, index).run().tokens

    found: dict[int, list[int]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: turn(i)})) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: turn(index) for index in range(12)}
    assert len(small_cache._cache) == 2


def test_one_grammar_many_generations(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Constraints of one cached grammar do not move each other."""
    first = compiler.harmony(json_schema(PERSON))
    assert first is not None
    before = first.mask().copy()
    first.accept(tokenizer.token_id("<|channel|>"))
    second = compiler.harmony(json_schema(PERSON))
    assert second is not None
    assert (second.mask() == before).all() and not (first.mask() == before).all()


@pytest.fixture(scope="module")
def true_compiler(harmony_path: Path) -> GrammarCompiler:
    """Over the true vocabulary, of 201,088 ids."""
    return GrammarCompiler(Tokenizer.from_file(harmony_path / "tokenizer.json"), 201088)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SCHEMAS)
def test_true_vocabulary(
    harmony: "Harmony", true_compiler: GrammarCompiler, name: str, seed: int
) -> None:
    """What comes out is what the streaming parser takes apart."""
    tokenizer = true_compiler._tokenizer
    constraint = true_compiler.harmony(json_schema(SCHEMAS[name]), TOOLS)
    assert constraint is not None
    assert constraint.mask().shape == (6284,)
    parser = harmony.parser()
    for token in Walk(tokenizer, constraint, seed).run().tokens:
        parser.push(token)
    parser.finish()
    message = parser.message
    if message.tool_calls:
        (call,) = message.tool_calls
        jsonschema.validate(json.loads(call.arguments), ARGUMENTS[call.name])
    else:
        # A preamble, which is content too, may come before.
        starts = [at for at in range(len(message.content)) if message.content[at] == "{"]
        assert any(is_valid(message.content[at:], SCHEMAS[name]) for at in starts)


def is_valid(text: str, schema: Schema) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


def test_generation(tiny: Model) -> None:
    """Requests with and without a grammar share the steps of a model of random weights."""
    tokenizer = tiny.tokenizer
    assert tokenizer is not None
    compiler = GrammarCompiler(tokenizer, tiny.config.vocab_size)
    start = [tokenizer.token_id("<|start|>"), *tokenizer.encode("assistant")]
    bias = dict.fromkeys(closing_tokens(tokenizer), 8.0)
    requests = []
    for seed in range(8):
        params = SamplingParams(max_new_tokens=600, seed=seed, logit_bias=bias)
        constraint = compiler.harmony(json_schema(PERSON)) if seed % 2 == 0 else None
        requests.append(tiny.request(start, params, constraint=constraint))
    tokens: list[list[int]] = [[] for _ in requests]
    for index, event in tiny.engine.run(requests):
        if event.token is not None:
            tokens[index].append(event.token)
    for found in tokens[::2]:
        assert found[-1] == tokenizer.token_id("<|return|>")
        text = tokenizer.decode(found).rpartition("<|message|>")[2].removesuffix("<|return|>")
        jsonschema.validate(json.loads(text), PERSON)
    assert all("<|message|>{" not in tokenizer.decode(found) for found in tokens[1::2])
