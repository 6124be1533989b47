"""Conversations to tokens: against openai-harmony's own rendering, and the format's text."""

import datetime
import json
import random

import pytest
from gptoss.harmony import MAX_TOOL_RUN, Harmony
from o200k import SPECIAL_TOKENS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather.\nOf today.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "With its country"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
                "days": {"type": ["integer", "null"]},
            },
            "required": ["city"],
        },
    },
}
SYSTEM = """\
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: 2025-06-28

Reasoning: {}

# Valid channels: analysis, commentary, final. Channel must be included for every message.{}\
<|end|>"""
CALLS_GO_TO = "\nCalls to these tools must go to the commentary channel: 'functions'."


def call(id: str, name: str, arguments: str) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def rendered(harmony: Harmony, messages: list[dict], **options: object) -> str:
    """The prompt as text, without the system message."""
    tokens = harmony.render(messages, date="2025-06-28", **options)
    text = harmony.tokenizer.decode(tokens)
    assert text.startswith("<|start|>system<|message|>") and text.endswith("<|start|>assistant")
    return text.partition("<|end|>")[2].removesuffix("<|start|>assistant")


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_system_message(harmony: Harmony, effort: str) -> None:
    tokens = harmony.render([user("Hi")], reasoning_effort=effort, date="2025-06-28")
    expected = SYSTEM.format(effort, "") + "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert harmony.tokenizer.decode(tokens) == expected
    with_tools = harmony.render([user("Hi")], tools=[WEATHER], date="2025-06-28")
    assert harmony.tokenizer.decode(with_tools).startswith(SYSTEM.format("medium", CALLS_GO_TO))


def test_today(harmony: Harmony) -> None:
    days = [datetime.date.today()]
    text = harmony.tokenizer.decode(harmony.render([user("Hi")]))
    days.append(datetime.date.today())
    assert any(f"Current date: {day:%Y-%m-%d}\n" in text for day in days)


def test_developer_message(harmony: Harmony) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Use "}, {"type": "text", "text": "metres."}],
        },
        user("Hi"),
        {"role": "system", "content": "Now be long."},
    ]
    expected = (
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\nUse metres.\n\n"
        "# Tools\n\n## functions\n\nnamespace functions {\n\n"
        "// Gets the weather.\n// Of today.\n"
        "type get_weather = (_: {\n// With its country\ncity: string,\n"
        'unit?: "celsius" | "kelvin", // default: celsius\ndays?: number | null,\n}) => any;\n\n'
        "type now = () => any;\n\ntype none = () => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>developer<|message|># Instructions\n\nNow be long.<|end|>"
    )
    empty = {"name": "none", "parameters": {"type": "object", "properties": {}}}
    tools = [
        WEATHER,
        {"type": "function", "function": {"name": "now"}},
        {"type": "function", "function": empty},
    ]
    assert rendered(harmony, messages, tools=tools) == expected


def test_response_format(harmony: Harmony) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    given = {"name": "number", "description": "One\nnumber", "schema": schema}
    text = rendered(
        harmony,
        [{"role": "system", "content": "Count."}, user("Hi")],
        response_format={"type": "json_schema", "json_schema": given},
    )
    assert text.startswith(
        "<|start|>developer<|message|># Instructions\n\nCount.\n\n"
        "# Response Formats\n\n## number\n\n"
        f"// One\n// number\n{json.dumps(schema, separators=(',', ':'))}<|end|>"
    )
    for kind in ("text", "json_object"):
        plain = rendered(harmony, [user("Hi")], response_format={"type": kind})
        assert plain == "<|start|>user<|message|>Hi<|end|>"


ANSWERED = [
    user("Q1"),
    {"role": "assistant", "reasoning": "R1", "content": "A1"},
    user("Q2"),
    {"role": "assistant", "reasoning_content": "R2", "content": "A2"},
]


def test_reasoning_of_answered_turns_is_dropped(harmony: Harmony) -> None:
    """All of it: openai-harmony itself keeps what comes behind the first answer."""
    assert rendered(harmony, [*ANSWERED, user("Q3")]) == (
        "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A1<|end|>"
        "<|start|>user<|message|>Q2<|end|><|start|>assistant<|channel|>final<|message|>A2<|end|>"
        "<|start|>user<|message|>Q3<|end|>"
    )


def test_reasoning_of_an_unfinished_tool_loop_is_kept(harmony: Harmony) -> None:
    """But not that of turns before it, though the conversation ends with no answer."""
    messages = [
        *ANSWERED,
        user("Q3"),
        {
            "role": "assistant",
            "reasoning": "R3",
            "content": "Looking.",
            "tool_calls": [call("a", "f", '{"x": 1}')],
        },
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {
            "role": "assistant",
            "reasoning": "R4",
            "content": None,
            "tool_calls": [call("b", "g", "{}")],
        },
        {"role": "tool", "tool_call_id": "b", "content": ""},
    ]
    text = rendered(harmony, messages)
    assert "R1" not in text and "R2" not in text
    assert text.partition("<|start|>user<|message|>Q3<|end|>")[2] == (
        "<|start|>assistant<|channel|>analysis<|message|>R3<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json"
        '<|message|>{"x": 1}<|call|>'
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>one<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>R4<|end|>"
        "<|start|>assistant to=functions.g<|channel|>commentary <|constrain|>json"
        "<|message|>{}<|call|>"
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|><|end|>"
    )
    finished = [*messages, {"role": "assistant", "reasoning": "R5", "content": "A3"}, user("Q4")]
    text = rendered(harmony, finished)
    assert not any(reasoning in text for reasoning in ("R1", "R2", "R3", "R4", "R5"))
    assert "<|channel|>commentary<|message|>Looking.<|end|>" in text  # a preamble stays
    assert "<|channel|>final<|message|>A3<|end|>" in text


