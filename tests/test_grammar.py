"""Structured output: whatever is drawn under the masks is harmony with valid JSON in its place.

Walks draw any allowed token; those that end something are drawn more often, or a walk would hardly
ever end.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest
from gptoss import Model, SamplingParams
from gptoss.grammar import GrammarCompiler, GrammarError
from gptoss.tokenizer import Tokenizer
from grammar_cases import (
    ARGUMENTS,
    PERSON,
    SCHEMAS,
    TOOLS,
    TREE,
    Schema,
    Walk,
    an_object,
    closing_tokens,
    function,
    json_schema,
    named,
)

if TYPE_CHECKING:
    from gptoss.harmony import Harmony


@pytest.fixture(scope="module")
def tokenizer(tiny_path: Path) -> Tokenizer:
    return Tokenizer.from_file(tiny_path / "tokenizer.json")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=600)  # more logits than tokens, as in the true one


Walker = Callable[..., Walk]


@pytest.fixture
def walk(tokenizer: Tokenizer, compiler: GrammarCompiler) -> Walker:
    def walk(seed: int, *fields: Any, **more: Any) -> Walk:
        constraint = compiler.harmony(*fields, **more)
        assert constraint is not None
        return Walk(tokenizer, constraint, seed).run()

    return walk


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
