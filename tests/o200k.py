"""The true tokenizer of gpt-oss for tests, made from the vocabulary file o200k_base.tiktoken.

The file is looked for where tiktoken and openai-harmony keep theirs: TIKTOKEN_CACHE_DIR or
TIKTOKEN_RS_CACHE_DIR. Nothing is downloaded.
"""

import base64
import hashlib
import json
import os
from pathlib import Path

from gptoss.tokenizer import byte_of_character

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"  # the SHA-1 of the file's URL

# The pattern of o200k_base, which cuts text into the pieces that are merged.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIAL_TOKENS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}


def find_vocabulary() -> Path | None:
    """o200k_base.tiktoken in one of the two cache directories, if it is there and whole."""
    for variable in ("TIKTOKEN_CACHE_DIR", "TIKTOKEN_RS_CACHE_DIR"):
        if directory := os.environ.get(variable):
            path = Path(directory) / CACHE_NAME
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
                return path
    return None


def read_vocabulary(path: Path) -> list[bytes]:
    """The tokens' bytes by rank. A line of the file is "base64 rank"."""
    return [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that joins into a token, in the order of the rank of what it joins to.

    The file has ranks only. Merging whichever neighbours join to the lowest rank is what tiktoken
    does, so all ways to split a token are merges of its rank.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [
            (ranks[left], ranks[right])
            for cut in range(1, len(token))
            if (left := token[:cut]) in ranks and (right := token[cut:]) in ranks
        ]
        merges += [(tokens[left], tokens[right]) for left, right in sorted(pairs)]
    return merges


def write_tokenizer(path: Path, vocabulary: Path) -> Path:
    """Writes the tokenizer.json of gpt-oss: ids 0 to 200018, special tokens from 199998."""
    table = str.maketrans({byte: character for character, byte in byte_of_character().items()})
    tokens = read_vocabulary(vocabulary)
    name_of = {token: token.decode("latin-1").translate(table) for token in tokens}
    special = {id: f"<|reserved_{id}|>" for id in range(199998, 200019)}
    special.update({id: name for name, id in SPECIAL_TOKENS.items()})
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    split = dict(type="Split", pattern={"Regex": PATTERN}, behavior="Removed", invert=True)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": name, **flags} for id, name in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {name: rank for rank, name in enumerate(name_of.values())},
            "merges": [(name_of[left], name_of[right]) for left, right in merges_of(tokens)],
        },
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return path
