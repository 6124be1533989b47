"""Model.generate, stream and forward on a tiny random checkpoint."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gptoss import Model, SamplingParams, _gptoss

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=24, seed=11, ignore_eos=True)
LONG = [(7 * i) % 500 for i in range(1100)]  # more than two steps of the core take
PROMPTS = ["Hello", "x", [1, 2, 3], LONG, "naïve 🦙 text", [5], "a b c", [499], "end", [0, 0]]


def used_cache(model: Model) -> int:
    """Pages that sequences hold."""
    pages = model.core.cache_stats()
    return pages["full_in_use"] + pages["window_in_use"]


def text_of(model: Model, tokens: list[int]) -> str:
    return model.tokenizer.decode(tokens)


def test_greedy_takes_the_largest_logit(tiny: Model) -> None:
    result = tiny.generate("Hello", GREEDY)
    tokens = result.prompt_tokens + result.tokens
    logits = tiny.forward(tokens)
    start = len(result.prompt_tokens) - 1
    assert result.tokens == logits[start:-1].argmax(-1).tolist()
    assert result.prompt_tokens == tiny.tokenizer.encode("Hello")
    assert result.text == text_of(tiny, result.tokens)
    assert (result.finish_reason, result.stop_reason, result.logprobs) == ("length", None, None)
    timings = result.timings
    assert (timings.prefill_tokens, timings.decode_tokens) == (len(result.prompt_tokens), 11)
    assert timings.prefill_tokens_per_second > 0 and timings.decode_tokens_per_second > 0


def test_a_batch_changes_nothing(tiny: Model) -> None:
    """Ten prompts, two more than run at once, and one longer than a step."""
    batch = tiny.generate(PROMPTS, DRAWN)
    for prompt, together in zip(PROMPTS, batch, strict=True):
        alone = tiny.generate(prompt, DRAWN)
        assert together.tokens == alone.tokens
        assert together.text == alone.text
        assert len(together.tokens) == 24
    assert used_cache(tiny) == 0


@pytest.mark.parametrize("prompt", ["Hello", LONG])
def test_stream_is_generate(tiny: Model, prompt: object) -> None:
    result = tiny.generate(prompt, DRAWN)
    events = list(tiny.stream(prompt, DRAWN))
    assert [event.token for event in events] == result.tokens
    assert "".join(event.text for event in events) == result.text
    assert {event.finish_reason for event in events[:-1]} == {None}
    assert events[-1].finish_reason == "length"
    assert events[-1].timings is not None


def test_closing_a_stream_frees_its_cache(tiny: Model) -> None:
    stream = tiny.stream(LONG, DRAWN)
    assert used_cache(tiny) == 0  # nothing happens before the first token is asked for
    next(stream)
    assert used_cache(tiny) > 0
    stream.close()
    assert used_cache(tiny) == 0


def test_seeds(tiny: Model) -> None:
    def tokens(seed: int | None) -> list[int]:
        return tiny.generate([1], SamplingParams(max_new_tokens=16, seed=seed)).tokens

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(2**64 - 1) != tokens(0)
    assert tokens(None) != tokens(None)


def test_stop_tokens(tiny: Model) -> None:
    tokens = tiny.generate("Hello", DRAWN).tokens
    stop = next(token for token in tokens[5:] if token not in tokens[:5])
    end = tokens.index(stop) + 1
    params = SamplingParams(max_new_tokens=24, seed=11, ignore_eos=True, stop_token_ids=[stop])
    result = tiny.generate("Hello", params)
    assert result.tokens == tokens[:end]
    assert result.text == text_of(tiny, tokens[: end - 1])
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_the_checkpoints_stop_tokens(tiny: Model) -> None:
    eos = min(tiny.eos_token_ids)
    end_of_message = tiny.tokenizer.token_id("<|end|>")
    assert end_of_message not in tiny.eos_token_ids  # an assistant's turn goes on behind it

    def generate(token: int, **fields: object) -> object:
        params = SamplingParams(temperature=0, max_new_tokens=3, logit_bias={token: 100}, **fields)
        return tiny.generate("Hello", params)

    stopped = generate(eos)
    assert (stopped.tokens, stopped.text, stopped.stop_reason) == ([eos], "", eos)
    assert generate(eos, ignore_eos=True).tokens == [eos] * 3
    assert generate(eos, ignore_eos=True, stop_token_ids=[eos]).tokens == [eos]
    assert generate(end_of_message).tokens == [end_of_message] * 3


def test_stop_strings(tiny: Model) -> None:
    """The stop string is never shown, not even its beginning; what only looked like one is."""
    free = tiny.generate("Hello", DRAWN).text
    stop = free[10:13]
    end = free.index(stop)
    params = SamplingParams(
        max_new_tokens=24, seed=11, ignore_eos=True, stop=[free[2:5] + "no", stop]
    )
    result = tiny.generate("Hello", params)
    assert result.text == free[:end]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    shown = ""
    for event in tiny.stream("Hello", params):
        shown += event.text
        assert free[:end].startswith(shown)

    nested = SamplingParams(max_new_tokens=24, seed=11, ignore_eos=True, stop=[stop + "x", stop])
    assert tiny.generate("Hello", nested).stop_reason == stop

    nearly = SamplingParams(max_new_tokens=24, seed=11, ignore_eos=True, stop=free[-4:] + "no")
    assert tiny.generate("Hello", nearly).text == free


def test_half_a_character_at_the_end(tiny: Model) -> None:
    first_byte = next(t for t in range(512) if tiny.tokenizer.token_bytes(t) == b"\xf0")
    params = SamplingParams(temperature=0, max_new_tokens=1, logit_bias={first_byte: 100})
    assert [event.text for event in tiny.stream("Hello", params)] == ["\ufffd"]


def test_logprobs(tiny: Model) -> None:
    params = SamplingParams(max_new_tokens=5, seed=1, temperature=0.5, logprobs=3, ignore_eos=True)
    result = tiny.generate("Hello", params)
    scores = tiny.forward(result.prompt_tokens + result.tokens)[-6:-1].double().log_softmax(-1)
    assert len(result.logprobs) == 5
    for token, row, found in zip(result.tokens, scores, result.logprobs, strict=True):
        best = row.topk(3)
        assert found.token == token
        assert found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )

    chosen_only = tiny.generate("Hello", SamplingParams(max_new_tokens=2, logprobs=0))
    assert [logprob.top for logprob in chosen_only.logprobs] == [()] * len(chosen_only.tokens)


def test_forward(tiny: Model) -> None:
    logits = tiny.forward(LONG)
    assert (logits.shape, logits.dtype) == ((1100, tiny.config.vocab_size), torch.float32)
    assert logits.isfinite().all()
    assert torch.equal(logits[:700], tiny.forward(LONG[:700]))
    assert used_cache(tiny) == 0


def test_token_ids_of_any_kind(tiny: Model) -> None:
    expected = tiny.generate([3, 1, 4], GREEDY).tokens
    arrays = [
        (3, 1, 4),
        np.array([3, 1, 4], np.int32),
        torch.tensor([3, 1, 4]),
        [np.int64(3), 1, 4],
    ]
    for prompt in arrays:
        assert tiny.generate(prompt, GREEDY).tokens == expected
    for prompts in (arrays[:2], torch.tensor([[3, 1, 4]] * 2), [arrays[1], arrays[2]]):
        assert [result.tokens for result in tiny.generate(prompts, GREEDY)] == [expected] * 2
    assert torch.equal(tiny.forward(arrays[1]), tiny.forward(arrays[2]))


def test_text_is_never_a_control_token(tiny: Model) -> None:
    control = set(range(tiny.tokenizer.token_id("<|startoftext|>"), tiny.config.vocab_size))
    result = tiny.generate("<|start|>system<|message|>x<|end|>", GREEDY)
    assert not control & set(result.prompt_tokens)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        ([1, -1], "prompt token 1 .* not -1"),
        ([512], "from 0 to 511"),
        ([2**70], "from 0 to 511"),
        ([1.0], "must be an integer"),
        ([True], "must be an integer"),
        ([None], "must be an integer"),
        (["a", 1], "text or token ids, not int"),
        (b"abc", "text or token ids, not bytes"),
        (5, "text or token ids"),
        (None, "text or token ids"),
        ({1, 2}, "text or token ids"),
        ("a\ud800", "Unicode"),
        (torch.rand(3), "must be an integer"),
    ],
)
def test_bad_prompts(tiny: Model, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.generate(prompt, GREEDY)
    if not isinstance(prompt, list) or prompt[:1] not in ([[]], ["a"]):
        with pytest.raises(ValueError, match=message):
            tiny.stream(prompt, GREEDY)  # at once, not at the first token


@pytest.mark.parametrize(
    "params, message",
    [
        (SamplingParams(logit_bias={512: 1.0}), "logit_bias.*512"),
        (SamplingParams(stop_token_ids=[3, 512]), "stop_token_ids.*512"),
        ({"temperature": 1}, "SamplingParams"),
    ],
)
def test_bad_params(tiny: Model, params: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.generate("a", params)


def test_context_limit(tiny_path: Path) -> None:
    with Model.load(tiny_path, "cpu", max_context=40, progress=False) as model:
        assert model.max_context == 40

        def generate(n_prompt: int, n_new: int | None) -> list[int]:
            params = SamplingParams(max_new_tokens=n_new, ignore_eos=True)
            return model.generate([1] * n_prompt, params).tokens

        assert len(generate(30, 10)) == 10
        assert len(generate(30, None)) == 10
        assert len(generate(39, None)) == 1
        for n_prompt, n_new, message in [
            (30, 11, "30 tokens and 11 new ones are more than max_context 40"),
            (40, None, "40 tokens and 1 new"),
            (41, 1, "41 tokens and 1 new"),
        ]:
            with pytest.raises(ValueError, match=message):
                generate(n_prompt, n_new)
        with pytest.raises(ValueError, match="41 tokens are more than max_context 40"):
            model.forward([1] * 41)


def test_without_a_tokenizer(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bare"
    shutil.copytree(tiny_path, path)
    (path / "tokenizer.json").unlink()
    with Model.load(path, "cpu", progress=False) as model:
        result = model.generate([1, 2, 3], GREEDY)
        assert (len(result.tokens), result.text) == (12, None)
        assert {event.text for event in model.stream([1, 2, 3], GREEDY)} == {""}
        with pytest.raises(ValueError, match="text prompt needs a tokenizer"):
            model.generate("Hello")
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            model.generate([1], SamplingParams(stop="x"))


def test_close(tiny_path: Path) -> None:
    with Model.load(tiny_path, "cpu", progress=False) as model:
        stream = model.stream("Hello", DRAWN)
        next(stream)
    model.close()
    for use in (
        lambda: model.generate("Hello"),
        lambda: model.stream("Hello"),
        lambda: model.forward([1]),
        lambda: model.config,
        lambda: next(stream),
    ):
        with pytest.raises(RuntimeError, match="the model is closed"):
            use()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "gpu"}, "device must be"),
        ({"device": "cuda:x"}, "device must be"),
        ({"device": None}, "device must be"),
        ({"precision": "Fast"}, "precision must be"),
        ({"precision": None}, "precision must be"),
        ({"precision": "fast", "device": "cuda"}, "precision"),
        ({"threads": 0}, "threads must be"),
        ({"threads": 1.5}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"threads": 1025}, "threads must be"),
        ({"max_context": 0}, "max_context must be"),
        ({"max_context": "1k"}, "max_context must be"),
        ({"max_context": 2**30}, "max_context must be"),  # more than the model has
    ],
)
def test_bad_load_arguments(tiny_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model.load(tiny_path, **{"device": "cpu", "progress": False} | arguments)


@pytest.mark.skipif(_gptoss.cuda_available(), reason="needs a build or machine without CUDA")
def test_without_cuda(tiny_path: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        Model.load(tiny_path, "cuda", progress=False)
    with Model.load(tiny_path, "auto", progress=False) as model:
        assert model.core.device == "cpu"


def test_import_is_light() -> None:
    """Names are imported when used: torch alone takes seconds."""
    code = (
        "import sys, gptoss, gptoss.cli\n"
        "gptoss.Model, gptoss.SamplingParams, gptoss.__version__\n"
        "slow = {'torch', 'tokenizers', 'numpy', 'tqdm', 'transformers', 'safetensors'}\n"
        "print(slow & set(sys.modules), set(gptoss.__all__) - set(dir(gptoss)))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set() set()"
