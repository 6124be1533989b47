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
    """A model, its label, and what is made from its tokenizer when first needed."""

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
        self._harmony: Harmony | None = None
        self._grammar: GrammarCompiler | None = None
        self._cannot_chat = False

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    def can_chat(self) -> bool:
        """Whether the vocabulary is harmony's. Takes a second when first asked."""
        from ..harmony import Harmony

        with self._lock:
            if self._harmony is None and not self._cannot_chat:
                try:
                    self._harmony = Harmony.for_tokenizer(self.tokenizer)
                except ValueError:
                    self._cannot_chat = True
        return self._harmony is not None

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
        assert self._harmony is not None
        return self._harmony

    @property
    def grammar(self) -> GrammarCompiler:
        """Compiles JSON schemas and tools to constraints. Takes a second or two when first used."""
        from ..grammar import GrammarCompiler

        with self._lock:
            if self._grammar is None:
                vocab_size = self.model.config.vocab_size
                self._grammar = GrammarCompiler(self.tokenizer, vocab_size)
        return self._grammar

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name` is what this model is called, or nothing."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:128]!r} does not exist. This server has {self.name!r}.",
                code="model_not_found",
                param="model",
            )
