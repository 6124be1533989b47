"""The C++ core.

Tensors cross by DLPack: any contiguous CPU tensor will do, from torch, numpy or elsewhere.
Errors are ValueError for what the caller gave and RuntimeError for the rest; the message names the
argument or tensor. Every call that computes releases the GIL.
"""

from collections.abc import Sequence as Seq
from typing import Any, Final, Protocol

__version__: str

class DLPackTensor(Protocol):
    """A tensor other libraries can read in place, such as torch.Tensor or numpy.ndarray."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

class Config:
    """The shape of a model. Checked when made: ValueError names the field."""

    hidden_size: Final[int]
    n_layers: Final[int]
    n_heads: Final[int]
    n_kv_heads: Final[int]
    head_dim: Final[int]
    n_experts: Final[int]
    experts_per_token: Final[int]
    intermediate_size: Final[int]
    vocab_size: Final[int]
    max_context: Final[int]
    rms_norm_eps: Final[float]
    rope_theta: Final[float]
    rope_factor: Final[float]
    rope_original_context: Final[int]
    rope_beta_fast: Final[float]
    rope_beta_slow: Final[float]
    rope_truncate: Final[bool]
    rope_attention_factor: Final[float]
    swiglu_limit: Final[float]
    layer_windows: Final[list[int]]
    """For each layer how many keys it sees, the token's own included; 0 means all."""

    def __init__(
        self,
        *,
        hidden_size: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        n_experts: int,
        experts_per_token: int,
        intermediate_size: int,
        vocab_size: int,
        max_context: int,
        rms_norm_eps: float,
        rope_theta: float,
        rope_factor: float,
        rope_original_context: int,
        rope_beta_fast: float,
        rope_beta_slow: float,
        rope_truncate: bool,
        rope_attention_factor: float,
        swiglu_limit: float,
        layer_windows: list[int],
    ) -> None: ...

class TensorSpec:
    """A tensor that a checkpoint must have; dtypes as safetensors spells them ("BF16", "F32")."""

    name: Final[str]
    shape: Final[list[int]]
    dtypes: Final[list[str]]

def expected_tensors(config: Config, layout: str) -> list[TensorSpec]:
    """Every tensor of a checkpoint in this layout, "huggingface" or "original"."""

def isa_names() -> list[str]:
    """The instruction sets this build has kernels for."""

def supported_isas() -> list[str]:
    """Those this machine can run."""

def attention_parts(positions: list[int], window: int, kv_heads: int, threads: int) -> list[int]:
    """Into how many parts the CPU cuts the keys of rows at these positions, each; for tests."""

def active_isa() -> str:
    """The one in use: GPTOSS_ISA (ValueError if it names none of those) or else the best."""

def cuda_available() -> bool:
    """Whether this build has CUDA and this machine a device."""

def build_info() -> dict[str, str]:
    """Compiler, flags and features of this build."""

class CacheFull(RuntimeError):
    """The cache has too few free pages for a step. Nothing has changed."""

class CannotSample(RuntimeError):
    """Nothing can be drawn from a row of logits: numbers are missing, or none is finite."""

    item: int
    """Of the step's items the one whose row it is. Nothing has changed for any of them."""

