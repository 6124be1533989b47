"""POST /v1/chat/completions through the `openai` client, over a scripted model that says harmony,
well-formed and malformed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gptoss.answer import Answer
from gptoss.tokenizer import Tokenizer
from harmony_text import tokens_of
from jsonschema import validate
from server_tools import NAME, Live, live, scripted, until

USER = [{"role": "user", "content": "Hi"}]
THOUGHT = "<|channel|>analysis<|message|>The user greets.<|end|><|start|>assistant"
FINAL = THOUGHT + "<|channel|>final<|message|>Hello, na\xefve \U0001f99c world!<|return|>"
CALL = (
    THOUGHT + "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Paris"}<|call|>'
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(harmony_path: Path) -> Iterator[Live]:
    """A server whose model has gpt-oss's vocabulary. Shared; `say` sets what it says."""
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    with live(scripted("", tokenizer, max_context=4096)) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def say(server: Live) -> Callable[[str], list[int]]:
    """Sets the answer to everything; gives its tokens."""

    def set_answer(text: str) -> list[int]:
        tokens = tokens_of(server.scripted.tokenizer, text)
        server.scripted.core.play(lambda _: tokens)
        return tokens

    return set_answer


def ask(client: Any, **fields: Any) -> Any:
    """The only choice of an answer."""
    fields = {"model": NAME, "messages": USER} | fields
    return client.chat.completions.create(**fields).choices[0]


