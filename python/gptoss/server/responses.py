"""POST /v1/responses: an answer as typed items, at once or as typed events.

Nothing is kept: every request brings its whole conversation, and `store` is false in every answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine import Request, StreamEvent
from . import generation
from .body import read_request
from .driver import Batch
from .errors import ApiError
from .responses_output import Event, ItemStatus, Output, new_id
from .responses_schema import ResponsesRequest
from .served import ServedModel
from .stream import EventStream, answer, event

router = APIRouter()


class _Call:
    """One call of the endpoint: what was asked, and the response in the making."""

    def __init__(self, served: ServedModel, body: ResponsesRequest) -> None:
        self._served = served
        self._body = body
        self._id = new_id("resp")
        self._created = int(time.time())
        self._completed: int | None = None
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._usage: dict[str, Any] | None = None
        self._output = Output()
        self._n_events = 0

    def prepare(self) -> Request:
        """Check everything and turn the conversation into tokens. Takes long for long ones."""
        body = self._body
        return generation.chat_request(
            self._served,
            body,
            messages=body.messages(),
            tools=body.chat_tools(),
            tool_choice=body.chat_tool_choice(),
            response_format=body.text_format().response_format(),
            reasoning_effort=body.reasoning.effort if body.reasoning else None,
            max_new_tokens=body.max_output_tokens,
            stop=body.stop,
        )

    def begin(self) -> Iterator[Event]:
        """The events before the first token."""
        yield {"type": "response.created", "response": self.json()}
        yield {"type": "response.in_progress", "response": self.json()}

    def add(self, events: Iterable[StreamEvent]) -> Iterator[Event]:
        """Take new tokens; give the events that they make."""
        raise NotImplementedError

    def finish(self, batch: Batch) -> Iterator[Event]:
        """The last token has come."""
        raise NotImplementedError

    def fail(self, error: ApiError) -> Iterator[Event]:
        """The answer ends before its end."""
        yield from self._output.close("incomplete")
        self._status = "failed"
        self._error = {"code": "server_error", "message": error.message}
        yield {"type": "response.failed", "response": self.json()}

    def json(self) -> dict[str, Any]:
        """The response as it is now."""
        body = self._body
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        effort = body.reasoning.effort if body.reasoning else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._completed,
            "status": self._status,
            "error": self._error,
            "incomplete_details": incomplete,
            "model": self._served.name,
            "output": self._output.json(),
            "usage": self._usage,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "background": False,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text_format().echo(), "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }
