"""What clients may send: the request bodies of OpenAI's API, and this engine's extra fields.

Every number has bounds. Types are strict: "1" is no number, 1.0 no integer. Fields that are not
here are refused as unknown, as OpenAI does. Fields that OpenAI has and that change nothing here are
accepted and ignored; fields that would change the answer and are not supported are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..sampling import MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS

MAX_TOKENS = 2**31 - 1
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_PROMPTS = 128
MAX_CHOICES = 128
_MAX_TOKEN_ID = 2**31 - 1


class Strict(BaseModel):
    """Base of all bodies and their parts."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def _as_stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _as_biases(value: Any) -> Any:
    """JSON has token ids as strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"may have {MAX_LOGIT_BIASES} entries")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"{key[:20]!r} is not a token id")
        biases[int(key)] = bias
    return biases


def _as_prompts(value: Any) -> Any:
    """A text, texts, token ids, or lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, token ids, or a list of either")
    prompts = [value] if isinstance(value[0], int) else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"may have {MAX_PROMPTS} prompts")
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise ValueError("must be a string, token ids, or a list of either")
    return prompts


TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[
    Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS)],
    BeforeValidator(_as_stops),
]
Prompts = Annotated[Any, BeforeValidator(_as_prompts)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_as_biases)
]


class Body(Strict):
    """Base of all bodies."""

    model: Annotated[str, Field(max_length=128)] | None = None


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: nothing is padded


class Sampling(Body):
    """Fields that completions, chat and responses share. None means the default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_TOKEN_ID)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = []
    stop_token_ids: (
        Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)] | None
    ) = None
    ignore_eos: bool | None = None


class Streamed(Strict):
    """How the answer comes."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes as events."""
        return bool(self.stream)

    @property
    def stream_usage(self) -> bool:
        """Whether the last event tells the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self


class Ignored(Strict):
    """Fields that chat and responses share, and that change nothing here."""

    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class CompletionRequest(Sampling, Streamed):
    """Body of POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None  # as OpenAI: 16
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None
    user: str | None = None  # ignored

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.suffix:
            raise ValueError("suffix is not supported: the model only continues a text")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is only supported if it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        return self


class ChatRequest(Sampling, Streamed, Ignored):
    """Body of POST /v1/chat/completions. Messages and tools are checked by what renders them."""

    messages: Annotated[
        list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
    ]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = (
        None
    )
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # the format makes one call a turn
    modalities: list[Literal["text"]] | None = None
    # What changes nothing here, either.
    metadata: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self


class TokenizeRequest(Body):
    """Body of POST /tokenize: plain text."""

    prompt: str


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
