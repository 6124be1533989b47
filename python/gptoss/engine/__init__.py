"""Continuous batching: requests in, tokens out.

`Engine` keeps the threads apart, `Schedule` decides what a step does, `Generation` is one request
on its way.
"""

from .engine import Engine
from .generation import Generation, make_sampler
from .schedule import MAX_DRAFTS
from .types import (
    Constraint,
    EngineStats,
    FinishReason,
    QueueFull,
    Request,
    StreamEvent,
    Timings,
    TokenLogprob,
)

__all__ = [
    "MAX_DRAFTS",
    "Constraint",
    "Engine",
    "EngineStats",
    "FinishReason",
    "Generation",
    "QueueFull",
    "Request",
    "StreamEvent",
    "Timings",
    "TokenLogprob",
    "make_sampler",
]
