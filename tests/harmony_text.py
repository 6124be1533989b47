"""Harmony as readable text, for tests: special tokens are written by name."""

import re

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
