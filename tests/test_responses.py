"""/v1/responses: items in, items and typed events out; also through OpenAI's own client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from gptoss.tokenizer import Tokenizer
from harmony_text import call, final, last_message, thought, tokens_of
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server_tools import Live, live, scripted, until

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather at a place",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string"}},
        "required": ["place"],
    },
}
ANSWERS = {
    "weather": thought("A tool knows.") + call("get_weather", '{"place":"Delft"}'),
    "preamble": thought("First.")
    + "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    + call("get_weather", '{"place":"Oslo"}'),
    "twice": thought("One.")
    + "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant"
    + thought("Two.")
    + final("Done."),
    "unfinished": "<|channel|>analysis<|message|>Thinking<|return|>",
    "malformed": "no header at all<|end|><|return|>",
    "endless": thought("Hm.") + final("word " * 3000),
    "JSON": thought("An object.") + final('{"a": 1}'),
    "hello": thought("Be nice.") + final("Hello, wörld!"),
}
HELLO = {"input": "Say hello"}


@pytest.fixture(scope="module")
def tokenizer(harmony_path: Path) -> Tokenizer:
    return Tokenizer.from_file(harmony_path / "tokenizer.json")


@pytest.fixture(scope="module")
def running(tokenizer: Tokenizer) -> Iterator[tuple[Live, list[str]]]:
    """A server whose model has an answer for some words, and says "Yes." to the rest; and the
    prompts that the model got."""
    prompts: list[str] = []

    def script(prompt: list[int]) -> list[int]:
        prompts.append(tokenizer.decode(prompt))
        _, question = last_message(tokenizer, prompt)
        said = next((text for word, text in ANSWERS.items() if word in question), final("Yes."))
        return tokens_of(tokenizer, said)

    with live(scripted(script, tokenizer)) as server:
        yield server, prompts


@pytest.fixture
def server(running: tuple[Live, list[str]]) -> Iterator[Live]:
    server, prompts = running
    prompts.clear()
    yield server
    server.scripted.core.delay = 0
    until(lambda: not server.scripted.core.sequences)


@pytest.fixture
def seen(running: tuple[Live, list[str]]) -> list[str]:
    """The prompts that the model got in this test."""
    return running[1]


@pytest.fixture
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def create(server: Live, **body: Any) -> dict[str, Any]:
    answer = server.client().post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    TypeAdapter(Response).validate_python(answer.json())  # the client itself does not check
    return answer.json()


def stream(server: Live, **body: Any) -> list[dict[str, Any]]:
    """The events of a request, each of them checked against OpenAI's types."""
    with server.client().stream("POST", "/v1/responses", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = answer.read().decode().removesuffix("\n\n").split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = TypeAdapter(ResponseStreamEvent).validate_json(data.removeprefix("data: "))
        assert name == f"event: {event.type}"
        events.append(httpx.Response(200, content=data.removeprefix("data: ")).json())
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_answer(server: Live, seen: list[str]) -> None:
    response = create(server, **HELLO, metadata={"a": "b"}, max_output_tokens=100)
    assert response["object"] == "response" and response["status"] == "completed"
    assert response["model"] == "scripted" and response["metadata"] == {"a": "b"}
    assert response["store"] is False and response["error"] is None
    assert response["completed_at"] >= response["created_at"]
    reasoning, message = response["output"]
    assert response["id"].startswith("resp_")
    assert reasoning["id"].startswith("rs_") and message["id"].startswith("msg_")
    assert reasoning["type"] == "reasoning" and reasoning["summary"] == []
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Be nice."}]
    assert message["role"] == "assistant" and message["status"] == "completed"
    assert message["content"] == [
        {"type": "output_text", "text": "Hello, wörld!", "annotations": [], "logprobs": []}
    ]
    usage = response["usage"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 3}
    assert usage["output_tokens"] > 8
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert len(seen) == 1 and "Reasoning: medium" in seen[0]


def test_what_the_model_gets(server: Live, seen: list[str]) -> None:
    """Instructions, effort, tools and every kind of item arrive in the prompt, in their places."""
    create(
        server,
        instructions="Be brief.",
        reasoning={"effort": "low", "summary": "auto"},
        tools=[WEATHER],
        input=[
            {"role": "user", "content": "First?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "An answer.", "annotations": []}],
            },
            {"role": "developer", "content": [{"type": "input_text", "text": "Mind the gap."}]},
            {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "I ask a tool."}],
            },
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            {
                "type": "function_call",
                "id": "fc_2",
                "call_id": "c2",
                "name": "get_weather",
                "arguments": '{"place": "X"}',
                "status": "completed",
            },
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "sun"}],
            },
        ],
    )
    (prompt,) = seen
    assert "Reasoning: low" in prompt
    order = [
        "Be brief.",
        "type get_weather = (",
        "<|start|>user<|message|>First?<|end|>",
        "<|start|>assistant<|channel|>final<|message|>An answer.<|end|>",
        "Mind the gap.",
        "<|start|>user<|message|>And now?<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>I ask a tool.<|end|>",
        "to=functions.get_weather",
        "<|start|>functions.get_weather",
        "rain<|end|>",
        '{"place": "X"}<|call|>',
        "sun<|end|><|start|>assistant",
    ]
    places = [prompt.find(part) for part in order]
    assert places == sorted(places) and -1 not in places


