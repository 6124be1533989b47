"""The client examples of docs/serving.md, run against a server whose model says what they want."""

import re
from pathlib import Path

import pytest
from gptoss.tokenizer import Tokenizer
from harmony_text import final, thought, tokens_of
from server_tools import NAME, live, scripted

PATH = Path(__file__).parents[1] / "docs" / "serving.md"
EXAMPLES = re.findall(
    r"^```py\n(.*?)^```$", PATH.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
ANSWER = '{"city": "Paris", "population": 2100000}'


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_python_examples(
    index: int, harmony_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "from agents" in EXAMPLES[index]:
        pytest.importorskip("agents")
    pytest.importorskip("openai")
    tokenizer = Tokenizer.from_file(harmony_path / "tokenizer.json")
    said = tokens_of(tokenizer, thought("Paris.") + final(ANSWER))
    with live(scripted(lambda _: said, tokenizer)) as server:
        example = EXAMPLES[index].replace("http://127.0.0.1:8000", server.url)
        example = example.replace("gpt-oss-20b", NAME)
        exec(compile(example, str(PATH), "exec"), {"__name__": "example"})
    assert ANSWER in capsys.readouterr().out
