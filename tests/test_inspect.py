"""Counting: the numbers of OpenAI's model card, and agreement with transformers' own model."""

import io
from pathlib import Path

import pytest
from gptoss import inspect
from gptoss.config import parse_config, read_config
from gptoss.inspect import ATTENTION, MLP, VOCABULARY, Part
from gptoss.synth import synthesize
from rich.console import Console

# MLP, attention, embedding and unembedding, active, total (billions), checkpoint (GiB), bytes of
# cache per token. https://arxiv.org/abs/2508.10925, table 1.
MODEL_CARD = {
    "20b": (19.12, 0.64, 1.16, 3.61, 20.91, 12.8, 24576),
    "120b": (114.71, 0.96, 1.16, 5.13, 116.83, 60.8, 36864),
}


def official_config(preset: str):
    """The config of OpenAI's original/config.json for the real model."""
    values = {
        "num_hidden_layers": {"20b": 24, "120b": 36}[preset],
        "num_experts": {"20b": 32, "120b": 128}[preset],
        "experts_per_token": 4,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "swiglu_limit": 7.0,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }
    return parse_config(values, Path("config.json"))


@pytest.mark.parametrize("layout", ["huggingface", "original"])
@pytest.mark.parametrize("preset", ["20b", "120b"])
def test_model_card(preset: str, layout: str) -> None:
    description = inspect.describe_config(official_config(preset), layout)
    parts = {part.name: part for part in description.parts}
    total = description.total
    found = (
        *[round(parts[name].parameters / 1e9, 2) for name in (MLP, ATTENTION, VOCABULARY)],
        round(total.active_parameters / 1e9, 2),
        round(total.parameters / 1e9, 2),
        round(total.nbytes / 2**30, 1),
        description.cache_bytes_per_token,
    )
    assert found == MODEL_CARD[preset]


def test_cache_of_the_window_layers_is_bounded() -> None:
    description = inspect.describe_config(official_config("20b"))
    assert (description.n_window_layers, description.window) == (12, 128)
    assert description.cache_window_bytes == 12 * 256 * 2 * 8 * 64 * 2  # two pages a layer


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_a_checkpoint_counts_as_its_config_does(layout: str, tmp_path: Path) -> None:
    path = synthesize(tmp_path / "model", layout=layout, shards=3, progress=False)
    found = inspect.describe(path)
    expected = inspect.describe_config(read_config(path / "config.json"), layout)
    assert found.parts == expected.parts and found.total == expected.total
    assert found.total == Part(
        "Total",
        sum(part.parameters for part in found.parts),
        sum(part.active_parameters for part in found.parts),
        sum(part.nbytes for part in found.parts),
    )
    assert (found.layout, found.has_tokenizer, found.unused_tensors) == (layout, True, ())
    assert found.path == str(path)


def test_counts_every_parameter_that_transformers_has(tiny_path: Path) -> None:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig.from_pretrained(tiny_path)
    del config.quantization_config
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert inspect.describe(tiny_path).total.parameters == n_parameters


def test_render_prints_what_the_card_says() -> None:
    out = io.StringIO()
    inspect.render(inspect.describe_config(official_config("20b")), Console(file=out, width=100))
    for text in ("20.91B", "3.61B", "19.12B", "0.64B", "1.16B", "12.8 GiB", "24576 bytes"):
        assert text in out.getvalue()


def test_render_names_tensors_that_are_not_used(tiny_path: Path) -> None:
    from dataclasses import replace

    out = io.StringIO()
    description = replace(inspect.describe(tiny_path), unused_tensors=("extra.[weight]",))
    inspect.render(description, Console(file=out, width=200))
    assert "extra.[weight]" in out.getvalue()
    assert str(tiny_path) in out.getvalue()
