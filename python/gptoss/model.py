"""The model as a user sees it: load a checkpoint, generate, stream, or look at the logits."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from . import _gptoss
from .engine import (
    MAX_DRAFTS,
    Constraint,
    Engine,
    FinishReason,
    Request,
    StreamEvent,
    Timings,
    TokenLogprob,
)
from .sampling import SamplingParams

if TYPE_CHECKING:  # imported when first needed: they take long
    import torch

    from .chat import ChatOptions, ChatResult, ChatStream
    from .grammar import GrammarCompiler
    from .harmony import Harmony
    from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids: a list, a tuple, or a one-dimensional integer array or tensor."""

_MAX_THREADS = 1024
_MAX_SEQUENCES = 65536


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one prompt came to.

    Attributes:
        prompt_tokens: the prompt as token ids.
        tokens: the new token ids, with the stop token if one ended the generation.
        text: the new text, without stop token or stop string; None if the checkpoint has no
            tokenizer.
        finish_reason: "stop" (a stop token or string) or "length" (`max_new_tokens` reached).
        stop_reason: the token id or string that ended the generation, or None.
        logprobs: one for each new token, or None unless asked for.
        timings: how long prompt and decoding took.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: list[TokenLogprob] | None
    timings: Timings


class Model:
    """A loaded gpt-oss model. Get one from `Model.load`; several threads may use it at once.

    As a context manager it closes itself at the end.
    """

    def __init__(
        self,
        core: _gptoss.Core,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        speculate: int = 0,
    ) -> None:
        """Wrap a core that is loaded. `eos_token_ids` end a generation unless it ignores them."""
        self.engine = Engine(core, tokenizer, speculate=speculate)
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        device: str = "auto",
        *,
        max_context: int | None = None,
        max_sequences: int | None = None,
        invariant: bool = False,
        threads: int | None = None,
        precision: str = "exact",
        prefix_cache: bool = True,
        speculate: int = 0,
        progress: bool = True,
    ) -> Model:
        """Load a checkpoint: a Hugging Face directory or OpenAI's `original/` directory.

        Args:
            path: the directory (or, with the extra `hub`, a repository id).
            device: "cpu", "cuda", "cuda:N", or "auto": CUDA where this build and machine have it.
            max_context: most tokens of prompt and answer together; None for what the config allows.
            max_sequences: most sequences in one step and in the cache; None for as many as memory
                allows, at most 256. With `max_context`, all of them fit at their longest.
            invariant: results must be bit-identical over batch composition and prompt cuts, on
                CUDA at some cost. The CPU's always are.
            threads: CPU threads, 1 to 1024; None for OMP_NUM_THREADS, or else as many processors as
                the process's affinity and its cgroup's quota allow.
            precision: "exact": weights as the checkpoint has them, bfloat16 operands. "fast", on
                the CPU: attention and unembedding weights rounded to 8 bits, int8 operands; less
                memory and time, more error (docs/performance.md).
            prefix_cache: keep pages of the cache that nobody holds any more, for prompts that begin
                alike. The results are the same.
            speculate: guess up to this many tokens ahead, 0 to 15, where the last few stood before
                in prompt or output (docs/python.md); 0 is off. The results are the same.
            progress: show a progress bar on stderr.

        Raises:
            FileNotFoundError: no checkpoint at `path`.
            ValueError: an argument, the config or a tensor is not as it must be; the message names
                it.
            RuntimeError: the device is not available, or its memory is too small; nothing has been
                read then.
        """
        device = _device(device)
        max_context = _optional_count("max_context", max_context, 2**31 - 1)
        max_sequences = _optional_count("max_sequences", max_sequences, _MAX_SEQUENCES)
        threads = _optional_count("threads", threads, _MAX_THREADS)
        for name, flag in (("invariant", invariant), ("prefix_cache", prefix_cache)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, not {flag!r}")
        speculate = _count("speculate", speculate, 0, MAX_DRAFTS)
        if precision not in ("exact", "fast"):
            raise ValueError(f'precision must be "exact" or "fast", not {precision!r}')
        if precision == "fast" and device != "cpu":
            raise ValueError(f'precision "fast" is for the CPU: on {device} use "exact"')

        from .checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        checkpoint.check()
        tokenizer = None
        if checkpoint.tokenizer_path is not None:
            from .tokenizer import Tokenizer

            tokenizer = Tokenizer.from_file(checkpoint.tokenizer_path)
        core = _gptoss.Core(
            checkpoint.config,
            device=device,
            threads=threads or 0,
            max_context=max_context or 0,
            max_sequences=max_sequences or 0,
            invariant=invariant,
            precision=precision,
            prefix_cache=prefix_cache,
        )
        checkpoint.load_into(core, progress)
        core.finish_loading()
        return cls(core, tokenizer, checkpoint.eos_token_ids, speculate)

    @property
    def core(self) -> _gptoss.Core:
        """The C++ core, for benchmarks and tests; RuntimeError once closed."""
        return self.engine.core

    @property
    def config(self) -> _gptoss.Config:
        """The shape of the model."""
        return self.core.config

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.core.max_context

    @overload
    def generate(  # type: ignore[overload-overlap]  # text is a sequence of texts, too
        self, prompts: Prompt, params: SamplingParams | None = None
    ) -> GenerationResult: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[GenerationResult]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> GenerationResult | list[GenerationResult]:
        """Continue one prompt, or several in one batch.

        A result does not depend on what its prompt shares a batch with. Text is plain text:
        "<|start|>" in it is no control token. Ctrl-C stops within a step.

        Args:
            prompts: text or token ids, or a list of either.
            params: how to sample; None for the defaults.

        Returns:
            One result, or a list in the order of the prompts.

        Raises:
            ValueError: a prompt is empty, has ids outside the vocabulary or does not fit the
                context with its answer, or is text and the checkpoint has no tokenizer. Nothing has
                been computed then.
            RuntimeError: the model is closed, or this process was forked from the one that loaded
                it.
        """
        prompts = _plain(prompts)
        single = isinstance(prompts, str) or not any(_is_prompt(item) for item in prompts)
        requests = [self.request(p, params) for p in ([prompts] if single else prompts)]
        events: list[list[StreamEvent]] = [[] for _ in requests]
        with closing(self.engine.run(requests)) as run:
            for index, event in run:
                events[index].append(event)
        results = [self._result(*pair) for pair in zip(requests, events, strict=True)]
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[StreamEvent, None, None]:
        """Continue one prompt, token by token as they come.

        Arguments are checked at once; computing starts with the first `next`. Closing the generator
        frees its cache at once. The joined texts of all events are the `text` that `generate`
        returns.

        Raises:
            ValueError, RuntimeError: as `generate`.
        """
        return self._stream(self.request(prompt, params))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> ChatStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> ChatResult | ChatStream:
        """The assistant's next answer in a conversation.

        Args:
            messages: as OpenAI's chat completions has them: dicts with role and content.
            stream: give an iterator over the pieces of the answer, not the answer at its end.
            **options: `gptoss.chat.ChatOptions`: reasoning_effort, tools, tool_choice,
                response_format, params, date.

        Raises:
            ValueError: an argument is not as it must be, the conversation does not fit the context,
                or the checkpoint's tokenizer is not gpt-oss's. Nothing has been computed then.
            ImportError: the extra `chat` is not installed, or `serve` where a grammar is needed.
            RuntimeError: as `generate`.
        """
        from .chat import ChatStream, chat_request

        answer = ChatStream(self.engine, *chat_request(self, messages, **options))
        return answer if stream else answer.finish()

    @cached_property
    def harmony(self) -> Harmony:
        """The chat format over this checkpoint's tokenizer; ValueError, ImportError as `chat`."""
        from .harmony import Harmony

        return Harmony.for_tokenizer(self.tokenizer)

    @cached_property
    def grammar(self) -> GrammarCompiler:
        """Grammars over this checkpoint's vocabulary; ImportError without the extra `serve`."""
        from .grammar import GrammarCompiler

        return GrammarCompiler(self.harmony.tokenizer, self.config.vocab_size)

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        stop_tokens: Iterable[int] | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """A request for `engine.submit`, checked against this model.

        Args:
            prompt: text or token ids.
            params: how to sample; None for the defaults.
            stop_tokens: ids that end it, besides those of the checkpoint and of `params`.
            constraint: what the next token may be, of this generation alone.

        Raises:
            ValueError, RuntimeError: as `generate`.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, not {type(params).__name__}")
        vocab_size = self.core.config.vocab_size
        extra = frozenset(() if stop_tokens is None else stop_tokens)
        for field, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("stop_tokens", extra),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{field}: token id {token} is not below the vocabulary size {vocab_size}"
                    )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this checkpoint has none")

        tokens = self._tokens(prompt)
        room = self.engine.max_tokens - len(tokens)
        max_new_tokens = max(room, 1) if params.max_new_tokens is None else params.max_new_tokens
        self.engine.check_room(len(tokens), max_new_tokens)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stops = eos.union(params.stop_token_ids, extra)
        return Request(tokens, params, stops, max_new_tokens, constraint)

    def forward(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits behind every token.

        Args:
            tokens: n token ids.

        Returns:
            float32 [n, vocab_size] on the CPU; row i scores what follows tokens[: i + 1].

        Raises:
            ValueError: no tokens, more than `max_context`, or ids outside the vocabulary.
            RuntimeError: as `generate`.
        """
        core = self.core
        tokens = self._tokens(tokens)
        if len(tokens) > core.max_context:
            raise ValueError(f"{len(tokens)} tokens are more than max_context {core.max_context}")

        import torch

        logits = torch.empty(len(tokens), core.config.vocab_size)
        sequence = core.new_sequence()
        try:
            for start in range(0, len(tokens), core.max_batch_tokens):
                part = slice(start, start + core.max_batch_tokens)
                core.step([(sequence, tokens[part], 2, None)], logits[part])
        finally:
            sequence.close()
        return logits

    def close(self) -> None:
        """Free the weights. Using the model afterwards raises RuntimeError, and so do generations
        that have not ended."""
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _stream(self, request: Request) -> Generator[StreamEvent, None, None]:
        with closing(self.engine.run([request])) as run:
            for _, event in run:
                yield event

    def _tokens(self, prompt: Any) -> list[int]:
        """The token ids of a prompt, each of them in the vocabulary."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "a text prompt needs a tokenizer, and this checkpoint has none: give token ids"
                )
            prompt = self.tokenizer.encode(prompt)
        prompt = _plain(prompt)
        if len(prompt) == 0:
            raise ValueError("the prompt is empty")
        vocab_size = self.core.config.vocab_size
        for position, token in enumerate(prompt):
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise ValueError(f"prompt token {position} must be an integer, not {token!r}")
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"prompt token {position} must be from 0 to {vocab_size - 1}, not {token}"
                )
        return [int(token) for token in prompt]

    def _result(self, request: Request, events: list[StreamEvent]) -> GenerationResult:
        last = events[-1]
        assert last.finish_reason is not None and last.timings is not None
        return GenerationResult(
            prompt_tokens=request.tokens,
            tokens=[event.token for event in events],
            text="".join([event.text for event in events]) if self.tokenizer else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            logprobs=[event.logprob for event in events if event.logprob] or None,
            timings=last.timings,
        )


def _plain(prompt: Any) -> Any:
    """Arrays and tensors as lists; everything else must be text or a sequence already."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise ValueError(f"a prompt must be text or token ids, not {type(prompt).__name__}")
    return prompt


def _is_prompt(item: Any) -> bool:
    """Whether an item of a list is a prompt of its own, not a token id."""
    return isinstance(item, (str, Sequence)) or getattr(item, "ndim", 0) > 0


def _device(device: Any) -> str:
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", not {device!r}')
    if device == "auto":
        return "cuda" if _gptoss.cuda_available() else "cpu"
    return device


def _optional_count(name: str, value: Any, most: int) -> int | None:
    return None if value is None else _count(name, value, 1, most)


def _count(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, not {value!r}")
    return int(value)
