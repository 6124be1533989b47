"""`Model.chat`: what a model's answers come to, over a scripted core and over a true one."""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from gptoss import Model, SamplingParams, chat
from gptoss.harmony import Delta
from harmony_text import call, final, last_message, thought, tokens_of
from scripted_core import ScriptedCore

USER = [{"role": "user", "content": "Hi"}]
GREEDY = SamplingParams(max_new_tokens=None, temperature=0)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}

Say = Callable[..., Model]


@pytest.fixture
def prompts() -> list[list[int]]:
    """Those that a model of `say` was asked to continue."""
    return []


@pytest.fixture
def say(harmony_model: Model, prompts: list[list[int]]) -> Say:
    """A model that gives these answers, one after the other."""
    tokenizer = harmony_model.tokenizer

    def make(*answers: str) -> Model:
        left = [tokens_of(tokenizer, answer) for answer in answers]

        def script(prompt: list[int]) -> list[int]:
            prompts.append(prompt)
            return left.pop(0)

        return Model(ScriptedCore(script, 201088, max_context=2000), tokenizer)

    return make


def test_an_answer(say: Say, prompts: list[list[int]]) -> None:
    model = say(thought("Hm.") + final("Hello 🦙"))
    result = model.chat(USER, params=GREEDY, reasoning_effort="low", date="2025-06-28")
    assert (result.reasoning, result.content, result.tool_calls) == ("Hm.", "Hello 🦙", [])
    assert result.finish_reason == "stop"
    assert result.message == {"role": "assistant", "content": "Hello 🦙", "reasoning": "Hm."}
    expected = model.harmony.render(USER, reasoning_effort="low", date="2025-06-28")
    assert prompts == [expected]
    n_answer = len(tokens_of(model.tokenizer, thought("Hm.") + final("Hello 🦙")))
    n_reasoning = len(model.tokenizer.encode("Hm."))
    assert result.usage == chat.Usage(len(expected), n_answer, n_reasoning)
    assert result.timings.prefill_tokens == len(expected)
    assert result.timings.decode_tokens == n_answer - 1


def test_stream(say: Say) -> None:
    model = say(thought("Hm. So") + final("One two"))
    stream = model.chat(USER, params=GREEDY, stream=True)
    assert stream.result.finish_reason == "cancelled" and stream.result.usage.completion_tokens == 0
    deltas = list(stream)
    assert deltas == [
        Delta("reasoning", "Hm"),
        Delta("reasoning", "."),
        Delta("reasoning", " So"),
        Delta("content", "One"),
        Delta("content", " two"),
    ]
    assert stream.result.finish_reason == "stop" and stream.result.content == "One two"


def test_a_tool_loop(say: Say, prompts: list[list[int]]) -> None:
    """Each result's message and the tool's go back as they are."""
    model = say(thought("Add them.") + call("add", '{"a": 1, "b": 2}'), final("3"))
    first = model.chat(USER, tools=[ADD], params=GREEDY)
    (wanted,) = first.tool_calls
    assert (wanted.name, wanted.arguments) == ("add", '{"a": 1, "b": 2}')
    assert (first.finish_reason, first.content) == ("tool_calls", "")
    result = {"role": "tool", "tool_call_id": wanted.id, "content": "3"}
    second = model.chat([*USER, first.message, result], tools=[ADD], params=GREEDY)
    assert (second.content, second.finish_reason) == ("3", "stop")
    header = "functions.add to=assistant<|channel|>commentary"
    assert last_message(model.tokenizer, prompts[1]) == (header, "3")
    assert "<|channel|>analysis<|message|>Add them.<|end|>" in model.tokenizer.decode(prompts[1])


def test_tools_that_are_not_offered(say: Say, prompts: list[list[int]]) -> None:
    for options in ({}, {"tools": [ADD], "tool_choice": "none"}):
        result = say(call("add", "{}")).chat(USER, params=GREEDY, **options)
        assert (result.content, result.tool_calls, result.finish_reason) == ("{}", [], "stop")
        assert "namespace functions" not in result_prompt(prompts)


def result_prompt(prompts: list[list[int]]) -> str:
    from gptoss.harmony import vocabulary

    return vocabulary._encoding().decode_utf8(prompts[-1])


