"""POST /v1/chat/completions: an answer to a conversation, its reasoning and its tool calls."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..answer import Answer, Piece
from ..engine import Request, TokenLogprob
from ..harmony import Delta
from . import generation
from .body import read_request
from .driver import Batch
from .errors import ApiError
from .generation import Usage
from .logprobs import chat_logprob
from .schemas import ChatRequest
from .served import ServedModel
from .stream import DONE, EventStream, answer, event

router = APIRouter()


class _Message:
    """One choice: the answer, and the message it has become so far."""

    def __init__(self, parsed: Answer) -> None:
        self.answer = parsed
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[TokenLogprob] = []

    def add(self, piece: Piece) -> None:
        """Put a piece where it belongs."""
        delta = piece.delta
        self._logprobs += piece.logprobs
        if delta.kind == "reasoning":
            self._reasoning.append(delta.text)
        elif delta.kind == "content":
            self._content.append(delta.text)
        elif delta.name is not None:
            self._calls.append(_call_object(delta))
        else:
            self._calls[delta.index]["function"]["arguments"] += delta.text

    def object(self) -> dict[str, Any]:
        """OpenAI's message object."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning"] = message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the content's tokens."""
        return self._logprobs


class _Chat:
    """One call of the endpoint: what was asked, and the objects that answer it."""

    def __init__(self, served: ServedModel, body: ChatRequest) -> None:
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._served = served
        self._body = body
        self.requests: list[Request] = []
        self.messages: list[_Message] = []

    def prepare(self, max_choices: int) -> None:
        """Check everything and render the conversation."""
        body = self._body
        n = body.n or 1
        if n > max_choices:
            raise ApiError(400, f"n may be {max_choices}.", param="n")
        tools = body.tools or []
        choice = body.tool_choice or "auto"
        self.requests = generation.chat_requests(
            self._served,
            body,
            messages=body.messages,
            tools=tools,
            tool_choice=choice,
            response_format=body.response_format,
            reasoning_effort=body.reasoning_effort,
            max_new_tokens=body.max_completion_tokens or body.max_tokens,
            n=n,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        callable_tools = [] if choice == "none" else tools
        names = [tool["function"]["name"] for tool in callable_tools]
        for _ in self.requests:
            parser = self._served.harmony.parser(names)
            self.messages.append(_Message(Answer(parser, body.stop)))

    def usage(self, batch: Batch) -> dict[str, Any]:
        """OpenAI's usage object."""
        answers = [message.answer for message in self.messages]
        return Usage(
            prompt_tokens=len(self.requests[0].tokens),
            completion_tokens=sum(a.n_tokens for a in answers),
            cached_tokens=batch.generations[0].reused_tokens,
            reasoning_tokens=sum(a.n_reasoning_tokens for a in answers),
        ).json()

    def completion(self, batch: Batch) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": message.object(),
                "logprobs": self._logprobs(message.logprobs),
                "finish_reason": message.answer.finish_reason,
            }
            for index, message in enumerate(self.messages)
        ]
        return self._object("chat.completion", choices, usage=self.usage(batch))

    def chunk(
        self, index: int, delta: dict[str, Any], finish: str | None, piece: Piece | None = None
    ) -> bytes:
        """One event of the answer."""
        logprobs = self._logprobs(piece.logprobs) if piece and piece.logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._event([choice], {"usage": None} if self._body.stream_usage else {})

    def last_chunk(self, usage: dict[str, Any]) -> bytes:
        """The event that tells the usage."""
        return self._event([], {"usage": usage})

    def _event(self, choices: list[dict[str, Any]], fields: dict[str, Any]) -> bytes:
        return event(self._object("chat.completion.chunk", choices, **fields))

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [chat_logprob(self._served.tokenizer, each) for each in logprobs]
        return {"content": content, "refusal": None}

    def _object(self, kind: str, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
            **fields,
        }


def _call_object(delta: Delta) -> dict[str, Any]:
    function = {"name": delta.name, "arguments": delta.text}
    return {"id": delta.id, "type": "function", "function": function}


def _delta_object(delta: Delta) -> dict[str, Any]:
    """A piece of a message, as events have it."""
    if delta.kind == "reasoning":
        return {"reasoning": delta.text, "reasoning_content": delta.text}
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.name is not None:
        return {"tool_calls": [{"index": delta.index, **_call_object(delta)}]}
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}


@router.post("/v1/chat/completions")
async def create_chat_completion(request: HttpRequest) -> Response:
    """Answer a conversation, `n` times."""
    body = await read_request(request, ChatRequest)
    state = request.app.state
    chat = _Chat(state.served, body)
    await asyncio.to_thread(chat.prepare, state.settings.max_choices)
    batch = state.driver.submit(chat.requests)
    if body.streams:
        return EventStream(_events(request, chat, batch, body.stream_usage), batch)
    try:
        return JSONResponse(await answer(request, _whole(request, chat, batch)))
    finally:
        batch.close()


async def _whole(request: HttpRequest, chat: _Chat, batch: Batch) -> dict[str, Any]:
    """The answer as one object."""
    async with aclosing(_pieces(chat, batch)) as arrivals:
        async for index, pieces in arrivals:
            for piece in pieces:
                chat.messages[index].add(piece)
    completion = chat.completion(batch)
    generation.log_usage(request, completion["usage"])
    return completion


async def _events(
    request: HttpRequest, chat: _Chat, batch: Batch, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    for index in range(len(chat.messages)):
        yield chat.chunk(index, {"role": "assistant", "content": ""}, None)
    async with aclosing(_pieces(chat, batch)) as arrivals:
        async for index, pieces in arrivals:
            for piece in pieces:
                yield chat.chunk(index, _delta_object(piece.delta), None, piece)
            if finish := chat.messages[index].answer.finish_reason:
                yield chat.chunk(index, {}, finish)
    generation.log_usage(request, usage := chat.usage(batch))
    if with_usage:
        yield chat.last_chunk(usage)
    yield DONE


async def _pieces(chat: _Chat, batch: Batch) -> AsyncGenerator[tuple[int, list[Piece]], None]:
    """(index of the choice, what it shows next), as they come."""
    async with aclosing(aiter(batch)) as arrivals:
        async for index, events in arrivals:
            parsed = chat.messages[index].answer
            pieces = parsed.push(events)
            if parsed.stopped:
                batch.end(index)
            yield index, pieces