def test_a_preamble_in_a_message_of_its_own(harmony: Harmony) -> None:
    """Text that tool calls follow in the same turn has not ended it, however messages are cut."""
    messages = [
        user("Q"),
        {"role": "assistant", "reasoning": "R"},
        {"role": "assistant", "content": "Looking."},
        {"role": "assistant", "tool_calls": [call("a", "f", "{}")]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    text = rendered(harmony, messages)
    assert "<|channel|>analysis<|message|>R<|end|>" in text
    assert "<|channel|>commentary<|message|>Looking.<|end|>" in text


def test_as_openai_harmony_renders(harmony: Harmony) -> None:
    """Token for token, the library given the same messages of the format."""
    from openai_harmony import (
        Author,
        Conversation,
        DeveloperContent,
        HarmonyEncoding,
        Message,
        RenderConversationConfig,
        Role,
        SystemContent,
        ToolDescription,
    )

    encoding: HarmonyEncoding = harmony._encoding
    function = WEATHER["function"]
    developer = DeveloperContent(instructions="Grüße!\n").with_function_tools(
        [ToolDescription.new(function["name"], function["description"], function["parameters"])]
    )
    assistant = Author(role=Role.ASSISTANT)
    tool = Author(role=Role.TOOL, name="functions.get_weather")
    conversation = Conversation.from_messages(
        [
            Message.from_role_and_content(
                Role.SYSTEM, SystemContent(conversation_start_date="2025-06-28")
            ),
            Message.from_role_and_content(Role.DEVELOPER, developer),
            Message.from_role_and_content(Role.USER, "Wie wird's? 🌦 <|end|>"),
            Message.from_author_and_content(assistant, "Hm,  so.").with_channel("analysis"),
            Message.from_author_and_content(assistant, '{"city": "Köln"}')
            .with_channel("commentary")
            .with_recipient("functions.get_weather")
            .with_content_type("<|constrain|>json"),
            Message.from_author_and_content(tool, "12°")
            .with_channel("commentary")
            .with_recipient("assistant"),
        ]
    )
    config = RenderConversationConfig(auto_drop_analysis=False)
    expected = encoding.render_conversation_for_completion(conversation, Role.ASSISTANT, config)
    messages = [
        {"role": "developer", "content": "Grüße!\n"},
        user("Wie wird's? 🌦 <|end|>"),
        {
            "role": "assistant",
            "reasoning": "Hm,  so.",
            "tool_calls": [call("a", "get_weather", '{"city": "Köln"}')],
        },
        {"role": "tool", "tool_call_id": "a", "content": "12°"},
    ]
    assert harmony.render(messages, tools=[WEATHER], date="2025-06-28") == expected


def test_no_text_becomes_a_special_token(harmony: Harmony) -> None:
    """Whatever place it comes through."""
    bad = "".join(SPECIAL_TOKENS) + "<|reserved_200013|>"
    tool = {
        "name": "f",
        "description": bad,
        "parameters": {"type": "object", "properties": {bad: {"description": bad}}},
    }
    schema = {"name": bad, "description": bad, "schema": {"title": bad}}
    conversation = [
        {"role": "system", "content": "S"},
        user("U"),
        {
            "role": "assistant",
            "reasoning": "R",
            "content": "C",
            "tool_calls": [call("a", "f", "X")],
        },
        {"role": "tool", "tool_call_id": "a", "content": "T"},
    ]

    def special(text: str) -> list[int]:
        messages = json.loads(json.dumps(conversation))
        for message, key in (
            (0, "content"),
            (1, "content"),
            (2, "reasoning"),
            (2, "content"),
            (3, "content"),
        ):
            messages[message][key] += text
        messages[2]["tool_calls"][0]["function"]["arguments"] += text
        options = dict(
            tools=[
                {
                    "type": "function",
                    "function": tool
                    if text
                    else {
                        **tool,
                        "description": "",
                        "parameters": {"type": "object", "properties": {"a": {}}},
                    },
                }
            ]
        )
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return [token for token in harmony.render(messages, **options) if token >= 199998]

    assert special(bad) == special("")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        ("Hi", "messages must be a list"),
        ({"role": "user"}, "messages must be a list"),
        (["Hi"], r"messages\[0\] must be an object"),
        ([user("Hi"), {"role": "robot", "content": ""}], r"messages\[1\]\.role must be one of"),
        ([{"role": 10**5000, "content": "Hi"}], r"messages\[0\]\.role must be one of"),
        ([{"role": ["user"], "content": "Hi"}], r"messages\[0\]\.role must be one of"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a list"),
        ([user("a\ud800")], r"messages\[0\]\.content is not valid Unicode"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] must be an object"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\]\.type must be \"text\"",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            r"content\[0\]\.text must be a string",
        ),
        ([{"role": "assistant", "reasoning": 5}], r"messages\[0\]\.reasoning must be a string"),
        ([{"role": "assistant", "tool_calls": 5}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]\.id must be a string"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            r"tool_calls\[0\]\.function must be an object",
        ),
        (
            [{"role": "assistant", "tool_calls": [call("a", "a b", "{}")]}],
            r"function\.name must be 1 to 64",
        ),
        (
            [{"role": "assistant", "tool_calls": [call("a", "f", {})]}],
            r"function\.arguments must be a string",
        ),
        (
            [{"role": "assistant", "tool_calls": [{**call("a", "f", ""), "type": "x"}]}],
            r"\[0\]\.type must be",
        ),
        (
            [{"role": "tool", "content": "1", "tool_call_id": "a"}],
            r"messages\[0\]\.tool_call_id: no tool call",
        ),
        ([{"role": "tool", "content": "1"}], r"messages\[0\]\.tool_call_id: no tool call"),
    ],
)
def test_bad_messages(harmony: Harmony, messages: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        harmony.render(messages)


def deep(n: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("f", "tools must be a list"),
        ([{"type": "web_search"}], r"tools\[0\]\.type must be \"function\""),
        ([{"type": "function"}], r"tools\[0\]\.function must be an object"),
        (
            [{"type": "function", "function": {"name": "a/b"}}],
            r"tools\[0\]\.function\.name must be",
        ),
        ([WEATHER, WEATHER], r"tools\[1\]\.function\.name: there are two"),
        (
            [{"type": "function", "function": {"name": "f", "description": 1}}],
            r"description must be a string",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            r"parameters must be an object",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"a": float("nan")}}}],
            "is not JSON",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"a": 10**5000}}}],
            r"tools\[0\]\.function\.parameters is not JSON, or out of range: a very large integer",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"a": {1}}}}],
            "is not JSON",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {1: 2}}}],
            "must be a string",
        ),
        (
            [{"type": "function", "function": {"name": "f", "parameters": deep(100_000)}}],
            "nested more than",
        ),
        (
            [
                {
                    "type": "function",
                    "function": {"name": "f", "description": "x" * (MAX_TOOL_RUN + 1)},
                }
            ],
            "without a space",
        ),
    ],
)
def test_bad_tools(harmony: Harmony, tools: object, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        harmony.render([user("Hi")], tools=tools)


def test_other_bad_arguments(harmony: Harmony) -> None:
    for options, error in (
        ({"reasoning_effort": "extreme"}, "reasoning_effort must be one of low, medium, high"),
        ({"date": "yesterday"}, "date must be YYYY-MM-DD"),
        ({"date": 5}, "date must be YYYY-MM-DD"),
        ({"response_format": {"type": "xml"}}, r"response_format\.type must be one of"),
        ({"response_format": {"type": "json_schema"}}, r"json_schema\.schema must be an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": deep(100_000)}}},
            r"response_format\.json_schema is nested more than",
        ),
    ):
        with pytest.raises(ValueError, match=error):
            harmony.render([user("Hi")], **options)


