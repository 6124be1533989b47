"""Schemas, tools and walks for the tests of structured output."""

import random
from typing import Any

import numpy as np
from gptoss.grammar import GrammarConstraint
from gptoss.tokenizer import Tokenizer

Schema = dict[str, Any]


def an_object(**properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


PERSON = an_object(
    name={"type": "string"},
    age={"type": "integer", "minimum": 0, "maximum": 150},
    tags={"type": "array", "items": {"enum": ["a", "b", 'c"\\']}, "maxItems": 3},
)
TREE = {
    "$defs": {
        "node": an_object(
            value={"type": ["number", "null"]},
            children={"type": "array", "items": {"$ref": "#/$defs/node"}},
        )
    },
    "$ref": "#/$defs/node",
}
ORDER = an_object(
    id={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"},
    when={"type": "string", "format": "date"},
    item={"anyOf": [an_object(kind={"const": "a"}), an_object(kind={"const": "b"}, n=PERSON)]},
    text={"type": "string", "maxLength": 12},
)
INJECTION = an_object(**{'"} \n start: /.*/ ': {"const": "\n%json {} <[1]> <|return|>"}})
SCHEMAS = {"person": PERSON, "tree": TREE, "order": ORDER, "injection": INJECTION}


def function(name: str, parameters: Schema | None = None, strict: bool | None = None) -> Schema:
    content = {"name": name, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": {k: v for k, v in content.items() if v is not None}}


def named(name: str) -> Schema:
    return {"type": "function", "function": {"name": name}}


def json_schema(schema: Any, strict: Any = True) -> Schema:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


TOOLS = [
    function("get", PERSON, strict=True),
    function("get_weather", an_object(city={"type": "string"})),
    function("now"),
]
ARGUMENTS = {"get": PERSON, "get_weather": an_object(city={"type": "string"}), "now": an_object()}


class Walk:
    """Draws a turn at random under its masks, and takes it apart by its special tokens."""

    def __init__(self, tokenizer: Tokenizer, constraint: GrammarConstraint, seed: int) -> None:
        self.tokenizer = tokenizer
        self.constraint = constraint
        self.random = random.Random(seed)
        ends = ("<|return|>", "<|call|>")
        self.last = {id: name for name in ends if (id := tokenizer.token_id(name)) is not None}
        self.closing = closing_tokens(tokenizer)
        self.tokens: list[int] = []

    def allowed(self) -> np.ndarray:
        mask = self.constraint.mask()
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))

    def run(self, limit: int = 4000) -> "Walk":
        while not self.tokens or self.tokens[-1] not in self.last:
            allowed = self.allowed()
            assert len(allowed) > 0, self.tokenizer.decode(self.tokens)
            closing = [token for token in self.closing if token in allowed]
            choices = closing if closing and self.random.random() < 0.5 else allowed
            token = int(self.random.choice(choices))
            self.constraint.accept(token)
            self.tokens.append(token)
            assert len(self.tokens) < limit, self.tokenizer.decode(self.tokens)
        return self

    def messages(self) -> list[tuple[str, str]]:
        """(header, text) of every message; the header of the last without what ends it."""
        end = self.last[self.tokens[-1]]
        text = self.tokenizer.decode(self.tokens).removesuffix(end)
        found = [part.partition("<|message|>") for part in text.split("<|end|><|start|>assistant")]
        return [(header, content) for header, _, content in found]


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that end something, or lead to an end."""
    names = ("<|end|>", "<|return|>", "<|call|>")
    special = [id for name in names if (id := tokenizer.token_id(name)) is not None]
    return special + [tokenizer.encode(text)[0] for text in ('"', "}", "]", ",")]
