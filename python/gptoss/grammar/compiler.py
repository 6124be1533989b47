"""One grammar for an assistant's turn in the harmony format, compiled to masks over the vocabulary.

The turn begins behind "<|start|>assistant", which the prompt ends with:

    turn    = (thought <|end|> <|start|> "assistant")* (final | call)
    thought = <|channel|> ("analysis" | "commentary") <|message|> text
    final   = <|channel|> "final" <|message|> JSON-or-text <|return|>
    call    = <|channel|> "commentary to=functions.NAME " json <|message|> JSON <|call|>
    json    = <|constrain|> "json"

Thinking stays free; only the final channel and the arguments of calls are bound to schemas. A
recipient may also stand before the channel, and the type may be left out: models write all of these
(https://github.com/openai/harmony/blob/main/docs/format.md). The parser is that of llguidance
(https://github.com/guidance-ai/llguidance): Earley over a lexer that makes the derivatives of its
regular expressions as it needs them, and walks a trie of the vocabulary.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from .bindings import Binding, Endings, read_fields
from .schema import GrammarError, GrammarLimits

if TYPE_CHECKING:
    import llguidance

    from ..tokenizer import Tokenizer

_SPECIAL = ("start", "end", "message", "channel", "constrain", "return", "call", "endoftext")
_MAX_THOUGHTS = 8  # messages before the last one; models write one or two
_MAX_ROW_ITEMS = 8000  # of the parser; an object takes four for every optional property
_MAX_LEXER_STATES = 50_000  # of one generation, 1 to 2 kB each


class GrammarConstraint:
    """Where one generation stands in its grammar: a `gptoss.engine.Constraint`.

    For one thread at a time.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, np.uint32)

    def mask(self) -> np.ndarray:
        """The tokens that may come next: uint32 [ceil(V/32)], bit t % 32 of word t // 32.

        The same array every time; what it holds is good until the next call.

        Raises:
            GrammarError: to go on would exceed the parser's limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, token: int) -> None:
        """Goes on behind the token that was drawn.

        Raises:
            GrammarError: the token was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot go on: {_plain(self._matcher.get_error())}")


