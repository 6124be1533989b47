"""Reads a checkpoint's config.json into `_gptoss.Config`.

Two spellings exist: Hugging Face's (`model_type` "gpt_oss"; YaRN under `rope_scaling`, or under
`rope_parameters` since transformers 5) and that of OpenAI's `original/` directory. Every field is
read and bounded here, before anything is allocated. One that is missing or makes no sense is a
ValueError naming file, field and value.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import _gptoss

HEAD_DIM = 64  # the kernels are written for this head size
BLOCK = 32  # MXFP4 block: inputs that share one scale
SWIGLU_ALPHA = 1.702  # gain of the sigmoid in the SwiGLU; no checkpoint has another
DTYPE_BYTES = {"BF16": 2, "F32": 4, "U8": 1}  # of the tensors of a checkpoint
MAX_JSON_BYTES = 16 << 20  # config, index and generation files are far smaller
_MAX_CONTEXT = 1 << 24
_MISSING = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a small JSON file that holds an object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, is larger than 16 MiB, is not JSON, or is not an object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {size} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, endless digits
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read by name, type and range.

    Attributes:
        path: the file, for messages.
        values: the object.
        prefix: where in the file the object sits, such as "rope_scaling.".
    """

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def fail(self, name: str, expectation: str) -> NoReturn:
        """Raises a ValueError that names file, field and value."""
        value = self.values.get(name, _MISSING)
        found = "is missing" if value is _MISSING else f"is {reprlib.repr(value)}"
        raise ValueError(f"{self.path}: {self.prefix}{name} {found}, expected {expectation}")

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def integer(self, name: str, low: int, high: int) -> int:
        """A required integer in [low, high]; neither a bool nor a float passes for one."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]; required unless there is a default."""
        value = self.values.get(name, default)
        if value is None and default is not None:
            return default
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            self.fail(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A bool; null counts as absent."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def constant(self, name: str, expected: object) -> None:
        """A field that may be absent but must have this value if it is there."""
        value = self.values.get(name)
        if value is None:
            return
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            self.fail(name, json.dumps(expected))

    def table(self, name: str) -> Fields:
        """A required object within this one."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.fail(name, "an object")
        return Fields(self.path, value, f"{self.prefix}{name}.")


def read_config(path: Path) -> _gptoss.Config:
    """Reads a config.json in either spelling.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a gpt-oss config, or a field that is missing or absurd; names file, field
            and value.
    """
    return parse_config(read_json_object(path), path)


def parse_config(values: dict[str, Any], path: Path) -> _gptoss.Config:
    """Checks the fields of a config.json; `path` is for messages. Raises as `read_config` does."""
    fields = Fields(path, values)
    fields.constant("model_type", "gpt_oss")
    original = "num_experts" in values and "num_local_experts" not in values
    if not original and not fields.has("model_type"):
        fields.fail(
            "model_type", '"gpt_oss" (and it has not the fields of OpenAI\'s original config)'
        )
    shape = _read_shape(fields, "num_experts" if original else "num_local_experts")
    rest = _read_original(fields, shape) if original else _read_hugging_face(fields, shape)
    try:
        return _gptoss.Config(**shape, **rest)
    except ValueError as error:  # the core's own checks know no file
        raise ValueError(f"{path}: {error}") from error


def _read_shape(fields: Fields, experts_field: str) -> dict[str, Any]:
    """The sizes, which both spellings but for the number of experts call alike."""
    shape: dict[str, Any] = {
        "hidden_size": fields.integer("hidden_size", BLOCK, 1 << 16),
        "n_layers": fields.integer("num_hidden_layers", 1, 1024),
        "n_heads": fields.integer("num_attention_heads", 1, 1024),
        "n_kv_heads": fields.integer("num_key_value_heads", 1, 1024),
        "head_dim": fields.integer("head_dim", HEAD_DIM, HEAD_DIM),
        "n_experts": fields.integer(experts_field, 1, 4096),
        "intermediate_size": fields.integer("intermediate_size", BLOCK, 1 << 18),
        "vocab_size": fields.integer("vocab_size", 1, 1 << 24),
        "swiglu_limit": fields.number("swiglu_limit", 1e-3, 1e4, default=7.0),
    }
    for name in ("hidden_size", "intermediate_size"):
        if shape[name] % BLOCK:
            fields.fail(name, f"a multiple of {BLOCK}")
    if shape["n_heads"] % shape["n_kv_heads"]:
        fields.fail(
            "num_attention_heads", f"a multiple of num_key_value_heads ({shape['n_kv_heads']})"
        )
    top_k = "num_experts_per_tok" if fields.has("num_experts_per_tok") else "experts_per_token"
    shape["experts_per_token"] = fields.integer(top_k, 1, shape["n_experts"])
    fields.constant("experts_per_token", shape["experts_per_token"])  # if both are there
    return shape


def _read_hugging_face(fields: Fields, shape: dict[str, Any]) -> dict[str, Any]:
    """What transformers' GptOssConfig holds beyond the sizes."""
    for name, expected in {
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "swiglu_alpha": SWIGLU_ALPHA,
    }.items():
        fields.constant(name, expected)
    if fields.has("quantization_config"):
        fields.table("quantization_config").constant("quant_method", "mxfp4")
    max_context = fields.integer("max_position_embeddings", 1, _MAX_CONTEXT)
    return {
        "max_context": max_context,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-12, 0.1),
        "layer_windows": _read_layer_windows(fields, shape["n_layers"]),
        **_read_rope(fields, max_context),
    }