def test_the_deepest_and_longest_tools_that_are_allowed(harmony: Harmony) -> None:
    tool = {
        "name": "f",
        "description": "x" * MAX_TOOL_RUN,
        "parameters": {"properties": {"a": deep(60)}},
    }
    text = rendered(harmony, [user("Hi")], tools=[{"type": "function", "function": tool}])
    assert "x" * MAX_TOOL_RUN in text


@pytest.mark.parametrize("seed", range(20))
def test_schemas_that_make_no_sense(harmony: Harmony, seed: int) -> None:
    """Any JSON object is taken for a schema, and stays text."""
    rng = random.Random(seed)
    words = ["type", "properties", "enum", "description", "default", "oneOf", "items", "required"]
    plain = ["object", "string", "array", "<|end|>", "é\0", "", 1, -2.5, 1e308, True, None]

    def value(depth: int) -> object:
        kind = rng.choice([0, 1, 2]) if depth else 0
        if kind == 1:
            return {rng.choice(words): value(depth - 1) for _ in range(4)}
        return [value(depth - 1) for _ in range(3)] if kind else rng.choice(plain)

    for _ in range(20):
        parameters = {rng.choice(words): value(4) for _ in range(4)}
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        tokens = harmony.render([user("Hi")], tools=[tool])
        assert sum(token >= 199998 for token in tokens) == 3 * 3 + 1


@pytest.mark.parametrize("piece", [" ", "a", "漢", "!", "\n"])
def test_long_runs_of_text_cost_no_more_than_other_text(harmony: Harmony, piece: str) -> None:
    """openai-harmony's own encoder dies of a million of them, and needs minutes before."""
    tokens = harmony.render([user(piece * 1_000_000)])
    assert harmony.tokenizer.decode(tokens).count(piece) >= 1_000_000