def test_tool_call(server: Live) -> None:
    response = create(server, input="What weather?", tools=[WEATHER])
    reasoning, called = response["output"]
    assert reasoning["content"][0]["text"] == "A tool knows."
    assert called["type"] == "function_call" and called["id"].startswith("fc_")
    assert called["call_id"].startswith("call_")
    assert (called["name"], called["arguments"]) == ("get_weather", '{"place":"Delft"}')
    assert response["status"] == "completed"
    assert response["tools"][0]["name"] == "get_weather" and response["tool_choice"] == "auto"


def test_preamble_and_several_thoughts(server: Live) -> None:
    response = create(server, input="With preamble, please", tools=[WEATHER])
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert response["output"][1]["content"][0]["text"] == "I look it up."
    response = create(server, input="Think twice")
    texts = [item["content"][0]["text"] for item in response["output"]]
    assert texts == ["One.", "Wait.", "Two.", "Done."]


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"ping", "pong"}), ({"type": "function", "name": "pong"}, {"pong"})],
)
def test_forced_call(server: Live, choice: Any, names: set[str]) -> None:
    """The model would like to call something else."""
    tools = [{"type": "function", "name": name} for name in ("ping", "pong")]
    response = create(server, input="What weather?", tools=tools, tool_choice=choice)
    assert response["output"][-1]["type"] == "function_call"
    assert response["output"][-1]["name"] in names
    assert json.loads(response["output"][-1]["arguments"]) == {}
    assert response["tool_choice"] == choice


def test_no_call(server: Live, seen: list[str]) -> None:
    """With tool_choice none the model does not know the tools, and its try to call is barred."""
    body = {"tools": [WEATHER], "tool_choice": "none", "max_output_tokens": 40, "temperature": 0}
    response = create(server, input="What weather?", **body)
    assert response["status"] == "incomplete"  # the end of a call has not come
    assert response["output"][0]["content"][0]["text"].startswith("A tool knows.")
    assert "function_call" not in [item["type"] for item in response["output"]]
    assert "type get_weather" not in seen[0]


def test_text_format(server: Live, seen: list[str]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    given = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
    given["schema"] = {**schema, "additionalProperties": False}
    response = create(server, input="Some JSON", text={"format": given})
    assert response["output"][-1]["content"][0]["text"] == '{"a": 1}'
    assert response["text"]["format"] == given
    assert '"integer"' in seen[0]
    # The model wants to say hello; the format leaves it nothing but an object.
    body = {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 40}
    response = create(server, **HELLO, **body)
    assert response["output"][-1]["content"][0]["text"].startswith("{")


def test_cut_off(server: Live) -> None:
    response = create(server, input="endless", max_output_tokens=20)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][-1]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 20


