"""From a parsed request to engine requests: the same way for every endpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from ..engine import Request
from ..sampling import SamplingParams
from .errors import ApiError
from .schemas import Sampling
from .served import ServedModel

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int | None = None

    def json(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage


def log_usage(request: HttpRequest, usage: dict[str, Any]) -> None:
    """Put the token counts into the request's line of the log."""
    request.state.exchange.fields |= {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


def sampling(
    body: Sampling, *, max_new_tokens: int | None, logprobs: int | None, stop: Sequence[str] = ()
) -> SamplingParams:
    """The engine's parameters for a request's fields.

    Temperature 0 takes the likeliest token: filters that come along with it have nothing to do.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    filters: dict[str, Any] = {}
    if temperature > 0:
        filters = {
            "top_k": max(body.top_k or 0, 0),  # -1 means all, too
            "top_p": 1.0 if body.top_p is None else max(body.top_p, 1e-9),  # 0: the likeliest
            "min_p": body.min_p or 0.0,
        }
    return checked(
        None,
        SamplingParams,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else body.seed % 2**64,
        stop=stop,
        stop_token_ids=body.stop_token_ids or (),
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
        **filters,
    )


def chat_requests(
    served: ServedModel,
    body: Sampling,
    *,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tool_choice: str | Mapping[str, Any],
    response_format: Mapping[str, Any] | None,
    reasoning_effort: str | None,
    max_new_tokens: int | None,
    n: int = 1,
    logprobs: int | None = None,
) -> list[Request]:
    """Engine requests for `n` answers to a conversation: rendered, bound by a grammar where a
    format or a tool choice asks for one, ended by harmony's stop tokens.

    `body.stop` is left out: stop strings are for what the user sees (answer.Answer). Takes a while
    for long conversations and new schemas: not for the event loop's thread.

    Raises:
        ApiError: 400 naming the field.
    """
    params = sampling(body, max_new_tokens=max_new_tokens, logprobs=logprobs)
    harmony = served.harmony
    prompt = checked(
        None,
        harmony.render,
        messages,
        reasoning_effort=reasoning_effort or "medium",
        tools=[] if tool_choice == "none" else tools,
        response_format=response_format,
    )
    bound = response_format is not None and response_format.get("type") != "text"
    # With "none", too: a conversation with calls in it can lead a model to one of a tool that it is
    # not told of, and only the grammar bars that.
    if tools or tool_choice not in ("auto", "none"):
        bound = True
    requests = []
    for index in range(n):
        constraint = None
        if bound:
            constraint = checked(None, served.grammar.harmony, response_format, tools, tool_choice)
        request = checked(
            "messages",
            served.model.request,
            prompt,
            with_seed(params, index),
            stop_tokens=harmony.stop_tokens,
            constraint=constraint,
        )
        requests.append(request)
    return requests


def with_seed(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of answer `index` to one prompt: a seed of its own if one is named."""
    if index == 0 or params.seed is None:
        return params
    return replace(params, seed=(params.seed + index) % 2**64)


def checked(
    param: str | None, function: Callable[..., Result], *arguments: Any, **fields: Any
) -> Result:
    """Call a function of this package that checks a client's values; its ValueError as a 400."""
    try:
        return function(*arguments, **fields)
    except ValueError as error:
        message = str(error)
        code = "context_length_exceeded" if "max_context" in message else None
        raise ApiError(400, message, param=param, code=code) from None