def test_forced_calls_and_formats(say: Say) -> None:
    """A grammar holds the model to what was asked for, whatever it would rather say."""
    choice = {"type": "function", "function": {"name": "add"}}
    for options in ({"tool_choice": "required"}, {"tool_choice": choice}):
        result = say(call("add", '{"a": 1, "b": "x"}')).chat(
            USER, tools=[ADD], params=SamplingParams(max_new_tokens=60, temperature=0), **options
        )
        assert [c.name for c in result.tool_calls] == ["add"]
        assert result.tool_calls[0].arguments.startswith('{"a": 1, "b":')
        assert '"x"' not in result.tool_calls[0].arguments
    bound = say(final("No.")).chat(
        USER,
        response_format={"type": "json_object"},
        params=SamplingParams(max_new_tokens=30, temperature=0),
    )
    assert bound.content.startswith("{")


def test_stop_strings_are_for_the_content(say: Say) -> None:
    model = say(thought("one two") + final("Count: one two three"))
    params = SamplingParams(max_new_tokens=None, temperature=0, stop=[" two"])
    result = model.chat(USER, params=params)
    assert (result.reasoning, result.content) == ("one two", "Count: one")
    assert result.finish_reason == "stop" and not model.core.sequences
    assert result.timings.decode_tokens == result.usage.completion_tokens - 1 > 0


def test_max_new_tokens(say: Say) -> None:
    params = SamplingParams(max_new_tokens=5, temperature=0)
    result = say(final("a b c d e")).chat(USER, params=params)
    assert (result.finish_reason, result.content) == ("length", "a b")
    whole = say(final("word " * 3000)).chat(USER, params=GREEDY)
    assert whole.finish_reason == "length"
    assert whole.usage.prompt_tokens + whole.usage.completion_tokens == 2000


def test_ignore_eos(say: Say) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    result = say(final("a") + final("b")).chat(USER, params=params)
    assert result.content.startswith("a\n\nb") and result.usage.completion_tokens == 20


def test_closing_a_stream_frees_its_cache(say: Say) -> None:
    for leave in (lambda s: s.close(), lambda s: s.__exit__(None, None, None), lambda s: None):
        model = say(final("One two three"))
        stream = model.chat(USER, params=GREEDY, stream=True)
        assert next(stream).text == "One"
        assert len(model.core.sequences) == 1
        leave(stream)
        result = stream.result
        assert (result.content, result.finish_reason) == ("One", "cancelled")
        assert result.timings.decode_tokens == result.usage.completion_tokens - 1
        del stream
        assert not model.core.sequences


def test_bad_arguments(say: Say) -> None:
    """Refused at the call, before anything is computed."""
    model = say()
    for messages, options, error in (
        ([{"role": "x"}], {}, r"messages\[0\]\.role"),
        (USER, {"reasoning_effort": "none"}, "reasoning_effort"),
        (USER, {"tools": [{}]}, r"tools\[0\]\.type"),
        (USER, {"tool_choice": "add"}, "tool_choice"),
        (USER, {"tools": [ADD], "tool_choice": 5}, "tool_choice"),
        (USER, {"response_format": {"type": "yaml"}}, r"response_format\.type"),
        (USER, {"params": 5}, "params must be SamplingParams"),
        ([{"role": "user", "content": "word " * 3000}], {}, "max_context"),
    ):
        for stream in (False, True):
            with pytest.raises(ValueError, match=error):
                model.chat(messages, stream=stream, **options)
    with pytest.raises(TypeError, match="temperature"):
        model.chat(USER, temperature=0)
    assert model.core.n_steps == 0


def test_a_checkpoint_that_cannot_chat(tiny: Model) -> None:
    with pytest.raises(ValueError, match="not that of gpt-oss"):
        tiny.chat(USER)


def test_a_true_core(harmony_model: Model) -> None:
    """Random weights make random tokens of all kinds: an answer all the same, twice the same."""
    params = SamplingParams(max_new_tokens=40, seed=5)
    first = harmony_model.chat(USER, params=params, date="2025-06-28")
    assert first.content and first.usage.completion_tokens <= 40
    with harmony_model.chat(USER, params=params, date="2025-06-28", stream=True) as stream:
        text = "".join(delta.text for delta in stream if delta.kind == "content")
    assert text == stream.result.content == first.content


def test_without_openai_harmony() -> None:
    """The error names the extra that brings it."""
    code = """
        import sys
        sys.modules["openai_harmony"] = None
        from gptoss.harmony import Harmony
        from gptoss.synth_tokenizer import build_tokenizer
        from gptoss.tokenizer import Tokenizer
        import tokenizers
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(build_tokenizer(512)))
        try:
            Harmony.for_tokenizer(tokenizer)
        except ImportError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "the harmony format needs openai-harmony: pip install 'gptoss[chat]'\n"
