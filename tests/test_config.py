"""Reading config.json: both spellings, transformers' defaults, and every field that can be bad."""

import copy
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import LAYOUTS, config_of, fields_of, write_small
from gptoss.config import parse_config

MISSING = object()
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A good config.json of each spelling; not to be changed."""
    root = tmp_path_factory.mktemp("configs")
    return {layout: config_of(write_small(root / layout, layout)) for layout in LAYOUTS}


@pytest.fixture
def hugging_face(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One in transformers' spelling, free to be changed."""
    return copy.deepcopy(configs["huggingface"])


# Rotary embedding: two spellings, transformers' defaults.


def rope_of(values: dict[str, Any]) -> dict[str, Any]:
    found = fields_of(parse_config(values, Path("config.json")))
    return {name: value for name, value in found.items() if name.startswith("rope_")}


@pytest.mark.parametrize("theta_inside", [False, True])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_spellings_of_yarn(
    name: str, kind: str, theta_inside: bool, hugging_face: dict[str, Any]
) -> None:
    values = hugging_face
    expected = rope_of(values)
    assert expected["rope_attention_factor"] == pytest.approx(1.3465735902799727)
    rope = values.pop("rope_scaling")
    rope[kind] = rope.pop("rope_type")
    if theta_inside:
        rope["rope_theta"] = values.pop("rope_theta")
    values[name] = rope
    assert rope_of(values) == expected


def test_defaults_of_yarn_are_those_of_transformers(hugging_face: dict[str, Any]) -> None:
    values = hugging_face
    values["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 512,
    }
    assert rope_of(values) == {
        "rope_theta": 150000.0,
        "rope_factor": 8.0,
        "rope_original_context": 512,
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_truncate": True,
        "rope_attention_factor": pytest.approx(1.2079441541679836),
    }
    values["rope_scaling"] |= {"attention_factor": 1.5, "beta_fast": 16, "truncate": False}
    rope = rope_of(values)
    assert (rope["rope_attention_factor"], rope["rope_beta_fast"]) == (1.5, 16.0)
    assert rope["rope_truncate"] is False


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_theta": 1e4}])
def test_no_scaling(rope: dict, hugging_face: dict[str, Any]) -> None:
    values = hugging_face | {"rope_scaling": None, "rope_parameters": rope}
    found = rope_of(values)
    assert (found["rope_factor"], found["rope_attention_factor"]) == (1.0, 1.0)
    assert found["rope_theta"] == rope.get("rope_theta", 150000.0)


def test_config_written_by_transformers(hugging_face: dict[str, Any], tmp_path: Path) -> None:
    from transformers import GptOssConfig

    GptOssConfig.from_dict(copy.deepcopy(hugging_face)).save_pretrained(tmp_path)
    ours = parse_config(hugging_face, Path("config.json"))
    theirs = parse_config(config_of(tmp_path), tmp_path / "config.json")
    assert fields_of(theirs) == fields_of(ours)


def test_fields_that_transformers_may_leave_out(hugging_face: dict[str, Any]) -> None:
    values = hugging_face
    expected = fields_of(parse_config(dict(values), Path("config.json")))
    for name in ("swiglu_limit", "attention_bias", "hidden_act", "tie_word_embeddings"):
        del values[name]
    del values["num_experts_per_tok"]  # leaves experts_per_token
    assert fields_of(parse_config(values, Path("config.json"))) == expected


# Bad configs.

