"""A server for OpenAI's compatibility test (bench/compat_openai.sh), on a model that is a script.

The test's cases ask for one call of a given tool. The scripted model thinks, makes a call whose
arguments fit that tool's schema, and answers once it has the tool's result: all in harmony, behind
the real engine and server.

    python tests/compat_server.py --port 8123
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptoss.harmony import Harmony
from gptoss.server.logs import set_up_logs
from gptoss.server.serve import serve
from gptoss.tokenizer import Tokenizer
from harmony_text import call, final, last_message, thought, tokens_of
from o200k import find_vocabulary, write_tokenizer
from scripted_core import Script
from server_tools import scripted


def arguments_for(tool: str, question: str) -> dict[str, Any]:
    """Arguments that fit the schema of one of the test's tools, as a model would choose them."""
    quoted = re.search(r"[`'\"“](.+)[`'\"”]", question, re.DOTALL)
    text = quoted[1] if quoted else question.partition(":")[2].strip() or question
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", question)]
    kinds = [kind for kind in ("bar", "scatter", "line") if kind in question.lower()]
    table = re.search(r"(\w+) table|from (\w+)|the (\w+)", question)
    arguments = {
        "get_weather": {"location": re.split(r" in | for ", question)[-1].rstrip("?., ")},
        "get_system_health": {},
        "markdown_to_html": {"markdown": text},
        "detect_language": {"text": text},
        "generate_chart": {
            "data": [[x, y] for x, y in enumerate(numbers, 1)],
            "chart_type": kinds[0] if kinds else "line",
        },
        "query_database": {
            "table": next(filter(None, table.groups())) if table else "unknown",
            "columns": ["id"],
            "limit": int(numbers[0]) if numbers else 100,
        },
    }
    return arguments[tool]


def script(tokenizer: Tokenizer) -> Script:
    """The model: prompt to answer."""

    def answer(prompt: list[int]) -> list[int]:
        header, text = last_message(tokenizer, prompt)
        tools = re.findall(r"^type (\w+) = \(", tokenizer.decode(prompt), re.MULTILINE)
        if header.startswith("functions.") or not tools:
            said = thought("The result is there.") + final(f"It says: {text}")
        else:
            arguments = json.dumps(arguments_for(tools[0], text), ensure_ascii=False)
            said = thought(f"The user wants {tools[0]}. I call it.") + call(tools[0], arguments)
        return tokens_of(tokenizer, said)

    return answer


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8123)
    port = parser.parse_args().port
    vocabulary = find_vocabulary()
    if vocabulary is None:
        sys.exit("o200k_base.tiktoken is needed: set TIKTOKEN_CACHE_DIR or TIKTOKEN_RS_CACHE_DIR")
    with tempfile.TemporaryDirectory() as directory:
        path = write_tokenizer(Path(directory) / "tokenizer.json", vocabulary)
        tokenizer = Tokenizer.from_file(path)
    Harmony.for_tokenizer(tokenizer)  # once, before the first request
    served = scripted(script(tokenizer), tokenizer, settings={"port": port})
    set_up_logs("warning")
    serve(served.app, served.app.state.settings)


if __name__ == "__main__":
    main()