def streamed(client: Any, **fields: Any) -> tuple[dict[str, Any], str, list[Any]]:
    """The message that a stream's deltas make, its finish reason, and the chunks."""
    fields = {"model": NAME, "messages": USER, "stream": True} | fields
    message: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}
    finish = None
    chunks = list(client.chat.completions.create(**fields))
    for chunk in chunks:
        for choice in chunk.choices:
            assert finish is None, "nothing comes after the finish reason"
            delta = choice.delta.model_dump(exclude_none=True)
            assert delta.get("reasoning") == delta.get("reasoning_content")
            message["reasoning"] += delta.get("reasoning", "")
            message["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function" and call["function"]["arguments"] == ""
                    message["tool_calls"].append(call)
                else:
                    target = message["tool_calls"][call["index"]]
                    target["function"]["arguments"] += call["function"]["arguments"]
            finish = choice.finish_reason
    assert finish is not None
    return message, finish, chunks


def test_reasoning_and_content(client: Any, say: Callable, server: Live) -> None:
    tokens = say(FINAL)
    answer = client.chat.completions.create(model=NAME, messages=USER)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == "Hello, na\xefve \U0001f99c world!"
    assert choice.message.reasoning == choice.message.reasoning_content == "The user greets."
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert answer.usage.completion_tokens == len(tokens)
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(
        server.scripted.tokenizer.encode("The user greets.")
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(tokens)


def test_a_stream_says_the_same(client: Any, say: Callable) -> None:
    say(FINAL)
    message, finish, chunks = streamed(client)
    assert message["content"] == "Hello, na\xefve \U0001f99c world!"
    assert message["reasoning"] == "The user greets." and finish == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_in_a_stream(client: Any, say: Callable) -> None:
    tokens = say(FINAL)
    _, _, chunks = streamed(client, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_tool_call_and_its_result(client: Any, say: Callable, server: Live) -> None:
    say(CALL)
    choice = ask(client, tools=[TOOL])
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.reasoning == "The user greets."
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}

    prompts = []
    final = tokens_of(server.scripted.tokenizer, FINAL)
    server.scripted.core.play(lambda prompt: prompts.append(prompt) or final)
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    history = [*USER, choice.message.model_dump(exclude_none=True), result]
    assert ask(client, messages=history, tools=[TOOL]).finish_reason == "stop"
    prompt = server.scripted.tokenizer.decode(prompts[0])
    assert "The user greets." in prompt and '{"city": "Paris"}' in prompt
    assert "functions.get_weather to=assistant" in prompt and "Sunny" in prompt


def test_a_streamed_tool_call(client: Any, say: Callable) -> None:
    say(CALL)
    message, finish, _ = streamed(client, tools=[TOOL])
    assert finish == "tool_calls" and message["content"] == ""
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather" and call["id"].startswith("call_")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_no_call_without_a_tool(client: Any, say: Callable) -> None:
    """A call of a function that there is not is text; one that may not be called does not come."""
    say(CALL)
    choice = ask(client)
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert choice.message.content == '{"city": "Paris"}'
    fields = {"tools": [TOOL], "tool_choice": "none", "temperature": 0, "max_tokens": 40}
    choice = ask(client, **fields)
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"  # <|call|> has not come, nor anything else that ends it


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_forced_call(client: Any, say: Callable, server: Live, choice: Any) -> None:
    """The model wants to answer in text, and is not let."""
    likely = {str(token): 15.0 for token in say(CALL.removeprefix(THOUGHT))}
    say(THOUGHT + "<|channel|>final<|message|>No.<|return|>")
    fields = {"temperature": 0, "max_tokens": 60, "logit_bias": likely}
    answer = ask(client, tools=[TOOL], tool_choice=choice, **fields)
    assert [call.function.name for call in answer.message.tool_calls] == ["get_weather"]
    assert answer.message.tool_calls[0].function.arguments.startswith("{")
    assert not answer.message.content


def test_json_schema(client: Any, say: Callable) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    good = '{"answer":true}'
    say(f"{THOUGHT}<|channel|>final<|message|>{good}<|return|>")
    assert ask(client, response_format=form).message.content == good
    # A model that says something else must still come out valid, thinking as it likes.
    say(f"{THOUGHT}<|channel|>final<|message|>Sure! Yes." + "<|return|>" * 30)
    choice = ask(client, response_format=form, max_tokens=200, seed=3, temperature=0)
    assert choice.message.reasoning == "The user greets."
    if choice.finish_reason == "stop":
        validate(json.loads(choice.message.content), schema)
    else:  # white space is JSON, too
        assert choice.message.content.startswith("{")


def test_json_object(client: Any, say: Callable) -> None:
    say(f'{THOUGHT}<|channel|>final<|message|>{{"a": [1, 2]}}<|return|>')
    choice = ask(client, response_format={"type": "json_object"})
    assert json.loads(choice.message.content) == {"a": [1, 2]}
    assert ask(client, response_format={"type": "text"}).message.content == '{"a": [1, 2]}'


MALFORMED = {
    "plain text": ("Hello there", None, "Hello there"),
    "no final": ("<|channel|>analysis<|message|>Only thoughts<|return|>", "Only thoughts", ""),
    "no start": (
        "<|channel|>analysis<|message|>A<|end|><|channel|>final<|message|>B<|return|>",
        "A",
        "B",
    ),
    "ends early": ("<|channel|>final<|message|>B<|endoftext|>", None, "B"),
    "text after an end": (
        "<|channel|>analysis<|message|>A<|end|>stray<|channel|>final<|message|>B<|return|>",
        "A",
        None,
    ),
    "unknown channel": ("<|channel|>musings<|message|>B<|return|>", None, "B"),
    "markers alone": ("<|channel|><|channel|><|message|><|message|>B<|return|>", None, "B"),
    "nothing": ("<|return|>", None, ""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_no_errors(client: Any, say: Callable, name: str) -> None:
    text, reasoning, content = MALFORMED[name]
    tokens = say(text)
    choice = ask(client, max_tokens=len(tokens))
    message, finish, _ = streamed(client, max_tokens=len(tokens))
    assert finish == choice.finish_reason
    assert (choice.message.content or "") == message["content"]
    assert getattr(choice.message, "reasoning", "") == message["reasoning"]
    if content is not None:
        assert message["content"] == content
    if reasoning is not None:
        assert message["reasoning"] == reasoning


def test_stop_strings_are_for_the_content(client: Any, say: Callable, server: Live) -> None:
    say(FINAL)
    for stop, content in (("user", FINAL), (["ve \U0001f99c", "zz"], "Hello, na\xef")):
        choice = ask(client, stop=stop)
        assert choice.message.reasoning == "The user greets." and choice.finish_reason == "stop"
        if content is not FINAL:
            assert choice.message.content == content
            assert streamed(client, stop=stop)[0]["content"] == content
    until(lambda: not server.scripted.core.sequences)


def test_logprobs_are_of_the_content(client: Any, say: Callable, server: Live) -> None:
    say(FINAL)
    choice = ask(client, logprobs=True, top_logprobs=2)
    content = choice.logprobs.content
    data = b"".join(bytes(entry.bytes) for entry in content)
    assert data.decode() == choice.message.content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    _, _, chunks = streamed(client, logprobs=True)
    parts = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert b"".join(bytes(e.bytes) for part in parts for e in part.content) == data


def test_several_choices(client: Any, say: Callable) -> None:
    say(FINAL)
    answer = client.chat.completions.create(model=NAME, messages=USER, n=3, seed=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 1
    chunks = list(client.chat.completions.create(model=NAME, messages=USER, n=2, stream=True))
    finished = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert sorted(finished) == [0, 1]


def test_length(client: Any, say: Callable) -> None:
    say(FINAL)
    for field in ("max_tokens", "max_completion_tokens"):
        choice = ask(client, **{field: 4})
        assert choice.finish_reason == "length" and choice.message.reasoning


def test_effort_and_instructions_reach_the_prompt(client: Any, server: Live) -> None:
    prompts: list[list[int]] = []
    final = tokens_of(server.scripted.tokenizer, FINAL)
    server.scripted.core.play(lambda prompt: prompts.append(prompt) or final)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say <|start|>"}]},
        {"role": "assistant", "reasoning": "hm"},
        {"role": "user", "content": "Hi"},
    ]
    ask(client, messages=messages, reasoning_effort="high")
    text = server.scripted.tokenizer.decode(prompts[0])
    assert "Reasoning: high" in text and "Be brief." in text
    start = server.scripted.tokenizer.token_id("<|start|>")
    assert prompts[0].count(start) == text.count("<|start|>") - 1, "user text is only text"


def test_the_prefix_is_counted(client: Any, say: Callable, server: Live) -> None:
    say(FINAL)
    messages = [{"role": "user", "content": "word " * 300}]
    client.chat.completions.create(model=NAME, messages=messages)
    again = client.chat.completions.create(model=NAME, messages=messages)
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == again.usage.prompt_tokens // 128 * 128


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"top_logprobs": 2}, None),
        ({"logprobs": 5}, "logprobs"),
        ({"tools": [{"type": "magic"}]}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [TOOL]}, "tool"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"functions": []}, "functions"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 500}, "n"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_mistakes_are_named(
    client: Any, say: Callable, fields: dict[str, Any], param: str | None
) -> None:
    say(FINAL)
    with pytest.raises(openai.BadRequestError) as caught:
        fields = {"messages": USER} | fields
        client.post("/chat/completions", body={"model": NAME} | fields, cast_to=object)
    error = caught.value
    assert error.type == "invalid_request_error"
    if param is not None:
        assert param in str(error.param) + error.body["message"]