class Core:
    """One model on one device. Calls from several threads take turns."""

    config: Final[Config]
    threads: Final[int]
    isa: Final[str]
    precision: Final[str]
    device: Final[str]
    max_context: Final[int]
    max_batch_tokens: Final[int]
    max_sequences: Final[int]
    page_tokens: Final[int]
    """Tokens of a cache page."""
    full_pages: Final[int]
    """Pages of 128 tokens that the layers which see everything have for all sequences together."""
    window_pages: Final[int]
    """The same of the window layers, which keep only the pages that a window still touches."""

    def __init__(
        self,
        config: Config,
        device: str = "cpu",
        threads: int = 0,
        max_context: int = 0,
        max_batch_tokens: int = 512,
        max_sequences: int = 0,
        invariant: bool = False,
        precision: str = "exact",
        prefix_cache: bool = False,
    ) -> None:
        """0 means the default. Takes all memory; RuntimeError with the numbers if it is too little.
        precision is "exact" or "fast", the latter on the CPU only. With prefix_cache, full pages of
        128 tokens stay when their sequence goes, for `Sequence.reuse`, until others need the room.

        Weights come by `load_tensor`, then `finish_loading`.
        """

    def load_tensor(self, name: str, tensor: DLPackTensor) -> None:
        """Copy in one tensor, named as in either layout. ValueError: wrong name, shape or dtype."""

    def finish_loading(self) -> None:
        """ValueError naming the tensors that are missing."""

    def memory(self) -> dict[str, int]:
        """Bytes of "weights", "cache_used" (the prefix cache's pages too) and "workspace"."""

    def free_pages(self) -> tuple[int, int]:
        """Pages of the full and of the window layers that sequences may still take.

        Those that only the prefix cache holds are among them.
        """

    def cache_stats(self) -> dict[str, int]:
        """full_in_use and window_in_use: pages that sequences hold. cached_pages: pages of tokens
        that the prefix cache knows, held or not. prefix_tokens_asked and prefix_tokens_reused: of
        all `Sequence.reuse` so far.
        """

    def new_sequence(self) -> Sequence:
        """An empty sequence."""

    def step(
        self,
        items: list[
            tuple[Sequence, Seq[int], int, Sampler | None]
            | tuple[Sequence, Seq[int], int, Sampler | None, int]
        ],
        logits: DLPackTensor | None = None,
    ) -> list[list[Sample]]:
        """Run one ragged batch through the model.

        Args:
            items: (sequence, tokens appended to it, want, sampler[, n_drafts]). want is 0 for
                nothing, 1 for the logits of the last token, 2 for those of all. A sampler (want 1)
                draws the next token from them; it is recorded in the sampler and not appended to
                the sequence. No sequence may come twice; they are at most `max_sequences`, and all
                tokens together at most `max_batch_tokens`.
                With n_drafts, at most 63, that many of the last tokens are guesses: a token is
                drawn before each of them and behind the last, as far as the guesses before it were
                what was drawn, and only guesses that came true stay in the sequence. Tokens and log
                probabilities are those of one token a step, bit for bit (on sm_90, where the core
                is invariant). A mask holds for all rows. want 1 is then the logits of these
                n_drafts + 1 rows.
            logits: float32 [wanted rows, vocab_size], filled in the order of the items.

        Returns:
            For each item a list: the token drawn, or nothing without a sampler; with n_drafts the
            guesses that came true and one token more.

        Raises:
            CacheFull: too few free pages.
            CannotSample: nothing can be drawn for one of the items.

        After any exception, KeyboardInterrupt included, every sequence is as long as before.
        """

class Sequence:
    """The cache of one sequence; made by `Core.new_sequence`."""

    length: Final[int]
    """Tokens in the cache."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        ValueError if a window layer has already let go of what the new end must see; or, with a
        prefix cache, if the new end is inside a page that was full: shared pages are not written
        again, so there only multiples of 128 can be returned to.
        """

    def reuse(self, tokens: Seq[int]) -> int:
        """Begin with what the prefix cache holds of these tokens; ValueError unless empty.

        Takes whole pages of 128 tokens, and never the last token, whose logits will be wanted.
        Returns how many tokens need not be fed; 0 without a prefix cache. What follows has the same
        bits as if they had been.
        """

    def close(self) -> None:
        """Free the pages. Harmless when repeated."""

class Sampler:
    """Draws tokens. The randomness at a position comes from seed and position alone."""

    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: dict[int, float] = ...,
        seed: int = 0,
        logprobs: int = -1,
    ) -> None:
        """top_k 0 is off; logprobs -1 is none, 0 only the drawn token's, n also the n likeliest."""

    def observe_prompt(self, tokens: Seq[int]) -> None:
        """Tell the repetition penalty what the prompt holds."""

    def record(self, token: int) -> None:
        """Tell the penalties of a drawn token. `Core.step` does it itself."""

    def allow(self, mask: Any | None) -> None:
        """Which tokens may be drawn from now on, until changed; None: any.

        mask: uint32 [ceil(vocab_size / 32)], bit t % 32 of word t // 32; it is copied. Penalties
        and filters see only what it allows; log probabilities stay those of the model. ValueError
        if it allows nothing.
        """

    def sample(self, logits: DLPackTensor, position: int) -> Sample:
        """Draw from one row, float32 [vocab_size], at this position of the sequence."""

class Sample:
    """A drawn token, its log probability (natural), and the likeliest tokens, best first."""

    token: Final[int]
    logprob: Final[float]
    top: Final[list[tuple[int, float]]]