@pytest.mark.parametrize(
    ("word", "kinds"), [("unfinished", ["reasoning"]), ("malformed", ["message"])]
)
def test_malformed(server: Live, word: str, kinds: list[str]) -> None:
    response = create(server, input=word)
    assert [item["type"] for item in response["output"]] == kinds
    assert response["status"] == "completed"


def test_logprobs(server: Live) -> None:
    response = create(server, **HELLO, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response["output"][1]["content"][0]["logprobs"]
    assert "".join([each["token"] for each in logprobs]) == "Hello, wörld!"
    assert all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in logprobs)
    events = stream(server, **HELLO, top_logprobs=1)
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    told = [each["token"] for event in deltas for each in event["logprobs"]]
    assert "".join(told) == "Hello, wörld!"


def test_stop_string(server: Live) -> None:
    response = create(server, **HELLO, stop=", w")
    assert response["output"][1]["content"][0]["text"] == "Hello"
    until(lambda: not server.scripted.core.sequences)


def test_cached_tokens(server: Live) -> None:
    text = "hello " * 300
    assert create(server, input=text)["usage"]["input_tokens_details"]["cached_tokens"] == 0
    assert create(server, input=text)["usage"]["input_tokens_details"]["cached_tokens"] >= 256


def test_events(server: Live) -> None:
    """Every event in its place; what they add up to is the response at the end."""
    server.scripted.core.delay = 0.01  # else a slow reader may get a text in one piece
    events = stream(server, input="With preamble, please", tools=[WEATHER])
    kinds = [event["type"].removeprefix("response.") for event in events]
    without_repeats = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    part = ["output_item.added", "content_part.added"]
    end = ["content_part.done", "output_item.done"]
    assert without_repeats == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.delta", "reasoning_text.done", *end),
        *(*part, "output_text.delta", "output_text.done", *end),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]
    assert kinds.count("output_text.delta") > 1
    response = events[-1]["response"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    assert {event["response"]["id"] for event in events if "response" in event} == {response["id"]}

    texts = {item["id"]: "" for item in response["output"]}
    for event in events:
        index = event.get("output_index")
        if index is not None:
            item = response["output"][index]
            assert event.get("item_id", item["id"]) == item["id"]
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] += event["delta"]
        elif event["type"] == "response.output_item.added":
            assert event["item"]["id"] == item["id"] and event["item"]["status"] == "in_progress"
        elif event["type"] == "response.output_item.done":
            assert event["item"] == item
        elif event["type"] == "response.content_part.done":
            assert event["part"] == item["content"][0]
        elif event["type"].endswith(".done"):
            assert event.get("text", event.get("arguments")) == texts[item["id"]]
    assert list(texts.values()) == ["First.", "I look it up.", '{"place":"Oslo"}']


def test_events_of_a_cut_answer(server: Live) -> None:
    events = stream(server, input="endless", max_output_tokens=20)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-2]["type"] == "response.output_item.done"
    assert events[-2]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["usage"]["output_tokens"] == 20


def test_failure_in_a_stream(server: Live) -> None:
    """The engine breaks in the middle: a last event says so, and nothing of how."""
    server.scripted.core.delay = 0.005
    body = {"input": "endless", "stream": True}
    with server.client().stream("POST", "/v1/responses", json=body) as answer:
        lines = answer.iter_lines()
        assert any("output_text.delta" in line for line in lines)
        server.scripted.core.fail = RuntimeError("a pointer")
        last = [line for line in lines if line.startswith("data: ")][-1]
    event = httpx.Response(200, content=last.removeprefix("data: ")).json()
    assert event["type"] == "response.failed"
    assert event["response"]["status"] == "failed"
    assert event["response"]["error"]["code"] == "server_error"
    assert "pointer" not in last
    assert event["response"]["output"][-1]["status"] == "incomplete"
    TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert create(server, **HELLO)["status"] == "completed"


