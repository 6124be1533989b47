"""A loaded model as the server sees it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from ..model import Model
from .errors import ApiError

if TYPE_CHECKING:
    from ..grammar import GrammarCompiler
    from ..harmony import Harmony
    from ..tokenizer import Tokenizer


class ServedModel:
    """A model and its label. What the model makes when first needed is made once here, however many
    threads ask."""

    def __init__(self, model: Model, name: str) -> None:
        """Serve `model` under `name`.

        Raises:
            ValueError: the checkpoint has no tokenizer.
        """
        if model.tokenizer is None:
            raise ValueError("a checkpoint without a tokenizer cannot be served")
        self.model = model
        self.name = name
        self.created = int(time.time())
        self._lock = threading.Lock()
        self._can_chat: bool | None = None  # not known yet

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def can_chat(self) -> bool:
        """Whether the vocabulary is harmony's. Takes a second when first asked."""
        with self._lock:
            if self._can_chat is None:
                try:
                    _ = self.model.harmony
                    self._can_chat = True
                except ValueError:
                    self._can_chat = False
            return self._can_chat

    @property
    def harmony(self) -> Harmony:
        """The chat format.

        Raises:
            ApiError: 400: the vocabulary is not harmony's, so this model cannot chat.
        """
        if not self.can_chat():
            raise ApiError(
                400,
                "This model does not have harmony's vocabulary: it can complete, not chat.",
                code="no_chat",
                param="model",
            )
        return self.model.harmony

    @property
    def grammar(self) -> GrammarCompiler:
        """Compiles JSON schemas and tools to constraints. Takes a second or two when first used;
        ValueError where the model cannot chat."""
        with self._lock:
            return self.model.grammar

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name` is what this model is called, or nothing."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:128]!r} does not exist. This server has {self.name!r}.",
                code="model_not_found",
                param="model",
            )
