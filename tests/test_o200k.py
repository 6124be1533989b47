"""The tokenizer that the tests of harmony stand on is gpt-oss's: it agrees with tiktoken."""

import random
from pathlib import Path

import pytest
from gptoss.tokenizer import Tokenizer
from o200k import SPECIAL_TOKENS, find_vocabulary

TEXTS = [
    "",
    "Hello, world! It's 12345.6789, isn't it?\r\n\r\n\tdef f(x):  return x  # über\n",
    "Ça va? Größe ŒUVRE naïve café's I'LL they'VE DON'T",
    "日本語のテキスト。中文文本。한국어. Привет, мир! مرحبا بالعالم שלום हिन्दी ไทย",
    "🦙🦙👨‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u202e \x00\x1b\ufffd \u3000\u00a0 x",
    "a" * 300 + " " * 300 + "\n" * 50 + "!?" * 100 + "../../\n/",
    "".join(SPECIAL_TOKENS),
]


def test_as_tiktoken(harmony_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(find_vocabulary().parent))
    encoding = tiktoken.get_encoding("o200k_base")
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    rng = random.Random(0)
    texts = list(TEXTS)
    for _ in range(300):
        characters = rng.choices("".join(TEXTS[1:5]), k=20)
        texts.append("".join(characters) + chr(rng.randrange(1, 0xD800)))
    for text in texts:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text), text
    for name, token in SPECIAL_TOKENS.items():
        assert tokenizer.token_id(name) == token and tokenizer.decode([token]) == name
    assert tokenizer.max_id == 200018
