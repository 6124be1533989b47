"""POST /v1/completions and the routes about the model, over the scripted model."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from scripted_core import LIKELY, SECOND, neighbour
from server_tools import NAME, Scripted, exchange, scripted, small_tokenizer, until

JSON = {"content-type": "application/json"}
TEXT = "The capital of France is Paris, a city on the Seine."


@pytest.fixture
def served() -> Scripted:
    return scripted(TEXT)


def post(
    served: Scripted, body: dict[str, Any], path: str = "/v1/completions", status: int = 200
) -> Any:
    """The JSON that answers a request."""

    async def work(client: httpx.AsyncClient) -> Any:
        response = await client.post(path, content=json.dumps(body), headers=JSON)
        assert response.status_code == status, response.text
        return response.json()

    return exchange(served.app, work)


def stream(served: Scripted, body: dict[str, Any], path: str = "/v1/completions") -> list[Any]:
    """The events that answer a request, without the last, [DONE]."""

    async def work(client: httpx.AsyncClient) -> Any:
        response = await client.post(path, json={**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    return exchange(served.app, work)


@pytest.mark.parametrize("body", [{}, {"max_tokens": None}], ids=["left out", "null"])
def test_length_where_none_is_named(served: Scripted, body: dict[str, Any]) -> None:
    answer = post(served, {"prompt": "Hello", **body})
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


def test_a_text_is_continued(served: Scripted) -> None:
    answer = post(served, {"model": NAME, "prompt": "Hello", "max_tokens": 100})
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    n = len(served.tokenizer.encode(TEXT)) + 1  # and <|return|>
    n_prompt = len(served.tokenizer.encode("Hello"))
    assert answer["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": n,
        "total_tokens": n_prompt + n,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_sixteen_tokens_unless_asked_otherwise(served: Scripted) -> None:
    answer = post(served, {"prompt": "Hello"})
    expected = served.tokenizer.decode(served.tokenizer.encode(TEXT)[:16])
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"


def test_every_form_of_prompt() -> None:
    served = scripted()  # says prompts backwards
    tokens = served.tokenizer.encode("abc")
    backwards = served.tokenizer.decode(tokens[::-1])
    for prompt, n in (
        ("abc", 1),
        (["abc"], 1),
        (tokens, 1),
        ([tokens, tokens], 2),
        (["abc"] * 3, 3),
    ):
        answer = post(served, {"prompt": prompt})
        assert [c["text"] for c in answer["choices"]] == [backwards] * n
        assert [c["index"] for c in answer["choices"]] == list(range(n))
    answer = post(served, {"prompt": ["abc", "xy"], "n": 2})
    assert [c["text"] for c in answer["choices"]] == [backwards, backwards, "yx", "yx"]
    assert answer["usage"]["prompt_tokens"] == len(tokens) + len(served.tokenizer.encode("xy"))


def test_stop_strings(served: Scripted) -> None:
    answer = post(served, {"prompt": "a", "max_tokens": 99, "stop": [" Fr", "zzz"]})
    assert answer["choices"][0]["text"] == "The capital of"
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stop", [None, " is"])
def test_a_stream_says_the_same(served: Scripted, stop: str | None) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 99, "stop": stop}
    whole = post(served, body)
    events = stream(served, {**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    for expected in whole["choices"]:
        mine = [
            choice
            for event in events
            for choice in event["choices"]
            if choice["index"] == expected["index"]
        ]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [c["finish_reason"] for c in mine][-1] == "stop"
        assert not any(c["finish_reason"] for c in mine[:-1])


def test_usage_is_streamed_only_when_asked(served: Scripted) -> None:
    assert all("usage" not in event for event in stream(served, {"prompt": "a"}))


def test_logprobs(served: Scripted) -> None:
    answer = post(served, {"prompt": "a", "max_tokens": 3, "logprobs": 2})
    found = answer["choices"][0]["logprobs"]
    tokens = served.tokenizer.encode(TEXT)[:3]
    names = [served.tokenizer.decode([token]) for token in tokens]
    assert found["tokens"] == names
    assert found["text_offset"] == [0, len(names[0]), len(names[0]) + len(names[1])]
    vocab_size = served.core.config.vocab_size
    gap = LIKELY - SECOND
    for token, logprob, top in zip(
        tokens, found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert logprob == pytest.approx(-math.exp(-gap), abs=1e-5)
        second = served.tokenizer.decode([neighbour(token, vocab_size)])
        assert top == {
            served.tokenizer.decode([token]): logprob,
            second: pytest.approx(-gap, abs=1e-5),
        }


def test_echo_scores_the_prompt(served: Scripted) -> None:
    """What lm-eval asks for. The scripted model expects the neighbour of every prompt token."""
    tokens = [5, 6, 7, 100]
    body = {"prompt": tokens, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    answer = post(served, body)
    choice = answer["choices"][0]
    first = served.tokenizer.encode(TEXT)[0]
    assert choice["text"] == served.tokenizer.decode([*tokens, first])
    found = choice["logprobs"]
    assert len(found["tokens"]) == 5
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    likely, unlikely = found["token_logprobs"][1:3], found["token_logprobs"][3]
    assert likely == pytest.approx([0, 0], abs=1e-3) and unlikely == pytest.approx(
        -LIKELY, abs=1e-3
    )
    for place in (1, 2, 3, 4):  # the way lm-eval tells whether a token was the likeliest
        greedy = found["token_logprobs"][place] == max(found["top_logprobs"][place].values())
        assert greedy == (place != 3)
    assert answer["usage"]["completion_tokens"] == 1
    until(lambda: not served.core.sequences)


def test_echo_without_new_tokens(served: Scripted) -> None:
    body = {"prompt": ["abc", "x"], "max_tokens": 0, "echo": True}
    answer = post(served, body | {"logprobs": 0})
    assert [c["text"] for c in answer["choices"]] == ["abc", "x"]
    assert answer["choices"][1]["logprobs"]["token_logprobs"] == [None]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    events = stream(served, body)
    assert [e["choices"][0]["text"] for e in events] == ["abc", "x"]


def test_a_long_prompt_is_scored_in_chunks(served: Scripted) -> None:
    tokens = [token % 500 for token in range(300)]
    body = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 0}
    found = post(served, body)["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == 300
    assert all(-0.01 < logprob <= 0 for logprob in found["token_logprobs"][1:])


def test_sampling_fields_reach_the_sampler(served: Scripted) -> None:
    first = served.tokenizer.encode(TEXT)[0]
    biased = {"prompt": "a", "max_tokens": 1, "temperature": 0, "logit_bias": {str(first): -100}}
    neighbours = served.tokenizer.decode([neighbour(first, served.core.config.vocab_size)])
    assert post(served, biased)["choices"][0]["text"] == neighbours
    again = {"prompt": [first], "max_tokens": 1, "temperature": 0, "repetition_penalty": 10}
    assert post(served, again)["choices"][0]["text"] == neighbours
    even = {str(token): SECOND - LIKELY for token in served.tokenizer.encode(TEXT)}
    hot = {"prompt": "a", "max_tokens": 8, "seed": 5, "logit_bias": even}
    texts = {post(served, hot)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    assert post(served, hot | {"seed": 6})["choices"][0]["text"] not in texts
    assert post(served, hot | {"n": 2})["choices"][1]["text"] not in texts
    cold = {"prompt": "a", "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1}
    assert post(served, cold)["choices"][0]["text"]


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 5000}, "prompt"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 65, "prompt": ["a", "b"]}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 2}, None),
        ({"suffix": "end"}, None),
        ({"logprobs": 21}, "logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a" * 1025]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"stop_token_ids": [512]}, "prompt"),
        ({"logit_bias": {"512": 1}}, "prompt"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
    ],
)
def test_mistakes_are_named(served: Scripted, fields: dict[str, Any], param: str | None) -> None:
    error = post(served, {"prompt": "a", **fields}, status=400)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert served.core.n_steps == 0


def test_context_length(served: Scripted) -> None:
    error = post(served, {"prompt": [1] * 4090, "max_tokens": 7}, status=400)["error"]
    assert error["code"] == "context_length_exceeded"


def test_the_model_is_a_label(served: Scripted) -> None:
    for name in ("other", "../" + NAME, "/etc/passwd"):
        error = post(served, {"model": name, "prompt": "a"}, status=404)["error"]
        assert error["code"] == "model_not_found" and error["param"] == "model"


def test_tokenize_and_detokenize(served: Scripted) -> None:
    text = "Hello <|start|> \N{SNOWMAN}"
    found = post(served, {"prompt": text}, "/tokenize")
    assert found["tokens"] == small_tokenizer().encode(text)
    assert found["count"] == len(found["tokens"])
    assert post(served, {"tokens": found["tokens"]}, "/detokenize") == {"prompt": text}
    assert post(served, {"prompt": "\udc00"}, "/tokenize", 400)["error"]["code"] == "invalid_json"
    assert post(served, {"tokens": [2**32]}, "/detokenize", 400)["error"]["param"] == "tokens"


def test_models(served: Scripted) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == [NAME]
        one = await client.get(f"/v1/models/{NAME}")
        assert one.json() == listed["data"][0] and one.json()["object"] == "model"
        other = await client.get("/v1/models/a/b")
        assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found"
        assert (await client.get("/health")).json() == {"status": "ok"}

    exchange(served.app, work)


def test_an_answer_with_an_infinite_logprob_is_json(served: Scripted) -> None:
    from gptoss.server.logprobs import finite

    assert json.dumps(finite(-math.inf), allow_nan=False) == "-9999.0"
