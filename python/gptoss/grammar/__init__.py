"""Structured output: which tokens may come next, so that an answer or a call's arguments are JSON
that is valid against a schema. Needs llguidance (extra `serve`)."""

from .compiler import GrammarCompiler, GrammarConstraint
from .schema import GrammarError, GrammarLimits

__all__ = ["GrammarCompiler", "GrammarConstraint", "GrammarError", "GrammarLimits"]
