"""Answers taken apart, token by token: as the format has them, and as models get them wrong."""

import random
import re

import pytest
from gptoss.harmony import AssistantMessage, Delta, Harmony, StreamParser, ToolCall
from harmony_text import call, final, thought, tokens_of
from o200k import SPECIAL_TOKENS

START = "<|start|>assistant"
CONTROL = sorted(SPECIAL_TOKENS.values())


def parse(parser: StreamParser, tokens: list[int]) -> tuple[AssistantMessage, list[Delta]]:
    """The answer; its deltas joined must be the same."""
    deltas = [delta for token in tokens for delta in parser.push(token)] + parser.finish()
    assert parser.finish() == []
    message = parser.message
    calls: list[ToolCall] = []
    for delta in deltas:
        assert delta.text or delta.name
        if delta.kind == "tool_call":
            if delta.name is not None:
                assert delta.index == len(calls) and re.fullmatch("call_[0-9a-f]{24}", delta.id)
                calls.append(ToolCall(delta.id, delta.name, ""))
            assert delta.index == len(calls) - 1
            last = calls[-1]
            calls[-1] = ToolCall(last.id, last.name, last.arguments + delta.text)
        else:
            assert delta.name is None and delta.id is None
    assert calls == message.tool_calls
    for kind, text in (("reasoning", message.reasoning), ("content", message.content)):
        assert "".join(delta.text for delta in deltas if delta.kind == kind) == text
    return message, deltas


def parts(harmony: Harmony, text: str, tools: list[str] | None = None) -> tuple:
    """(reasoning, content, [(name, arguments)]) of an answer with control tokens by name."""
    tokens = tokens_of(harmony.tokenizer, text)
    message, _ = parse(harmony.parser(tools), tokens)
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return message.reasoning, message.content, calls


WELL_FORMED = [
    (thought("Hm.") + final("4."), ("Hm.", "4.", [])),
    (final("4."), ("", "4.", [])),
    (thought("Hm.") + call("f", '{"x": 1}'), ("Hm.", "", [("f", '{"x": 1}')])),
    # The recipient in the role's place, with and without a content type.
    (
        " to=functions.get_it<|channel|>commentary json<|message|>{}<|call|>",
        ("", "", [("get_it", "{}")]),
    ),
    (" to=functions.f<|channel|>commentary<|message|>{}<|call|>", ("", "", [("f", "{}")])),
    # A preamble is for the user.
    (
        thought("Plan.")
        + f"<|channel|>commentary<|message|>I look.<|end|>{START}"
        + call("f", "{}"),
        ("Plan.", "I look.", [("f", "{}")]),
    ),
    # Several calls, each ended as a message.
    (
        call("f", '{"a": 1}').replace("<|call|>", f"<|end|>{START}") + call("g", '{"b": 2}'),
        ("", "", [("f", '{"a": 1}'), ("g", '{"b": 2}')]),
    ),
    (thought("One.") + thought("Two.") + final("3"), ("One.\n\nTwo.", "3", [])),
    (thought("🦙é") + final("漢字 🦙\n"), ("🦙é", "漢字 🦙\n", [])),
    (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|><|call|>",
        ("", "", [("f", "{}")]),
    ),
    ("", ("", "", [])),
]


@pytest.mark.parametrize(("text", "expected"), WELL_FORMED)
def test_well_formed(harmony: Harmony, text: str, expected: tuple) -> None:
    assert parts(harmony, text) == expected


