"""Log probabilities in the two shapes that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..engine import TokenLogprob
from ..tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The text of one token; bytes that are no text as OpenAI writes them, "bytes:\\xe2\\x82"."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in data])


def finite(logprob: float) -> float:
    """`logprob`, as JSON can have it."""
    return max(logprob, _LEAST)


class CompletionLogprobs:
    """The `logprobs` object of one choice of /v1/completions: four lists with a place a token."""

    def __init__(self, tokenizer: Tokenizer, n_top: int) -> None:
        self._tokenizer = tokenizer
        self._n_top = n_top
        self._detokenizer = tokenizer.detokenizer()
        self._offset = 0  # characters before the next token
        self._lists = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, top: Iterable[tuple[int, float]]) -> None:
        """One more token; `logprob` is None for the first of a prompt."""
        name = token_name(self._tokenizer, token)
        likeliest = None
        if logprob is not None:
            logprob = finite(logprob)
            likeliest = {}
            # Different tokens can have one name, such as "\ufffd": the likelier one keeps it.
            for other, value in top:
                likeliest.setdefault(token_name(self._tokenizer, other), finite(value))
            likeliest.setdefault(name, logprob)
        self._lists["tokens"].append(name)
        self._lists["token_logprobs"].append(logprob)
        self._lists["top_logprobs"].append(likeliest if self._n_top else None)
        self._lists["text_offset"].append(self._offset)
        self._offset += len(self._detokenizer.push(token))

    def take(self) -> dict[str, list[Any]]:
        """What was added since the last call."""
        lists, self._lists = self._lists, self._empty()
        return lists


def chat_logprob(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    """One entry of `logprobs.content` of a chat completion."""

    def entry(token: int, value: float) -> dict[str, Any]:
        return {
            "token": token_name(tokenizer, token),
            "logprob": finite(value),
            "bytes": list(tokenizer.token_bytes(token)),
        }

    top = [entry(token, value) for token, value in logprob.top]
    return {**entry(logprob.token, logprob.logprob), "top_logprobs": top}