BAD_SIZES = [0, -1, True, "2", 2.0, None, MISSING, [2], 10**12, NAN]
BAD_NUMBERS = [0, -1, NAN, INFINITY, "1", True, MISSING, 10**400]
BAD_FIELDS = [
    *[
        (layout, name, value)
        for layout in LAYOUTS
        for name in ("num_hidden_layers", "hidden_size", "vocab_size", "sliding_window")
        for value in BAD_SIZES
    ],
    *[("huggingface", "rms_norm_eps", value) for value in BAD_NUMBERS],
    *[(layout, "rope_theta", value) for layout in LAYOUTS for value in BAD_NUMBERS],
    *[("original", "rope_scaling_factor", value) for value in (*BAD_NUMBERS, 0.5)],
    *[("original", "initial_context_length", value) for value in BAD_SIZES],
    *[("original", "num_experts", value) for value in (0, -1, 1.5, 10**12)],
    *[("original", "rope_ntk_alpha", value) for value in (0, NAN, 40)],
    *[("huggingface", "num_local_experts", value) for value in BAD_SIZES],
    *[("huggingface", "max_position_embeddings", value) for value in BAD_SIZES],
    ("huggingface", "head_dim", 128),
    ("huggingface", "head_dim", MISSING),
    ("huggingface", "hidden_size", 100),
    ("huggingface", "intermediate_size", 2881),
    ("huggingface", "num_attention_heads", 0),
    ("huggingface", "num_key_value_heads", 0),
    ("huggingface", "num_experts_per_tok", 0),
    ("huggingface", "num_experts_per_tok", 9),
    ("huggingface", "experts_per_token", 2),
    ("huggingface", "swiglu_limit", 0),
    ("huggingface", "swiglu_limit", INFINITY),
    ("huggingface", "swiglu_alpha", 1.0),
    ("huggingface", "layer_types", MISSING),
    ("huggingface", "layer_types", ["full_attention"]),
    ("huggingface", "layer_types", ["full_attention", "chunked_attention"]),
    ("huggingface", "layer_types", ["full_attention", ["sliding_attention"]]),
    ("huggingface", "layer_types", "full_attention"),
    ("huggingface", "model_type", "llama"),
    ("huggingface", "model_type", MISSING),
    ("original", "model_type", "llama"),
    ("huggingface", "attention_bias", False),
    ("huggingface", "attention_bias", 1),
    ("huggingface", "hidden_act", "gelu"),
    ("huggingface", "tie_word_embeddings", True),
    ("huggingface", "quantization_config", "mxfp4"),
    ("huggingface", "quantization_config", {"quant_method": "fp8"}),
    ("huggingface", "rope_scaling", MISSING),
    ("huggingface", "rope_scaling", "yarn"),
]


def case_id(value: Any) -> str:
    return "missing" if value is MISSING else repr(value)[:30]


@pytest.mark.parametrize(("layout", "name", "value"), BAD_FIELDS, ids=case_id)
def test_bad_field(layout: str, name: str, value: Any, configs: dict[str, Any]) -> None:
    values = dict(configs[layout])
    if value is MISSING:
        del values[name]
    else:
        values[name] = value
    file = Path("somewhere/config.json")
    with pytest.raises(ValueError) as error:
        parse_config(values, file)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and name in message and len(message) < 400
    if value is MISSING:
        assert "missing" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", NAN),
        ("factor", 0.5),
        ("factor", MISSING),
        ("rope_type", "llama3"),
        ("rope_type", 3),
        ("rope_type", MISSING),
        ("original_max_position_embeddings", 4096.5),
        ("original_max_position_embeddings", MISSING),
        ("beta_fast", -1),
        ("beta_fast", 0.5),
        ("beta_slow", "1"),
        ("beta_slow", 32),
        ("truncate", 0),
        ("attention_factor", INFINITY),
        ("mscale", 1.0),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_bad_rope_field(name: str, value: Any, hugging_face: dict[str, Any]) -> None:
    values = hugging_face
    if value is MISSING:
        del values["rope_scaling"][name]
    else:
        values["rope_scaling"][name] = value
    with pytest.raises(ValueError, match=r"^config\.json: rope_scaling\.") as error:
        parse_config(values, Path("config.json"))
    assert name in str(error.value) or "beta_slow" in str(error.value)


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads"])
def test_heads_that_do_not_divide(field: str, hugging_face: dict[str, Any]) -> None:
    values = hugging_face | {
        "num_attention_heads": 6,
        "num_key_value_heads": 4,
    }
    with pytest.raises(ValueError, match=field):
        parse_config(values, Path("config.json"))