MALFORMED = {
    "no header at all": ("The user said hello.", ("", "The user said hello.", [])),
    "no header, a control token at the end": ("Hi<|return|>", ("", "Hi", [])),
    "a long answer without a header": ("word " * 500, ("", "word " * 500, [])),
    "no channel": ("<|message|>Hi<|return|>", ("", "Hi", [])),
    "no message token": ("<|channel|>final Hello there<|return|>", ("", "Hello there", [])),
    "no message token in reasoning": (
        "<|channel|>analysis We think" + "<|end|>" + START + final("Hi"),
        ("We think", "Hi", []),
    ),
    "no message token in a call": (
        '<|channel|>commentary to=functions.f <|constrain|>json{"a": 1}<|call|>',
        ("", "", [("f", '{"a": 1}')]),
    ),
    "text behind the end": (thought("Hm.").removesuffix(START) + "So: 4.", ("Hm.", "So: 4.", [])),
    "text behind the last end": (
        "<|channel|>final<|message|>4.<|end|>And 5.<|return|>",
        ("", "4.\n\nAnd 5.", []),
    ),
    "a header without its start": (
        "<|channel|>analysis<|message|>Hm.<|end|>" + final("4."),
        ("Hm.", "4.", []),
    ),
    "a header with its role but no start": (
        "<|channel|>analysis<|message|>Hm.<|end|>assistant" + final("4."),
        ("Hm.", "4.", []),
    ),
    "a start where the end should be": (
        f"<|channel|>analysis<|message|>Hm.{START}{final('4.')}",
        ("Hm.", "4.", []),
    ),
    "a channel where the end should be": (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>4.<|return|>",
        ("Hm.", "4.", []),
    ),
    "role and channel in one": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistantfinal<|message|>4.<|return|>",
        ("Hm.", "4.", []),
    ),
    "two starts": (
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>{START}{final('4.')}",
        ("Hm.", "4.", []),
    ),
    "a role in front": ("assistant" + final("4."), ("", "4.", [])),
    "an unknown channel": ("<|channel|>thoughts<|message|>Hi<|return|>", ("", "Hi", [])),
    "an empty channel": ("<|channel|><|message|>Hi<|return|>", ("", "Hi", [])),
    "words in the header": (
        "<|channel|>final Here you are:<|message|>4.<|return|>",
        ("", " Here you are:4.", []),
    ),
    "two channels": ("<|channel|>analysis<|channel|>final<|message|>4.<|return|>", ("", "4.", [])),
    "endoftext in the content": ("<|channel|>final<|message|>4.<|endoftext|>", ("", "4.", [])),
    "endoftext in the header": ("<|channel|>final<|endoftext|>", ("", "", [])),
    "endoftext at once": ("<|endoftext|>", ("", "", [])),
    "control tokens in the content": (
        "<|channel|>final<|message|>a<|constrain|>b<|message|>c<|startoftext|>d<|return|>",
        ("", "abcd", []),
    ),
    "a constrained answer": (
        "<|channel|>final <|constrain|>json<|message|>{}<|return|>",
        ("", "{}", []),
    ),
    "a constrain token in front of a recipient": (
        "<|channel|>commentary <|constrain|>json to=functions.f<|message|>{}<|call|>",
        ("", "", [("f", "{}")]),
    ),
    "a bare recipient": (
        "<|channel|>commentary functions.f json<|message|>{}<|call|>",
        ("", "", [("f", "{}")]),
    ),
    "a call in the wrong channel": (
        "<|channel|>analysis to=functions.f <|constrain|>json<|message|>{}<|call|>",
        ("", "", [("f", "{}")]),
    ),
    "arguments cut off": (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": [1,',
        ("", "", [("f", '{"a": [1,')]),
    ),
    "a call cut off before its arguments": (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        ("", "", [("f", "")]),
    ),
    "a call without a message": (
        "<|channel|>commentary to=functions.f<|call|>",
        ("", "", [("f", "{}")]),
    ),
    "a header cut off": ("<|channel|>commentary to=functions.get_wea", ("", "", [])),
    "arguments that are no JSON": (call("f", "x = 1\n"), ("", "", [("f", "x = 1\n")])),
    "a built-in tool": (
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        ("print(1)", "", []),
    ),
    "a built-in tool in commentary": (
        "<|channel|>commentary to=browser.search json<|message|>{}<|call|>",
        ("", "{}", []),
    ),
    "no name of a function": (
        "<|channel|>commentary to=functions<|message|>{}<|call|>",
        ("", "{}", []),
    ),
    "nobody's function": (
        "<|channel|>commentary to=functions.<|message|>{}<|call|>",
        ("", "{}", []),
    ),
    "to the user": ("<|channel|>commentary to=user<|message|>Hi<|end|>", ("", "Hi", [])),
    "the user's next message": (
        "<|channel|>final<|message|>4.<|end|><|start|>user<|message|>And 5?<|end|>"
        + START
        + final("5."),
        ("And 5?", "4.\n\n5.", []),
    ),
    "a tool's result made up": (
        call("f", "{}")
        + "<|start|>functions.f to=assistant<|channel|>commentary<|message|>12<|end|>"
        + START
        + final("12."),
        ("12", "12.", [("f", "{}")]),
    ),
    "words that look like a role": (
        "user interface design is",
        ("", "user interface design is", []),
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(harmony: Harmony, case: str) -> None:
    text, expected = MALFORMED[case]
    assert parts(harmony, text) == expected


def test_tools_that_may_be_called(harmony: Harmony) -> None:
    """With the tools named, a message to another is text, and one to a known name is a call."""
    tools = ["f", "python"]
    assert parts(harmony, call("f", "{}"), tools) == ("", "", [("f", "{}")])
    assert parts(harmony, call("g", "{}"), tools) == ("", "{}", [])
    assert parts(harmony, call("f", "{}"), []) == ("", "{}", [])
    for recipient in ("python", "functions.python"):
        text = f"<|channel|>analysis to={recipient} code<|message|>1<|call|>"
        assert parts(harmony, text, tools) == ("", "", [("python", "1")])


def test_streams_as_it_comes(harmony: Harmony) -> None:
    """Each token of a message's text is a delta of its own; nothing waits for the message's end."""
    parser = harmony.parser()
    for token in tokens_of(harmony.tokenizer, "<|channel|>analysis<|message|>"):
        assert parser.push(token) == []
    for token in harmony.tokenizer.encode("One two three"):
        assert parser.push(token) == [Delta("reasoning", harmony.tokenizer.decode([token]))]
    assert parser.message.reasoning == "One two three"
    for token in tokens_of(
        harmony.tokenizer, "<|end|><|start|>assistant<|channel|>commentary to=functions.f"
    ):
        assert parser.push(token) == []
    (first,) = parser.push(SPECIAL_TOKENS["<|message|>"])
    assert (first.kind, first.text, first.index, first.name) == ("tool_call", "", 0, "f")
    assert parser.push(harmony.tokenizer.encode("{")[0]) == [Delta("tool_call", "{")]


def test_an_answer_without_a_header_does_not_wait_for_its_end(harmony: Harmony) -> None:
    parser = harmony.parser()
    tokens = harmony.tokenizer.encode("word " * 100)
    assert sum(bool(parser.push(token)) for token in tokens) > 30


def test_characters_in_several_tokens(harmony: Harmony) -> None:
    """However the bytes are cut into tokens: whole characters only, and U+FFFD for broken ones."""
    tokenizer = harmony.tokenizer
    of_byte = {tokenizer.token_bytes(token): token for token in range(256)}
    text = "é漢🦙"
    tokens = [of_byte[bytes((byte,))] for byte in text.encode()]
    begin = tokens_of(tokenizer, "<|channel|>final<|message|>")
    message, deltas = parse(harmony.parser(), begin + tokens)
    assert [delta.text for delta in deltas] == list(text) and message.content == text
    message, _ = parse(harmony.parser(), [*begin, *tokens[:-1], SPECIAL_TOKENS["<|return|>"]])
    assert message.content == "é漢\ufffd"
    message, _ = parse(harmony.parser(), [*begin, *tokens[:-1]])
    assert message.content == "é漢\ufffd"


def random_answer(rng: random.Random) -> tuple[str, list[tuple[str, str | None, str]]]:
    """A well-formed answer, and its messages: (channel, recipient, text)."""
    messages = []
    for _ in range(rng.randint(1, 4)):
        text = "".join(rng.choices("ab {}\"'\n🦙é漢<|>:", k=rng.randint(1, 30)))
        kind = rng.choice(["analysis", "commentary", "final", "call"])
        recipient = f"functions.f{rng.randint(0, 9)}" if kind == "call" else None
        messages.append(("commentary" if recipient else kind, recipient, text))
    written = []
    for channel, recipient, text in messages:
        to = f" to={recipient}" if recipient else ""
        form = " <|constrain|>json" if recipient else ""
        before = rng.random() < 0.5
        header = f"{to}<|channel|>{channel}{form}" if before else f"<|channel|>{channel}{to}{form}"
        written.append(f"{header}<|message|>{text}")
    return f"<|end|>{START}".join(written) + "<|return|>", messages


@pytest.mark.parametrize("seed", range(50))
def test_as_openai_harmony_parses(harmony: Harmony, seed: int) -> None:
    """On well-formed answers, message by message."""
    from openai_harmony import Role

    text, messages = random_answer(random.Random(seed))
    tokens = tokens_of(harmony.tokenizer, text)
    encoding = harmony._encoding
    parsed = encoding.parse_messages_from_completion_tokens(tokens, Role.ASSISTANT)
    found = [(m.channel, m.recipient, "".join(c.text for c in m.content)) for m in parsed]
    assert found == messages
    message, _ = parse(harmony.parser(), tokens)
    assert message.reasoning == "\n\n".join(t for c, _, t in messages if c == "analysis")
    assert message.content == "\n\n".join(t for c, r, t in messages if c != "analysis" and not r)
    calls = [(r, t if t.strip() else t + "{}") for _, r, t in messages if r]
    assert [(f"functions.{c.name}", c.arguments) for c in message.tool_calls] == calls


@pytest.mark.parametrize("seed", range(100))
def test_random_tokens(harmony: Harmony, seed: int) -> None:
    """No sequence of tokens is an error: 1000 in each, of all kinds, cut and mixed."""
    rng = random.Random(seed)
    words = [
        harmony.tokenizer.encode(text)[0] for text in ("assistant", "analysis", "final", "json")
    ]
    words += harmony.tokenizer.encode(' to=functions.f user commentary {"a": 1}')
    outside = [-1, 2**31, 2**32, 2**70, 201087, 201088, 199998, 200013]
    kinds = [lambda: rng.choice(CONTROL), lambda: rng.choice(words), lambda: rng.randrange(199998)]
    kinds.append(lambda: rng.choice(outside))
    weights = [rng.random() for _ in kinds]
    tokens = [kind() for kind in rng.choices(kinds, weights, k=1000)]
    message, _ = parse(harmony.parser(rng.choice([None, [], ["f"]])), tokens)
    texts = [message.reasoning, message.content, *(c.arguments for c in message.tool_calls)]
    assert not any(name in text for name in SPECIAL_TOKENS for text in texts)


@pytest.mark.parametrize("seed", range(100))
def test_mutated_answers(harmony: Harmony, seed: int) -> None:
    """Well-formed answers with tokens lost, doubled, moved or replaced: no error, and the same
    whatever was parsed before."""
    rng = random.Random(seed)
    tokens = tokens_of(harmony.tokenizer, random_answer(rng)[0])
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(tokens))
        change = rng.choice(["lose", "double", "control", "cut"])
        if change == "lose":
            del tokens[place]
        elif change == "double":
            tokens.insert(place, tokens[place])
        elif change == "control":
            tokens[place] = rng.choice(CONTROL)
        else:
            del tokens[place + 1 :]
        tokens = tokens or [SPECIAL_TOKENS["<|end|>"]]
    parse(harmony.parser(), tokens)
