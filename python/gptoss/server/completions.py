"""POST /v1/completions: text continued as it is."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from ..engine import Request, StreamEvent
from . import generation
from .body import read_request
from .driver import Batch
from .errors import ApiError
from .generation import Usage
from .logprobs import CompletionLogprobs
from .prompt_logprobs import PromptScore
from .schemas import CompletionRequest
from .served import ServedModel
from .stream import DONE, EventStream, answer, event

router = APIRouter()


@dataclass(slots=True)
class _Choice:
    """One answer in the making."""

    index: int
    prompt: list[int]
    logprobs: CompletionLogprobs | None
    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None

    def add(self, events: list[StreamEvent]) -> str:
        """Take new tokens; return their text."""
        text = "".join([e.text for e in events])
        if self.logprobs is not None:
            for each in events:
                assert each.logprob is not None
                self.logprobs.add(each.token, each.logprob.logprob, each.logprob.top)
        self.text += text
        self.n_tokens += len(events)
        self.finish_reason = events[-1].finish_reason
        return text


class _Completion:
    """One call of the endpoint: what was asked, and the objects that answer it."""

    def __init__(self, served: ServedModel, body: CompletionRequest) -> None:
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._served = served
        self._body = body
        self.requests: list[Request] = []
        self.choices: list[_Choice] = []

    def prepare(self, max_choices: int) -> None:
        """Check everything and turn prompts into tokens. Takes long for long prompts."""
        body, model = self._body, self._served.model
        n = body.n or 1
        if n * len(body.prompt) > max_choices:
            raise ApiError(400, f"n times prompts may be {max_choices}.", param="n")
        n_new = 16 if body.max_tokens is None else max(body.max_tokens, 1)
        params = generation.sampling(
            body, max_new_tokens=n_new, logprobs=body.logprobs, stop=body.stop
        )
        for prompt in body.prompt:
            first = generation.checked("prompt", model.request, prompt, params)
            for index in range(n):
                params_of = generation.with_seed(params, index)
                self.requests.append(replace(first, params=params_of))
        for index, request in enumerate(self.requests):
            logprobs = None
            if body.logprobs is not None:
                logprobs = CompletionLogprobs(self._served.tokenizer, body.logprobs)
            self.choices.append(_Choice(index, request.tokens, logprobs))

    def echo(self, scores: list[PromptScore] | None) -> list[str]:
        """Put the prompts in front of the answers; return their texts."""
        texts = []
        n = self._body.n or 1
        for choice in self.choices:
            text = self._served.tokenizer.decode(choice.prompt)
            choice.text = text
            if choice.logprobs is not None and scores is not None:
                score = scores[choice.index // n]
                for token, logprob, top in zip(
                    choice.prompt, score.logprobs, score.top, strict=True
                ):
                    choice.logprobs.add(token, logprob, top)
            texts.append(text)
        return texts

    def usage(self, batch: Batch | None) -> dict[str, Any]:
        """Prompts count once, however many answers they have."""
        n = self._body.n or 1
        prompts = self.requests[::n]
        return Usage(
            prompt_tokens=sum(len(request.tokens) for request in prompts),
            completion_tokens=sum(choice.n_tokens for choice in self.choices),
            cached_tokens=sum(g.reused_tokens for g in batch.generations[::n]) if batch else 0,
        ).json()

    def object(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """The answer, or one event of it."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
            **fields,
        }


def _choice_object(choice: _Choice, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": text,
        "logprobs": choice.logprobs.take() if choice.logprobs is not None else None,
        "finish_reason": finish_reason,
    }


@router.post("/v1/completions")
async def create_completion(request: HttpRequest) -> Response:
    """Continue one text or several, each `n` times."""
    body = await read_request(request, CompletionRequest)
    state = request.app.state
    call = _Completion(state.served, body)
    await asyncio.to_thread(call.prepare, state.settings.max_choices)

    texts = None
    if body.echo:
        scores = None
        if body.logprobs is not None:
            prompts = [r.tokens for r in call.requests[:: body.n or 1]]
            scores = await answer(request, state.scorer.score(prompts, body.logprobs))
        texts = call.echo(scores)
    batch = state.driver.submit(call.requests) if body.max_tokens != 0 else None
    if body.streams:
        return EventStream(_events(request, call, batch, texts, body.stream_usage), batch)
    try:
        return JSONResponse(await answer(request, _whole(request, call, batch)))
    finally:
        if batch is not None:
            batch.close()


async def _whole(request: HttpRequest, call: _Completion, batch: Batch | None) -> dict[str, Any]:
    """The answer as one object."""
    if batch is not None:
        async for index, events in batch:
            call.choices[index].add(events)
    generation.log_usage(request, usage := call.usage(batch))
    choices = [
        _choice_object(choice, choice.text, choice.finish_reason or "length")
        for choice in call.choices
    ]
    return call.object(choices, usage=usage)


async def _events(
    request: HttpRequest,
    call: _Completion,
    batch: Batch | None,
    texts: list[str] | None,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    usage = {"usage": None} if with_usage else {}
    for choice, text in zip(call.choices, texts or [], strict=False):
        finish_reason = None if batch else "length"
        yield event(call.object([_choice_object(choice, text, finish_reason)], **usage))
    if batch is not None:
        async with aclosing(aiter(batch)) as arrivals:
            async for index, events in arrivals:
                choice = call.choices[index]
                text = choice.add(events)
                if text or choice.finish_reason or choice.logprobs is not None:
                    part = _choice_object(choice, text, choice.finish_reason)
                    yield event(call.object([part], **usage))
    generation.log_usage(request, total := call.usage(batch))
    if with_usage:
        yield event(call.object([], usage=total))
    yield DONE
