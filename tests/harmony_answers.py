"""What gpt-oss writes, for scripted models: answers in the harmony format, as token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gptoss.tokenizer import Tokenizer

_CONTROL = re.compile(r"(<\|[a-z]+\|>)")


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text`, in which names like <|channel|> are the control tokens."""
    tokens: list[int] = []
    for part in _CONTROL.split(text):
        control = tokenizer.token_id(part) if _CONTROL.fullmatch(part) else None
        tokens += tokenizer.encode(part) if control is None else [control]
    return tokens


def thought(text: str) -> str:
    """Reasoning, and the beginning of the next message."""
    return f"<|channel|>analysis<|message|>{text}<|end|><|start|>assistant"


def final(text: str) -> str:
    """An answer to the user, which ends the turn."""
    return f"<|channel|>final<|message|>{text}<|return|>"


def call(name: str, arguments: str) -> str:
    """A call of a function, which ends the turn."""
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json"
    return f"{header}<|message|>{arguments}<|call|>"


def last_message(tokenizer: Tokenizer, prompt: Iterable[int]) -> tuple[str, str]:
    """(header, text) of the last message in a prompt, which ends with "<|start|>assistant"."""
    message = tokenizer.decode(prompt).split("<|start|>")[-2]
    header, _, text = message.removesuffix("<|end|>").partition("<|message|>")
    return header, text