def test_client_leaves(server: Live) -> None:
    server.scripted.core.delay = 0.005
    body = {"input": "endless", "stream": True}
    with server.client().stream("POST", "/v1/responses", json=body) as answer:
        assert any("output_text.delta" in line for line in answer.iter_lines())
        assert server.scripted.core.sequences
    until(lambda: not server.scripted.core.sequences)


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
REFUSED = [
    ({}, "input: Field required"),
    ({"input": []}, "input: "),
    ({"input": 3}, "input: "),
    ({"input": [3]}, "input[0]: "),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type: 'item_reference'"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role: "),
    ({"input": [{"role": "user"}]}, "input[0].content: Field required"),
    ({"input": [{"role": "user", "content": None}]}, "input[0].content: "),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type: ",
    ),
    ({"input": [{**CALL, "name": "a b"}]}, "input[0].name: "),
    ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments: "),
    (
        {"input": [CALL, {"type": "function_call_output", "call_id": "d", "output": ""}]},
        "input[1].call_id: 'd'",
    ),
    ({**HELLO, "previous_response_id": "resp_1"}, "previous_response_id is not supported"),
    ({**HELLO, "conversation": "conv_1"}, "conversation is not supported"),
    ({**HELLO, "background": True}, "background is not supported"),
    ({**HELLO, "prompt": {"id": "p"}}, "prompt is not supported"),
    ({**HELLO, "truncation": "auto"}, "truncation: "),
    ({**HELLO, "include": ["file_search_call.results"]}, "include[0]: "),
    ({**HELLO, "max_output_tokens": 0}, "max_output_tokens: "),
    ({**HELLO, "top_logprobs": 21}, "top_logprobs: "),
    ({**HELLO, "reasoning": {"effort": "extreme"}}, "reasoning.effort: "),
    ({**HELLO, "metadata": {str(i): "" for i in range(17)}}, "metadata: "),
    ({**HELLO, "tools": [{"type": "web_search"}]}, "tools[0].type: "),
    ({**HELLO, "tools": [WEATHER, WEATHER]}, "tools[1].name: "),
    ({**HELLO, "tool_choice": "required"}, "tool_choice is "),
    ({**HELLO, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name is 'f'"),
    ({**HELLO, "tool_choice": 3}, "tool_choice is 3"),
    ({**HELLO, "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({**HELLO, "text": {"format": {"type": "xml"}}}, "text.format.type: "),
    ({**HELLO, "stream_options": {}}, "stream_options is only allowed"),
    ({**HELLO, "messages": []}, "Unknown parameter: 'messages'"),
    ({"input": "word " * 5000}, "max_context"),
]


@pytest.mark.parametrize(("body", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(server: Live, body: dict[str, Any], message: str) -> None:
    answer = server.client().post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "response_format" not in error["message"] and "messages[" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openai_client(client: openai.OpenAI) -> None:
    """A conversation with a tool, as programs have it: output items go back as they came."""
    items: list[Any] = [{"role": "user", "content": "What weather?"}]
    response = client.responses.create(model="scripted", input=items, tools=[WEATHER])
    (called,) = [item for item in response.output if item.type == "function_call"]
    assert response.output_text == "" and called.name == "get_weather"
    items += [item.model_dump() for item in response.output]
    items.append({"type": "function_call_output", "call_id": called.call_id, "output": "hello"})
    response = client.responses.create(model="scripted", input=items, tools=[WEATHER])
    assert response.output_text == "Hello, wörld!"
    assert response.usage and response.usage.output_tokens_details.reasoning_tokens > 0


def test_openai_client_streams(client: openai.OpenAI) -> None:
    text, reasoning = "", ""
    with client.responses.stream(model="scripted", input="Say hello") as events:
        for event in events:
            if event.type == "response.output_text.delta":
                text += event.delta
            elif event.type == "response.reasoning_text.delta":
                reasoning += event.delta
        response = events.get_final_response()
    assert (text, reasoning) == ("Hello, wörld!", "Be nice.")
    assert response.output_text == text and response.status == "completed"


def test_openai_client_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(model="scripted", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="another", input="x")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
