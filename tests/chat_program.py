"""`gptoss chat` with a scripted model: python chat_program.py TOKENIZER ANSWERS ARGUMENTS...

ANSWERS is JSON: by the user's last message, what the model writes. To any other it says how many
messages of each author the prompt has. An answer that begins with "slow:" takes 20 ms a token.
"""

import json
import os
import sys
from collections import Counter

from gptoss import Model
from gptoss.cli import main
from gptoss.tokenizer import Tokenizer
from harmony_text import final, last_message, tokens_of
from scripted_core import ScriptedCore


def scripted_model(tokenizer: Tokenizer, answers: dict[str, str]) -> Model:
    def script(prompt: list[int]) -> list[int]:
        _, text = last_message(tokenizer, prompt)
        answer = answers.get(text)
        if answer is None:
            messages = tokenizer.decode(prompt).split("<|start|>")[1:-1]
            authors = Counter(message.partition("<|")[0] for message in messages)
            answer = final(" ".join(f"{name}={n}" for name, n in sorted(authors.items())))
        core.delay = 0.02 if answer.startswith("slow:") else 0.0
        return tokens_of(tokenizer, answer.removeprefix("slow:"))

    core = ScriptedCore(script, 201088, max_context=3000)
    return Model(core, tokenizer)


if __name__ == "__main__":
    if os.isatty(0):  # the terminal becomes this session's, so that its Ctrl-C is a signal
        os.close(os.open(os.ttyname(0), os.O_RDWR))
    path, answers, *arguments = sys.argv[1:]
    model = scripted_model(Tokenizer.from_file(path), json.loads(answers))
    Model.load = lambda *_, **__: model  # type: ignore[method-assign]
    main(["chat", path, "--temperature", "0", *arguments])
