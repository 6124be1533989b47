"""What structured output costs: the time to compile a schema, and of a mask for each token.

    python bench/grammar.py TOKENIZER.json

Each schema's answer is written with indentation and without, behind some reasoning, token by token
as a model would; every mask must allow the token that comes. One JSON row a schema with --json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from gptoss.grammar import GrammarCompiler, GrammarConstraint
from gptoss.tokenizer import Tokenizer

THOUGHT = """The user wants a JSON object. Let me see what "fields" there are: name, age...

1. We need `name` — a string; 2. numbers; 3. naïve café, 日本語, 🙂. Then answer."""
LOREM = 'She said: "the quick brown fox" jumps over the lazy dog, twice\n a day; costs 3.50 €. '


def an_object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
PERSON = an_object(name=TEXT, age={"type": "integer"}, tags={"type": "array", "items": TEXT})
TREE = an_object(value=TEXT, children={"type": "array", "items": {"$ref": "#"}})
WIDE = an_object(**{f"property_{i}": TEXT if i % 2 else NUMBER for i in range(200)})
CODES = [f"code-{i * 7919 % 100003}" for i in range(1000)]
PATTERN = {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,6}$"}
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "any object": ({"type": "object"}, {"text": LOREM * 3, "list": [1, None, {"a": -2.5e3}]}),
    "person": (PERSON, {"name": LOREM, "age": 36, "tags": ["a", "b c"]}),
    "recursive": (TREE, {"value": LOREM, "children": [{"value": LOREM, "children": []}] * 4}),
    "200 properties": (WIDE, {f"property_{i}": LOREM if i % 2 else i / 8 for i in range(200)}),
    "enum of 1000": (an_object(codes={"items": {"enum": CODES}}), {"codes": CODES[::50]}),
    "patterns": (
        an_object(id=PATTERN, day={"type": "string", "format": "date"}, note={"maxLength": 400}),
        {"id": "ABC-12345", "day": "2025-08-05", "note": LOREM * 3},
    ),
}


def replay(constraint: GrammarConstraint, tokens: list[int]) -> tuple[list[float], list[float]]:
    """Seconds for each mask, and for each token to be taken."""
    masks, accepts = [], []
    for token in tokens:
        start = time.perf_counter()
        mask = constraint.mask()
        made = time.perf_counter()
        if not mask[token // 32] >> token % 32 & 1:
            raise SystemExit(f"token {token} is not allowed")
        taken = time.perf_counter()
        constraint.accept(token)
        accepts.append(time.perf_counter() - taken)
        masks.append(made - start)
    return masks, accepts


def main() -> None:
    """Prints a line for each schema."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("tokenizer", help="a tokenizer.json with harmony's tokens")
    parser.add_argument("--vocab-size", type=int, help="logits of the model; gpt-oss: 201088")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    start = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, arguments.vocab_size)
    print(f"vocabulary of {compiler.vocab_size}: {time.perf_counter() - start:.2f} s")
    special = {name: tokenizer.token_id(f"<|{name}|>") for name in ("channel", "message", "end")}
    special |= {name: tokenizer.token_id(f"<|{name}|>") for name in ("start", "return")}

    def message(channel: str, text: str) -> list[Any]:
        head = [special["channel"], *tokenizer.encode(channel), special["message"]]
        return [*head, *tokenizer.encode(text)]

    thought = [*message("analysis", THOUGHT), special["end"], special["start"]]
    thought += tokenizer.encode("assistant")
    rows = []
    for name, (schema, answer) in CASES.items():
        format = {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
        start = time.perf_counter()
        compiler.harmony(format)
        compiled = time.perf_counter() - start
        masks: list[float] = []
        accepts: list[float] = []
        for repeat in range(arguments.repeats):
            text = json.dumps(answer, indent=2 if repeat % 2 else None, ensure_ascii=False)
            tokens = [*thought, *message("final", text), special["return"]]
            constraint = compiler.harmony(format)
            assert constraint is not None
            for all_times, times in zip((masks, accepts), replay(constraint, tokens), strict=True):
                all_times += times
        masks.sort()
        row = {
            "compile_ms": compiled * 1e3,
            "mask_mean_us": statistics.mean(masks) * 1e6,
            "mask_p50_us": statistics.median(masks) * 1e6,
            "mask_p99_us": masks[len(masks) * 99 // 100] * 1e6,
            "mask_max_us": masks[-1] * 1e6,
            "accept_mean_us": statistics.mean(accepts) * 1e6,
        }
        print(f"{name:<16}" + "  ".join(f"{key} {value:.1f}" for key, value in row.items()))
        rows.append({"schema": name} | row)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
