"""A loaded model as the server sees it."""

from __future__ import annotations

import time
from functools import cached_property
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

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer

    @cached_property
    def _harmony(self) -> Harmony | ValueError:
        from ..harmony import Harmony

        try:
            return Harmony.for_tokenizer(self.tokenizer)
        except ValueError as error:  # not o200k_harmony: a model to try the server with
            return error

    @property
    def harmony(self) -> Harmony:
        """The chat format.

        Raises:
            ApiError: 400: the vocabulary is not harmony's, so this model cannot chat.
        """
        if isinstance(self._harmony, ValueError):
            raise ApiError(
                400,
                "This model does not have harmony's vocabulary: it can complete, not chat.",
                code="no_chat",
                param="model",
            )
        return self._harmony

    @cached_property
    def grammar(self) -> GrammarCompiler:
        """Compiles JSON schemas and tools to constraints."""
        from ..grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name` is what this model is called, or nothing."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:128]!r} does not exist. This server has {self.name!r}.",
                code="model_not_found",
                param="model",
            )