class GrammarCompiler:
    """Makes constraints for requests. Safe to use from several threads.

    Building one takes a second or two for a vocabulary of 200,000 tokens: do it once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int | None = None,
        limits: GrammarLimits | None = None,
        cache_size: int = 32,
    ) -> None:
        """Prepare a tokenizer's vocabulary.

        Args:
            tokenizer: a byte-level tokenizer with harmony's special tokens.
            vocab_size: V, how many logits the model has; ids without a token are never allowed.
                None for as many as the tokenizer has tokens.
            limits: bounds on what requests may ask for.
            cache_size: grammars to keep compiled; the least recently used go first.

        Raises:
            ValueError: the tokenizer lacks harmony's tokens, or its tokens do not stand for bytes.
            ImportError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            message = "structured output needs llguidance: pip install 'gptoss[serve]'"
            raise ImportError(message) from error
        self._llguidance = llguidance
        self._tokenizer = tokenizer
        self._special = {name: _special_id(tokenizer, name) for name in _SPECIAL}
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.limits = limits or GrammarLimits()
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self.vocab_size, self._special)),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._parser_limits = llguidance.LLParserLimits(
            max_items_in_row=_MAX_ROW_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            verbose_errors=False,
        )
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "gptoss-grammar")

    def harmony(
        self,
        response_format: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
    ) -> GrammarConstraint | None:
        """The constraint of one request's turn; fields as OpenAI's chat completions have them.

        A schema with `strict: true` is kept to the letter: a keyword that cannot be enforced is an
        error. Without, such keywords are passed over. May wait for other requests' schemas.

        Args:
            response_format: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema",
                "json_schema": {"schema": ..., "strict": ...}}; None is text.
            tools: {"type": "function", "function": {"name": ..., "parameters": ..., "strict":
                ...}}.
            tool_choice: "none": no call. "auto": a call or an answer. "required": a call.
                {"type": "function", "function": {"name": ...}}: a call of this function.

        Returns:
            A fresh constraint; None where anything goes: for text without tools, and for "auto"
            with tools none of which is strict.

        Raises:
            GrammarError: a field is not as it must be; a schema exceeds a limit, cannot be
                enforced, or takes too long to compile. The message names it.
        """
        endings = read_fields(response_format, tools, tool_choice, self.limits)
        if endings is None:
            return None
        return GrammarConstraint(self._compiled(endings).deep_copy(), self.vocab_size)

    def _compiled(self, endings: Endings) -> llguidance.LLMatcher:
        """The grammar's matcher in its first state, to be copied."""
        grammar = self._grammar(endings)
        key = hashlib.sha256(grammar.encode()).digest()
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        with self._turn:  # one at a time: others' schemas do not count as one's own time
            with self._lock:
                if key in self._cache:  # somebody else has just compiled it
                    return self._cache[key]
            matcher = self._compile_in_time(grammar, endings)
            with self._lock:
                self._cache[key] = matcher
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        return matcher

    def _compile_in_time(self, grammar: str, endings: Endings) -> llguidance.LLMatcher:
        # The parser cannot be interrupted. Its own limits end what is given up here.
        work: Future[llguidance.LLMatcher] = self._worker.submit(self._compile, grammar, endings)
        try:
            return work.result(self.limits.seconds)
        except TimeoutError:
            work.cancel()
            names = ", ".join(binding.where for binding in endings.bindings[:3])
            message = f"{names} took more than {self.limits.seconds:g} s to compile"
            raise GrammarError(message) from None

    def _compile(self, grammar: str, endings: Endings) -> llguidance.LLMatcher:
        matcher_of = self._llguidance.LLMatcher
        for binding in endings.bindings:  # one by one, to name the one that is wrong
            alone = matcher_of.grammar_from_json_schema(binding.schema)
            error = matcher_of.validate_grammar(alone, limits=self._parser_limits)
            if error and not error.startswith("WARNING"):
                raise GrammarError(f"{binding.where} cannot be enforced: {_plain(error)}")
        matcher = matcher_of(self._vocabulary, grammar, log_level=0, limits=self._parser_limits)
        if matcher.is_error():
            raise GrammarError(f"the schemas cannot be enforced: {_plain(matcher.get_error())}")
        for binding in endings.bindings:
            self._try(binding, matcher.deep_copy())
        return matcher

    def _try(self, binding: Binding, matcher: llguidance.LLMatcher) -> None:
        """Goes to the binding's JSON and into its first object: some limits show only there."""
        call = f"commentary to=functions.{binding.function}"
        header = "final" if binding.function is None else call
        tokens = [
            self._special["channel"],
            *self._tokenizer.encode(header),
            self._special["message"],
        ]
        matcher.consume_tokens(tokens)
        matcher.compute_bitmask()
        opening = self._tokenizer.encode("{")
        if matcher.validate_tokens(opening) == len(opening):
            matcher.consume_tokens(opening)
            matcher.compute_bitmask()
        if matcher.is_error():
            message = f"{binding.where} cannot be enforced: {_plain(matcher.get_error())}"
            raise GrammarError(message)

    def _grammar(self, endings: Endings) -> str:
        """The turn in llguidance's Lark; a special token is written by its id, <[200002]>."""
        special = {name: f"<[{token}]>" for name, token in self._special.items()}
        channel, message = special["channel"], special["message"]
        rules = []
        for index, binding in enumerate(endings.bindings):
            value = f"{message} value_{index}"
            if binding.function is None:
                head = f'{channel} "final" (" "? json)? {value} {special["return"]}'
            else:
                to = f" to=functions.{binding.function}"
                head = f'({channel} "commentary{to}" | "{to}" {channel} "commentary")'
                head += f' (" "? json | " json")? {value} {special["call"]}'
            rules += [f"last_{index}: {head}", f"value_{index}: %json {binding.schema}"]
        names = [f"last_{index}" for index in range(len(endings.bindings))]
        if endings.free_answer:
            names.append("answer")
            rules.append(f'answer: {channel} "final" {message} TEXT {special["return"]}')
        next_message = f'{special["end"]} {special["start"]} "assistant"'
        head = [
            "%llguidance {}",
            f"start: (thought {next_message}){{0,{_MAX_THOUGHTS}}} ({' | '.join(names)})",
            f'thought: {channel} ("analysis" | "commentary") {message} TEXT',
            f'json: {special["constrain"]} "json"',
            r"TEXT: /(.|\n)*/",
        ]
        return "\n".join(head + rules)


class _Vocabulary:
    """A tokenizer as llguidance takes it: every token's bytes, and how text is cut."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, special: Mapping[str, int]) -> None:
        sample = '{"text": "naïve ☃ \U0001f600"}\n'
        tokens = tokenizer.encode(sample)
        if b"".join(map(tokenizer.token_bytes, tokens)) != sample.encode():
            raise ValueError("structured output needs a byte-level tokenizer")
        self._encode = tokenizer.encode
        self.eos_token_id = special["endoftext"]
        self.bos_token_id = None
        self.special_token_ids = sorted(special.values())
        # A token without bytes is never allowed: so with ids that the tokenizer does not have, and
        # with special tokens that harmony has no use for.
        unused = tokenizer.special_token_ids.difference(special.values())
        self.tokens = [
            b"" if token in unused else tokenizer.token_bytes(token) for token in range(vocab_size)
        ]

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.token_id(f"<|{name}|>")
    if token is None or token not in tokenizer.special_token_ids:
        raise ValueError(f"the tokenizer has no special token <|{name}|>, which harmony needs")
    return token


def _plain(error: str) -> str:
    """The first line of llguidance's message, without where in its grammar that was."""
    line = error.strip().split("\n", 1)[0]
    line = re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", line)
    return line.split(". Enable ", 1)[0][
        :300
    ]  # an option of llguidance's, which nobody here can set
