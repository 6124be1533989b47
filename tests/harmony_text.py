"""Harmony as readable text, for tests: special tokens are written by name."""

import re
from collections.abc import Iterable

from gptoss.tokenizer import Tokenizer

_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which "<|start|>" and the like are the special tokens themselves."""
    tokens = []
    for index, part in enumerate(_SPECIAL.split(text)):
        if index % 2:
            token = tokenizer.token_id(part)
            assert token is not None, part
            tokens.append(token)
        else:
            tokens += tokenizer.encode(part)
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
