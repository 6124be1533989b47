"""Harmony, the format that gpt-oss reads and writes: conversations to tokens, and tokens back.

    harmony = Harmony.for_tokenizer(model.tokenizer)
    prompt = harmony.render([{"role": "user", "content": "What is 2 + 2?"}])
    parser = harmony.parser()
    for event in model.stream(prompt):
        for delta in parser.push(event.token):
            print(delta.kind, delta.text)

The format: https://github.com/openai/harmony/blob/main/docs/format.md
"""

from .messages import MAX_TOOL_RUN
from .parser import AssistantMessage, Delta, MessageBuilder, StreamParser, ToolCall
from .render import REASONING_EFFORTS, Harmony

__all__ = [
    "MAX_TOOL_RUN",
    "REASONING_EFFORTS",
    "AssistantMessage",
    "Delta",
    "Harmony",
    "MessageBuilder",
    "StreamParser",
    "ToolCall",
]