def test_what_openai_has_and_means_nothing_here_is_accepted(client: Any, say: Callable) -> None:
    say(FINAL)
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "verbosity": "low",
        "modalities": ["text"],
    }
    assert ask(client, extra_body=fields).finish_reason == "stop"


def test_a_model_that_cannot_chat() -> None:
    with live(scripted("x")) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="not chat"):
                ask(client)
            assert client.completions.create(model=NAME, prompt="a").choices[0].text == "x"


def test_stop_strings_over_pieces(server: Live) -> None:
    """A stop string that begins in one token and ends in another, and one that does not end."""
    from gptoss.engine import StreamEvent

    tokenizer = server.scripted.tokenizer
    tokens = tokens_of(tokenizer, "<|channel|>final<|message|>one two three<|return|>")
    parser = server.scripted.app.state.served.harmony.parser
    for stop, shown in (("wo th", "one t"), ("three!", "one two three"), ("one", "")):
        answer = Answer(parser([]), [stop])
        pieces = []
        for index, token in enumerate(tokens):
            last = "stop" if index == len(tokens) - 1 else None
            pieces += answer.push([StreamEvent(token, "", None, last)])
        assert "".join(piece.delta.text for piece in pieces) == shown
        assert answer.finish_reason == "stop" and answer.stopped == (stop != "three!")
