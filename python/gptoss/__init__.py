"""gptoss: an engine for OpenAI's gpt-oss models.

    from gptoss import Model, SamplingParams

    with Model.load("gpt-oss-20b") as model:
        print(model.generate("The capital of France is", SamplingParams(max_new_tokens=16)).text)

Names are imported when first used: torch and tokenizers take long, and not every use needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._gptoss import __version__

if TYPE_CHECKING:
    from .chat import ChatResult, ChatStream
    from .engine import (
        Constraint,
        Engine,
        EngineStats,
        Generation,
        QueueFull,
        Request,
        StreamEvent,
        Timings,
        TokenLogprob,
    )
    from .model import GenerationResult, Model
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

__all__ = [
    "ChatResult",
    "ChatStream",
    "Constraint",
    "Engine",
    "EngineStats",
    "Generation",
    "GenerationResult",
    "Model",
    "QueueFull",
    "Request",
    "SamplingParams",
    "StreamEvent",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "__version__",
]

_MODULE_OF = {
    "ChatResult": "chat",
    "ChatStream": "chat",
    "Constraint": "engine",
    "Engine": "engine",
    "EngineStats": "engine",
    "Generation": "engine",
    "GenerationResult": "model",
    "Model": "model",
    "QueueFull": "engine",
    "Request": "engine",
    "SamplingParams": "sampling",
    "StreamEvent": "engine",
    "Timings": "engine",
    "TokenLogprob": "engine",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
