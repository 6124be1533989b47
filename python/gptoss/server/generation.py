"""From a parsed request to engine requests: the same way for every endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from ..engine import Request
from ..sampling import SamplingParams
from .errors import ApiError
from .schemas import Sampling

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


def repeated(request: Request, n: int) -> list[Request]:
    """`n` answers to one request, each with a seed of its own if it names one."""
    requests = [request]
    for index in range(1, n):
        seed = request.params.seed
        if seed is not None:
            seed = (seed + index) % 2**64
        requests.append(replace(request, params=replace(request.params, seed=seed)))
    return requests


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