class StopMatcher:
    """Finds stop strings in text that comes in pieces."""

    def __init__(self, stops: list[str]) -> None: ...
    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string begins right behind it)."""

    def flush(self) -> str:
        """The text still held back, when no more will come."""

class Ops:
    """Single operations of a backend, for tests. Results go into the first argument.

    invariant: a row's bits may not depend on how many rows there are (CUDA on sm_90)."""

    def __init__(
        self,
        device: str = "cpu",
        isa: str = "",
        threads: int = 1,
        precision: str = "exact",
        invariant: bool = True,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def embed(self, out: DLPackTensor, tokens: DLPackTensor, table: DLPackTensor) -> None:
        """out f32 [n, H] = rows `tokens` i32 [n] of table bf16 [V, H]."""

    def rmsnorm(self, out: DLPackTensor, x: DLPackTensor, weight: DLPackTensor, eps: float) -> None:
        """out f32 [n, H] = x f32 [n, H] / rms(x) * weight f32 [H]."""

    def linear(
        self,
        out: DLPackTensor,
        x: DLPackTensor,
        weight: DLPackTensor,
        bias: DLPackTensor | None,
        add: bool = False,
    ) -> None:
        """out f32 [n, M] = [out +] bf16(x f32 [n, K]) weight bf16 [M, K]^T + bias f32 [M].

        In the precision "fast" x and weight are rounded to int8, here and below.
        """

    def attention(
        self,
        out: DLPackTensor,
        qkv: DLPackTensor,
        positions: DLPackTensor,
        sequence_lengths: list[int],
        sinks: DLPackTensor,
        window: int,
        config: Config,
        chunk: int = 0,
    ) -> None:
        """Rotation, cache and attention of whole sequences.

        out f32 [n, n_heads * 64]; qkv f32 [n, (n_heads + 2 n_kv_heads) * 64], rows by sequence;
        positions i32 [n], from 0 in each sequence; sinks f32 [n_heads]; window 0 = all keys;
        chunk > 0 feeds that many rows at a time.
        """

    def route(
        self,
        ids: DLPackTensor,
        weights: DLPackTensor,
        t: DLPackTensor,
        weight: DLPackTensor,
        bias: DLPackTensor,
    ) -> None:
        """The k best (ids i32, weights f32 [n, k]) of t f32 [n, H] weight bf16 [E, H]^T + bias."""

    def moe(
        self,
        x: DLPackTensor,
        t: DLPackTensor,
        ids: DLPackTensor,
        weights: DLPackTensor,
        gate_up_blocks: DLPackTensor,
        gate_up_scales: DLPackTensor,
        gate_up_bias: DLPackTensor,
        down_blocks: DLPackTensor,
        down_scales: DLPackTensor,
        down_bias: DLPackTensor,
        limit: float,
    ) -> None:
        """x f32 [n, H] += weighted sum of the experts of t f32 [n, H].

        ids i32, weights f32 [n, k]; gate_up blocks u8 [E, 2I, H/32, 16], scales u8 [E, 2I, H/32],
        bias f32 [E, 2I]; down blocks u8 [E, H, I/32, 16], scales u8 [E, H, I/32], bias f32 [E, H].
        """

    def qkv_attention(
        self,
        out: DLPackTensor,
        q: DLPackTensor,
        x: DLPackTensor,
        norm: DLPackTensor,
        eps: float,
        weight: DLPackTensor,
        bias: DLPackTensor,
        positions: DLPackTensor,
        sequence_lengths: list[int],
        sinks: DLPackTensor,
        window: int,
        config: Config,
        chunk: int,
        fused: bool,
    ) -> None:
        """`attention` of qkv = rmsnorm(x f32 [n, H], norm f32 [H]) weight bf16 [M, H]^T + bias.

        Also writes the rotated queries, q f32 [n, n_heads * 64]. By the fused operation, or by the
        narrow ones one after the other.
        """

    def mlp(
        self,
        x: DLPackTensor,
        t: DLPackTensor,
        ids: DLPackTensor,
        weights: DLPackTensor,
        norm: DLPackTensor,
        eps: float,
        router: DLPackTensor,
        router_bias: DLPackTensor,
        experts: list[DLPackTensor],
        limit: float,
        fused: bool,
        padding: int = 0,
    ) -> None:
        """x f32 [n, H] += `moe` of t = rmsnorm(x, norm f32 [H]) by its `route`, all written.

        experts: gate_up blocks, scales, bias, down blocks, scales, bias. By the fused operation for
        norm and route, or by the narrow ones one after the other. The last `padding` rows only fill
        up the batch (CUDA): their ids are E, and their x stays.
        """

    def mxfp4_linear(
        self, out: DLPackTensor, x: DLPackTensor, blocks: DLPackTensor, scales: DLPackTensor
    ) -> None:
        """out f32 [n, M] = bf16(x f32 [n, K]) W^T; blocks u8 [M, K/32, 16], scales u8 [M, K/32]."""

    def sample(
        self, logits: DLPackTensor, samplers: list[Sampler], positions: list[int]
    ) -> list[Sample]:
        """A token of each row of logits f32 [n, V]; the logits are left as they were."""
