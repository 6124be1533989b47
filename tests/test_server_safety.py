"""What a request must pass: key, host, origin, sizes; and what errors and logs do not say."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from typing import Any

import httpx
import pytest
from gptoss.server.app import ROUTERS
from gptoss.server.body import parse
from gptoss.server.errors import ApiError
from gptoss.server.logs import JsonFormatter
from gptoss.server.schemas import CompletionRequest
from gptoss.server.settings import Settings
from server_tools import Scripted, exchange, scripted

KEY = "sk-0123456789abcdef"
BODY = {"prompt": "secret words", "max_tokens": 2}
ROUTES = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/scripted"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/responses"),
    ("GET", "/"),
    ("GET", "/page/app.js"),
    ("GET", "/nothing/here"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("OPTIONS", "/v1/completions"),
]


def get(served: Scripted, method: str = "GET", path: str = "/health", **options: Any) -> Any:
    return exchange(served.app, lambda client: client.request(method, path, **options))


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


def test_the_key_covers_every_route() -> None:
    served = scripted("x", settings={"api_key": KEY})
    known = {route.path for router in ROUTERS for route in router.routes}
    known -= {"/v1/models/{name:path}", "/page/{name}"}
    assert known <= {path for _, path in ROUTES}, "list new routes"

    async def work(client: httpx.AsyncClient) -> None:
        for method, path in ROUTES:
            for headers in (
                {},
                {"authorization": KEY},
                {"authorization": f"Bearer {KEY}x"},
                {"authorization": f"Bearer {KEY[:-1]}"},
                {"authorization": "Bearer "},
                {"authorization": "Bearer \xff"},
                {"authorization": basic("wrong")},
                {"authorization": "Basic !!!"},
                {"x-api-key": KEY},
            ):
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                response = await client.request(method, path, headers=encoded, json=BODY)
                assert response.status_code == 401, (method, path, headers)
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            for authorization in (f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)):
                headers = {"authorization": authorization}
                response = await client.request(method, path, headers=headers, json=BODY)
                assert response.status_code != 401, (method, path)
        page = await client.get("/", headers={"accept": "text/html,*/*"})
        assert page.headers["www-authenticate"].startswith("Basic")
        twice = [("authorization", f"Bearer {KEY}")] * 2
        assert (await client.get("/health", headers=twice)).status_code == 401
        assert served.core.n_steps == 2 * 3  # those with the key, to /v1/completions

    exchange(served.app, work)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    asked = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: asked.append((a, b)) or a == b)
    served = scripted("x", settings={"api_key": KEY})
    headers = {"authorization": f"Bearer {KEY}"}
    assert get(served, headers=headers).status_code == 200
    assert asked == [(KEY.encode(), KEY.encode())]


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5:8000", 200),  # an address is no name that could be rebound
        ("box.example.org", 200),
        ("evil.example.com", 421),
        ("localhost.evil.com", 421),
        ("127.0.0.1.evil.com", 421),
        ("user@localhost", 421),
        ("localhost/path", 421),
        ("localhost:port", 421),
        ("localhost:", 421),
        ("", 421),
        ("[::1", 421),
    ],
)
def test_host(host: str, status: int) -> None:
    served = scripted("x", settings={"allowed_hosts": ("box.example.org",)})
    response = get(served, headers={"host": host})
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://127.0.0.1", 200),
        ("https://app.example.org", 200),
        ("https://app.example.org:444", 403),
        ("http://app.example.org", 403),
        ("https://evil.com", 403),
        ("http://127.0.0.1:9999", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_origin(origin: str, status: int) -> None:
    served = scripted("x", settings={"allowed_origins": ("https://app.example.org",)})
    response = get(served, headers={"origin": origin})
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["code"] == "wrong_origin"
        assert "access-control-allow-origin" not in response.headers


def test_cross_origin_only_for_those_allowed() -> None:
    origin = "https://app.example.org"
    served = scripted("x", settings={"allowed_origins": (origin,), "api_key": KEY})
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    response = get(served, "OPTIONS", "/v1/completions", headers=preflight)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    headers = {"origin": origin, "authorization": f"Bearer {KEY}"}
    response = get(served, headers=headers)
    assert response.headers["access-control-allow-origin"] == origin
    assert get(served, headers={"origin": origin}).status_code == 401


def test_no_cross_origin_headers_by_default() -> None:
    response = get(scripted("x"), headers={"origin": "http://127.0.0.1"})
    assert response.status_code == 200 and "access-control-allow-origin" not in response.headers
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-request-id"].startswith("req_")


def post_raw(served: Scripted, content: Any, **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json"} | headers
    return get(served, "POST", "/v1/completions", content=content, headers=headers)


def test_header_size() -> None:
    served = scripted("x", settings={"max_header_bytes": 1000})
    assert get(served, headers={"x": "a" * 500}).status_code == 200
    assert get(served, headers={"x": "a" * 1000}).status_code == 431
    assert get(served, path="/health?" + "a" * 1000).status_code == 431


def test_body_size() -> None:
    served = scripted("x", settings={"max_body_bytes": 1000})
    filler = json.dumps({"prompt": "a" * 900}).encode()
    assert post_raw(served, filler).status_code == 200
    n_steps = served.core.n_steps
    assert post_raw(served, filler + b" " * 100).status_code == 413

    async def chunks() -> Any:  # without a Content-Length
        for _ in range(50):
            yield b" " * 100

    response = post_raw(served, chunks())
    assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    assert response.headers["connection"] == "close"
    assert served.core.n_steps == n_steps


def test_all_bodies_together() -> None:
    served = scripted("x", settings={"max_held_bytes": 1500, "max_body_bytes": 1000})
    body = json.dumps({"prompt": "a" * 800}).encode()
    gate = asyncio.Event()
    begun = []

    async def slow() -> Any:
        yield body[:100]
        begun.append(True)  # the server asks for more: it has the first part
        await gate.wait()
        yield body[100:]

    async def work(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}

        async def send(content: Any) -> httpx.Response:
            return await client.post("/v1/completions", content=content, headers=headers)

        waiting = [asyncio.create_task(send(slow())) for _ in range(8)]
        while len(begun) < len(waiting):
            await asyncio.sleep(0.001)
        refused = await send(body)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        gate.set()
        statuses = [(await task).status_code for task in waiting]
        assert set(statuses) <= {200, 503} and 200 in statuses
        assert (await send(body)).status_code == 200, "what was held is free again"

    exchange(served.app, work)


def test_content_type() -> None:
    served = scripted("x")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post_raw(served, b"{}", **{"content-type": kind}).status_code == 415
    good = {"content-type": "application/json; charset=utf-8"}
    assert post_raw(served, b'{"prompt": "a"}', **good).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b'{"prompt": "a"',
        b'{"prompt": "a"} x',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}",
        b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": [' + b"[]," * 300_000 + b"1]}",
        b'{"prompt": "' + b'\\"' * 200_000,
        b'{"prompt": "\\u00"}',
        b'{"prompt": "\\ud83e"}',
        b'{"prompt": "a", "user": "\\uDE00"}',
        b'{"\\ud800": 1}',
        b"\x00" * 100,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, CompletionRequest, Settings())
    assert caught.value.status == 400 and len(caught.value.message) < 500


def test_surrogate_pairs_are_characters() -> None:
    body = b'{"prompt": "\\ud83e\\udd9c \\\\ud800"}'
    assert parse(body, CompletionRequest, Settings()).prompt == ["\U0001f99c \\ud800"]


def test_brackets_in_strings_are_text() -> None:
    text = '[{"' * 1000 + "\\"
    body = json.dumps({"prompt": text}).encode()
    assert parse(body, CompletionRequest, Settings()).prompt == [text]


def test_errors_have_one_shape_and_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    served = scripted("x")
    served.core.fail = RuntimeError("CUDA error at /home/me/csrc/x.cu: 0x7f00dead")
    response = post_raw(served, json.dumps(BODY))
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "The server had an error.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert post_raw(served, json.dumps(BODY)).status_code == 200, "it goes on"

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("/etc/secret 0x7f00dead")

    served.model.request = broken  # type: ignore[method-assign]
    response = post_raw(served, json.dumps(BODY))
    assert response.status_code == 500 and "secret" not in response.text
    for method, path, status in (("GET", "/x", 404), ("GET", "/v1/completions", 405)):
        response = get(served, method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_failure_in_a_stream_is_an_event() -> None:
    served = scripted("a longer answer than that")

    async def work(client: httpx.AsyncClient) -> list[str]:
        served.core.delay = 0.01
        body = {"prompt": "a", "stream": True, "max_tokens": 4000, "ignore_eos": True}
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        while served.core.n_steps < 3:
            await asyncio.sleep(0.001)
        served.core.fail = RuntimeError("0x7f00dead")
        return (await task).text.split("\n\n")

    events = exchange(served.app, work)
    error = json.loads(events[-2].removeprefix("data: "))
    assert error["error"]["code"] == "internal_error" and len(events) > 2
    assert "[DONE]" not in "".join(events) and not served.core.sequences


def test_health_tells_of_an_engine_that_fails_again_and_again() -> None:
    served = scripted("x")

    async def work(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            served.core.fail = RuntimeError("no")
            response = await client.post("/v1/completions", json=BODY)
            assert response.status_code == 500
        assert (await client.get("/health")).status_code == 503
        refused = await client.post("/v1/completions", json=BODY)
        assert refused.status_code == 503 and refused.headers["retry-after"]

    exchange(served.app, work)


def test_logs_are_json_without_what_was_said() -> None:
    served = scripted("the secret answer", settings={"api_key": KEY})
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("gptoss")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        headers = {"authorization": f"Bearer {KEY}"}
        for body in (BODY, {"prompt": "secret", "temperature": "secret"}, {"secret": 1}):
            response = get(served, "POST", "/v1/completions", json=body, headers=headers)
        get(served, "GET", "/secret?secret=1", headers=headers)
        served.model.request = lambda *_: {}["secret"]  # type: ignore[method-assign]
        get(served, "POST", "/v1/completions", json=BODY, headers=headers)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 400, 404, 500]
    assert requests[0]["prompt_tokens"] > 0 and requests[0]["completion_tokens"] == 2
    assert requests[0]["route"] == "/v1/completions" and requests[0]["method"] == "POST"
    assert len({line["request_id"] for line in requests}) == 5
    assert response.headers["x-request-id"] == requests[2]["request_id"]
    assert any(line["level"] == "error" and line["error"] == "KeyError" for line in lines)
    assert "secret" not in output.getvalue() and KEY not in output.getvalue()


def test_metrics() -> None:
    served = scripted("a b c")

    async def work(client: httpx.AsyncClient) -> str:
        await client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 3})
        await client.post("/v1/completions", json={"prompt": 5})
        await client.get("/a/b/c")
        return (await client.get("/metrics")).text

    values = dict(
        line.rsplit(" ", 1)
        for line in exchange(served.app, work).splitlines()
        if not line.startswith("#")
    )
    expected = {
        "gptoss_running": 0,
        "gptoss_waiting": 0,
        "gptoss_prompt_tokens_total": 3,
        "gptoss_generated_tokens_total": 3,
        "gptoss_prefix_tokens_reused_total": 0,
        "gptoss_time_to_first_token_seconds_count": 1,
        "gptoss_time_per_token_seconds_count": 1,
        "gptoss_generations_cancelled_total": 0,
        'gptoss_cache_pages_in_use{layers="full"}': 0,
        'gptoss_cache_pages_in_use{layers="window"}': 0,
        'gptoss_requests_total{route="/v1/completions",status="200"}': 1,
        'gptoss_requests_total{route="/v1/completions",status="400"}': 1,
        'gptoss_requests_total{route="none",status="404"}': 1,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert float(values['gptoss_cache_pages{layers="full"}']) == served.core.full_pages
