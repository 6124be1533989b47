"""POST /v1/responses: an answer as typed items, at once or as typed events.

Nothing is kept: every request brings its whole conversation, and `store` is false in every answer.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..answer import Answer
from ..engine import Request, StreamEvent
from . import generation
from .body import read_request
from .driver import Batch
from .errors import ApiError
from .generation import Usage
from .logprobs import chat_logprob
from .responses_output import Event, Output, new_id
from .responses_schema import ResponsesRequest
from .served import ServedModel
from .stream import EventStream, answer, event

router = APIRouter()

# What these fields are called in errors of the code that chat completions share.
_CHAT_NAMES = (
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"response_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
)


class _Call:
    """One call of the endpoint: what was asked, and the response in the making."""

    def __init__(self, served: ServedModel, body: ResponsesRequest) -> None:
        self._served = served
        self._body = body
        self._id = new_id("resp")
        self._created = int(time.time())
        self._completed: int | None = None
        self._status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
        self._error: dict[str, str] | None = None
        self._usage: Usage | None = None
        self._output = Output()
        self._answer: Answer

    def prepare(self) -> list[Request]:
        """Check everything and turn the conversation into tokens. Takes long for long ones."""
        body = self._body
        tools, choice = body.chat_tools(), body.chat_tool_choice()
        try:
            requests = generation.chat_requests(
                self._served,
                body,
                messages=body.messages(),
                tools=tools,
                tool_choice=choice,
                response_format=body.text_format().response_format(),
                reasoning_effort=body.reasoning.effort if body.reasoning else None,
                max_new_tokens=body.max_output_tokens,
                logprobs=body.logprobs,
            )
        except ApiError as error:
            raise _renamed(error) from None
        names = [] if choice == "none" else [tool["function"]["name"] for tool in tools]
        self._answer = Answer(self._served.harmony.parser(names), body.stop)
        return requests

    def begin(self) -> Iterator[Event]:
        """The events before the first token."""
        yield {"type": "response.created", "response": self.json()}
        yield {"type": "response.in_progress", "response": self.json()}

    def add(self, events: list[StreamEvent]) -> Iterator[Event]:
        """Take new tokens; give the events that they make."""
        for piece in self._answer.push(events):
            logprobs = [chat_logprob(self._served.tokenizer, each) for each in piece.logprobs]
            yield from self._output.add(piece.delta, logprobs)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._answer.stopped

    def count(self, batch: Batch) -> Usage:
        """Tokens so far."""
        self._usage = Usage(
            prompt_tokens=len(batch.generations[0].request.tokens),
            completion_tokens=self._answer.n_tokens,
            cached_tokens=batch.generations[0].reused_tokens,
            reasoning_tokens=self._answer.n_reasoning_tokens,
        )
        return self._usage

    def finish(self) -> Iterator[Event]:
        """The last token has come."""
        status = "incomplete" if self._answer.finish_reason == "length" else "completed"
        yield from self._output.close(status)
        self._status = status
        self._completed = int(time.time())
        yield {"type": f"response.{status}", "response": self.json()}

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The answer has ended before its end."""
        yield from self._output.close("incomplete")
        self._status = "failed"
        self._error = {"code": "server_error", "message": error.message}
        yield {"type": "response.failed", "response": self.json()}

    def json(self) -> dict[str, Any]:
        """The response as it is now."""
        body = self._body
        cut = self._status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self._status,
            "background": False,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._served.name,
            "output": self._output.json(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {
                "effort": (body.reasoning and body.reasoning.effort) or "medium",
                "summary": None,
            },
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text_format().echo(), "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": _usage_object(self._usage) if self._usage else None,
            "user": body.user,
        }


def _usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,  # none that anybody pays for
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _renamed(error: ApiError) -> ApiError:
    """An error with fields called what they are here."""
    message = error.message
    for pattern, name in _CHAT_NAMES:
        message = pattern.sub(name, message)
    param = "input" if error.param == "messages" else error.param
    return ApiError(error.status, message, code=error.code, param=param)


@router.post("/v1/responses")
async def create_response(request: HttpRequest) -> Response:
    """Answer a conversation."""
    body = await read_request(request, ResponsesRequest)
    state = request.app.state
    call = _Call(state.served, body)
    batch = state.driver.submit(await asyncio.to_thread(call.prepare))
    if body.streams:
        return EventStream(_numbered(_events(request, call, batch)), batch)
    try:
        return JSONResponse(await answer(request, _whole(request, call, batch)))
    finally:
        batch.close()


async def _whole(request: HttpRequest, call: _Call, batch: Batch) -> dict[str, Any]:
    """The answer as one object."""
    async with aclosing(_answered(request, call, batch)) as events:
        async for _ in events:
            pass
    return call.json()


async def _events(request: HttpRequest, call: _Call, batch: Batch) -> AsyncGenerator[Event, None]:
    """All events of an answer. One that fails on the way ends with response.failed."""
    for each in call.begin():
        yield each
    try:
        async with aclosing(_answered(request, call, batch)) as events:
            async for each in events:
                yield each
    except ApiError as error:
        call.count(batch)
        for each in call.fail(error):
            yield each


async def _answered(request: HttpRequest, call: _Call, batch: Batch) -> AsyncGenerator[Event, None]:
    """The events from the first token on."""
    async with aclosing(aiter(batch)) as arrivals:
        async for index, events in arrivals:
            for each in call.add(events):
                yield each
            if call.stopped:
                batch.end(index)
    generation.log_usage(request, call.count(batch).json())
    for each in call.finish():
        yield each


async def _numbered(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """Events as bytes, each with its number."""
    number = 0
    async with aclosing(events):
        async for each in events:
            yield event({**each, "sequence_number": number}, each["type"])
            number += 1