def _read_layer_windows(fields: Fields, n_layers: int) -> list[int]:
    """How many keys each layer sees, 0 for all of them; [n_layers]."""
    types = fields.values.get("layer_types")
    if not isinstance(types, list) or len(types) != n_layers:
        fields.fail("layer_types", f"a list of {n_layers}, one for each of num_hidden_layers")
    for layer, kind in enumerate(types):
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(
                f"{fields.path}: layer_types[{layer}] is {reprlib.repr(kind)}, "
                "expected sliding_attention or full_attention"
            )
    if "sliding_attention" not in types:
        return [0] * n_layers
    window = fields.integer("sliding_window", 1, _MAX_CONTEXT)
    return [window if kind == "sliding_attention" else 0 for kind in types]


def _read_rope(fields: Fields, max_context: int) -> dict[str, Any]:
    """Rotary fields from `rope_scaling` or `rope_parameters`; defaults are transformers'."""
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    if not fields.has(name):
        fields.fail(
            "rope_scaling", "an object (or one under rope_parameters, as transformers 5 writes it)"
        )
    rope = fields.table(name)
    theta = _read_theta(rope if rope.has("rope_theta") else fields)
    for other in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        rope.constant(other, 1.0 if other == "partial_rotary_factor" else None)
    kind = "rope_type" if rope.has("rope_type") else "type"
    if not rope.has(kind):
        if rope.has("factor"):
            rope.fail("rope_type", '"yarn" beside a factor')
        return _unscaled_rope(theta, max_context)
    if rope.values[kind] == "default":
        return _unscaled_rope(theta, max_context)
    if rope.values[kind] != "yarn":
        rope.fail(kind, '"yarn" or "default"')
    factor = rope.number("factor", 1.0, 1e4)
    return {
        "rope_theta": theta,
        "rope_factor": factor,
        "rope_original_context": rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT),
        "rope_truncate": rope.flag("truncate", default=True),
        "rope_attention_factor": rope.number(
            "attention_factor", 1e-3, 1e3, _attention_factor(factor)
        ),
        **_read_betas(rope, "beta_fast", "beta_slow"),
    }


def _read_theta(fields: Fields) -> float:
    return fields.number("rope_theta", 1.001, 1e15)


def _read_betas(fields: Fields, fast_field: str, slow_field: str) -> dict[str, float]:
    """A pair that turns more often than `fast` in the original context is kept as it is; one that
    turns less often than `slow` is interpolated."""
    fast = fields.number(fast_field, 1e-3, 1e6, default=32.0)
    slow = fields.number(slow_field, 1e-3, 1e6, default=1.0)
    if slow >= fast:
        fields.fail(slow_field, f"less than {fast_field} ({fast:g})")
    return {"rope_beta_fast": fast, "rope_beta_slow": slow}


def _attention_factor(factor: float) -> float:
    """YaRN's gain on cos and sin (https://arxiv.org/abs/2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0


def _unscaled_rope(theta: float, max_context: int) -> dict[str, Any]:
    """Plain rotary embedding: a factor of 1, for which YaRN changes nothing."""
    return {
        "rope_theta": theta,
        "rope_factor": 1.0,
        "rope_original_context": max_context,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_truncate": False,
        "rope_attention_factor": 1.0,
    }


def _read_original(fields: Fields, shape: dict[str, Any]) -> dict[str, Any]:
    """What OpenAI's config holds beyond the sizes; what it leaves out, the reference fixes."""
    context = fields.integer("initial_context_length", 1, _MAX_CONTEXT)
    factor = fields.number("rope_scaling_factor", 1.0, 1e4)
    max_context = int(context * factor)
    if max_context > _MAX_CONTEXT:
        fields.fail(
            "rope_scaling_factor", f"at most {_MAX_CONTEXT} tokens with initial_context_length"
        )
    window = fields.integer("sliding_window", 1, _MAX_CONTEXT)
    return {
        "max_context": max_context,
        "rms_norm_eps": 1e-5,
        "layer_windows": [0 if layer % 2 else window for layer in range(shape["n_layers"])],
        "rope_theta": _read_theta(fields),
        "rope_factor": factor,
        "rope_original_context": context,
        "rope_truncate": False,
        "rope_attention_factor": _attention_factor(factor),
        **_read_betas(fields, "rope_ntk_beta", "rope_ntk_alpha"),
    }
