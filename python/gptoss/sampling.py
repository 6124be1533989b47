"""How the next token is chosen, and when a generation ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIASES = 4096
_MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of one generation. Every field is checked when the object is made.

    The order of work on a row of logits: `logit_bias`, penalties, `temperature`; then of the
    likeliest tokens `top_k` stay, of those the smallest set that has `top_p` of their probability,
    of those the ones that `min_p` leaves; one of the rest is drawn.

    Attributes:
        max_new_tokens: at most this many new tokens; None means as many as the context holds.
        temperature: divides the logits; 0 always takes the likeliest token. Since that leaves
            nothing to draw from, 0 together with `top_k` > 1, `top_p` < 1 or `min_p` > 0 is
            refused.
        top_k: draw from the k likeliest tokens only; 0 means all.
        top_p: draw from the smallest set of likeliest tokens that has this much probability, in (0,
            1].
        min_p: drop tokens less likely than this fraction of the likeliest one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of the tokens seen in
            prompt and output, in (0, 10]; 1 is off.
        presence_penalty: subtracted from the logits of tokens already generated, in [-2, 2].
        frequency_penalty: the same, times how often each was generated, in [-2, 2].
        logit_bias: token id -> number added to its logit, in [-100, 100].
        seed: the same seed, prompt and parameters give the same tokens, alone or in a batch; None
            draws a fresh one for every generation. 0 <= seed < 2**64.
        stop: a string or strings that end the generation; the text before them is kept.
        stop_token_ids: tokens that end it, besides the checkpoint's own.
        logprobs: None for none, else return the log probability of every new token and of this many
            likeliest ones, 0 to 20. They are the model's own, before any of the above.
        ignore_eos: go on after the checkpoint's stop tokens (`stop_token_ids` still end it).

    Raises:
        ValueError: a field has the wrong type or value, or two contradict each other; the message
            names it.
    """

    max_new_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._check("max_new_tokens", _optional(_integer(1, _MAX_TOKEN_ID)))
        self._check("temperature", _number(0, 100))
        self._check("top_k", _integer(0, _MAX_TOKEN_ID))
        self._check("top_p", _number(0, 1, above=True))
        self._check("min_p", _number(0, 1))
        self._check("repetition_penalty", _number(0, 10, above=True))
        self._check("presence_penalty", _number(-2, 2))
        self._check("frequency_penalty", _number(-2, 2))
        self._check("logit_bias", _logit_bias)
        self._check("seed", _optional(_integer(0, 2**64 - 1)))
        self._check("stop", _stop_strings)
        self._check("stop_token_ids", _stop_tokens)
        self._check("logprobs", _optional(_integer(0, MAX_LOGPROBS)))
        self._check("ignore_eos", _boolean)
        if self.temperature == 0 and (self.top_k > 1 or self.top_p < 1 or self.min_p > 0):
            raise ValueError(
                "temperature 0 always takes the likeliest token: it contradicts "
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}"
            )

    def _check(self, name: str, normalized: Callable[[Any], Any]) -> None:
        """Replace a field by its checked, plain form (float, tuple, dict of its own)."""
        try:
            value = normalized(getattr(self, name))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        object.__setattr__(self, name, value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"must be an integer, not {_shown(value)}")
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}, not {_shown(value)}")
        return int(value)

    return check


def _number(low: float, high: float, above: bool = False) -> Callable[[Any], float]:
    """A finite number in [low, high], or in (low, high] if it must be `above` low."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise ValueError(f"must be a number, not {_shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not low <= number <= high or (above and number == low):  # NaN fails the first
            least = f"above {low}" if above else f"from {low}"
            raise ValueError(f"must be {least} to {high}, not {_shown(value)}")
        return number

    return check


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be True or False, not {_shown(value)}")
    return value


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"must map token ids to numbers, not be {_shown(value)}")
    if len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"may have {MAX_LOGIT_BIASES} entries, not {len(value)}")
    token, bias = _integer(0, _MAX_TOKEN_ID), _number(-100, 100)
    return {token(key): bias(number) for key, number in value.items()}


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a string or a list of strings, not {_shown(value)}")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"may have {MAX_STOPS} strings, not {len(stops)}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise ValueError(
                f"strings must have 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}"
            )
        if any("\ud800" <= character <= "\udfff" for character in stop):
            raise ValueError(f"strings must be valid Unicode, not {_shown(stop)}")
    return tuple(stops)


def _stop_tokens(value: Any) -> tuple[int, ...]:
    tokens = () if value is None else value
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, (Sequence, set, frozenset)):
        raise ValueError(f"must be a list of token ids, not {_shown(value)}")
    if len(tokens) > MAX_STOP_TOKENS:
        raise ValueError(f"may have {MAX_STOP_TOKENS} ids, not {len(tokens)}")
    return tuple(_integer(0, _MAX_TOKEN_ID)(token) for token in tokens)
