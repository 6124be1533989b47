"""The vocabulary that openai-harmony reads: made from the tokenizer, kept as a file, checked."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from gptoss.harmony import Harmony, vocabulary
from gptoss.tokenizer import Tokenizer
from o200k import SHA256


def test_vocabulary_is_cached_and_the_environment_left_alone(
    harmony: Harmony, harmony_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    before = dict(os.environ)
    cached = vocabulary.cache_directory() / "o200k_base.tiktoken"
    assert cached == tmp_path / "gptoss" / "o200k_base.tiktoken"

    def load() -> None:
        vocabulary._encoding.cache_clear()
        assert Harmony.for_tokenizer(tokenizer).render([{"role": "user", "content": "Hi"}])
        assert dict(os.environ) == before

    load()
    assert hashlib.sha256(cached.read_bytes()).hexdigest() == SHA256
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    written = cached.stat().st_mtime_ns
    load()
    assert cached.stat().st_mtime_ns == written
    cached.write_bytes(b"damaged")
    load()
    assert hashlib.sha256(cached.read_bytes()).hexdigest() == SHA256
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", "/elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "x"))  # cannot be made
    (tmp_path / "file").write_text("")
    before = dict(os.environ)
    load()


def test_another_vocabulary_is_refused(tiny_path: Path, harmony_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer \(512 tokens\) is not that of gpt-oss"):
        Harmony.for_tokenizer(Tokenizer.from_file(tiny_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no tokenizer"):
        Harmony.for_tokenizer(None)
    changed = json.loads((harmony_path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = changed["model"]["vocab"]
    ids["dog"], ids["cat"] = ids["cat"], ids["dog"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match="special tokens are the same, others are not"):
        Harmony.for_tokenizer(Tokenizer.from_file(path))
