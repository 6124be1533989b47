"""SamplingParams: which values it takes, how it refuses the rest, and what it makes of them."""

import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from gptoss import SamplingParams

NAN, INF = math.nan, math.inf
BAD_VALUES = {
    "max_new_tokens": [0, -1, 1.0, True, "8", 2**31, 10**400],
    "temperature": [-0.1, NAN, INF, 101, True, "1", None, 10**400, 1j],
    "top_k": [-1, 1.5, True, None, "3"],
    "top_p": [0, -0.5, 1.01, NAN, INF, False, None],
    "min_p": [-0.01, 1.01, NAN, "0.5"],
    "repetition_penalty": [0, -1, 10.5, NAN, INF],
    "presence_penalty": [-2.01, 2.01, NAN],
    "frequency_penalty": [-2.01, 2.01, NAN],
    "logit_bias": [
        {-1: 0.0},
        {1: NAN},
        {1: 101},
        {"1": 0.0},
        {True: 0.0},
        {1: "x"},
        [(1, 1.0)],
        {i: 0.0 for i in range(4097)},
    ],
    "seed": [-1, 2**64, 1.0, True, "1"],
    "stop": ["", ["a", ""], [1], 1, ["x"] * 17, "x" * 1025, "\ud800", {"a": 1}, b"a"],
    "stop_token_ids": [[-1], [1.0], [True], 5, "12", [2**31], [0] * 257],
    "logprobs": [-1, 21, 1.0, True, "2"],
    "ignore_eos": [None, 1, "yes"],
}
GOOD_VALUES = {
    "max_new_tokens": [1, 2**31 - 1, None],
    "temperature": [0, 0.0, 1e-6, 100, np.float32(0.5)],
    "top_k": [0, 1, 10**6, np.int64(3)],
    "top_p": [1e-9, 0.5, 1],
    "min_p": [0, 1.0],
    "repetition_penalty": [0.1, 1, 10],
    "presence_penalty": [-2, 2.0],
    "frequency_penalty": [-2, 2.0],
    "logit_bias": [{}, {0: -100, 5: 100.0}, None],
    "seed": [None, 0, 2**64 - 1],
    "stop": [None, (), [], "end", ["a", "b"], ("\n",)],
    "stop_token_ids": [None, (), [0, 7], {3}],
    "logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
}


def cases(table: dict) -> list:
    return [
        pytest.param(name, value, id=f"{name}={value!r}"[:40])
        for name, values in table.items()
        for value in values
    ]


def test_every_field_is_tested() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names == BAD_VALUES.keys() == GOOD_VALUES.keys()


@pytest.mark.parametrize("name, value", cases(BAD_VALUES))
def test_bad_value_names_the_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} ") as error:
        SamplingParams(**{name: value})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name, value", cases(GOOD_VALUES))
def test_good_value(name: str, value: object) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_greedy_contradicts_filters(filters: dict) -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        SamplingParams(temperature=0, **filters)


def test_greedy_agrees_with_what_changes_nothing() -> None:
    SamplingParams(temperature=0, top_k=1, top_p=1.0, min_p=0.0, seed=3)


def test_values_are_normalized() -> None:
    biases = {7: 1}
    params = SamplingParams(
        temperature=1, stop="end", stop_token_ids=[3], logit_bias=biases, top_k=np.int64(4)
    )
    biases[8] = 2
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 1.0}
    assert type(params.temperature) is float and type(params.top_k) is int


def test_frozen_and_comparable() -> None:
    params = SamplingParams(seed=1)
    assert params == SamplingParams(seed=1) != SamplingParams(seed=2)
    with pytest.raises(FrozenInstanceError):
        params.seed = 2
