from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest

from charloom.errors import OptionError
from charloom.params import (
    BIAS_LIMIT,
    BIASES_LIMIT,
    PENALTY_LIMIT,
    SEED_LIMIT,
    STOP_LENGTH_LIMIT,
    STOPS_LIMIT,
    SamplingOptions,
    SamplingParams,
)


def test_every_field_has_a_default_and_one_sentence_of_help() -> None:
    """Command line and service take help and default from here, so no field lacks either."""
    for option in fields(SamplingParams):
        assert option.default is not MISSING
        assert option.metadata["help"].endswith(".")


def test_keyword_options_are_the_fields() -> None:
    """The keywords of `Model.generate` are the fields, of the same names, order and types."""
    assert list(get_type_hints(SamplingOptions).items()) == list(
        get_type_hints(SamplingParams).items()
    )


def test_zero_is_a_value() -> None:
    """Zero is what it says wherever it is allowed, and never stands for "not given"."""
    params = SamplingParams(
        temperature=0,
        max_tokens=0,
        seed=0,
        min_p=0.0,
        frequency_penalty=0,
        presence_penalty=0.0,
        logprobs=0,
        logit_bias={0: 0},
    )
    assert (params.temperature, params.max_tokens, params.seed, params.min_p) == (0, 0, 0, 0.0)
    assert (params.frequency_penalty, params.presence_penalty, params.logprobs) == (0, 0.0, 0)
    assert params.logit_bias == {0: 0}


def test_what_is_not_given_is_none() -> None:
    """Only options with a neutral value have a number by default."""
    params = SamplingParams()
    given = {name for name in get_type_hints(SamplingParams) if getattr(params, name) is not None}
    assert given == {
        *("max_tokens", "min_tokens", "temperature", "stop", "include_stop_str_in_output"),
        *("ignore_eos", "n", "unknown", "precision"),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 5e-324},
        {"temperature": 1.7e308},
        {"top_k": 1},
        {"top_k": 10**30},
        {"top_p": 5e-324},
        {"top_p": 1},
        {"min_p": 0},
        {"min_p": 1.0},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"frequency_penalty": -PENALTY_LIMIT},
        {"frequency_penalty": PENALTY_LIMIT},
        {"presence_penalty": -2},
        {"presence_penalty": 2},
        {"typical_p": 5e-324},
        {"typical_p": 1},
        {"logit_bias": {}},
        {"logit_bias": {"e": BIAS_LIMIT, "the": -BIAS_LIMIT, 0: 0, 10**9: 1.5}},
        {"logprobs": 0},
        {"logprobs": 10**9},
        {"min_tokens": 0, "max_tokens": 0},
        {"min_tokens": 256},
        {"ignore_eos": True, "include_stop_str_in_output": True},
        {"precision": "int8"},
        {"precision": "float32"},
        {"seed": SEED_LIMIT - 1},
        {"stop": ("x" * STOP_LENGTH_LIMIT,) * STOPS_LIMIT},
        {"n": 2**32},
    ],
)
def test_limits_are_allowed(options: dict[str, Any]) -> None:
    """A value that stands on a limit is inside."""
    SamplingParams(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("min_tokens", 1.0),
        ("min_tokens", True),
        ("min_tokens", None),
        ("min_tokens", 257),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.0000001),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", 2.01),
        ("frequency_penalty", float("nan")),
        ("frequency_penalty", True),
        ("presence_penalty", -3),
        ("presence_penalty", "1"),
        ("presence_penalty", float("inf")),
        ("typical_p", 0.0),
        ("typical_p", 1.1),
        ("typical_p", float("nan")),
        ("logit_bias", [("e", 1)]),
        ("logit_bias", "e"),
        ("logit_bias", {"": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {True: 1}),
        ("logit_bias", {1.5: 1}),
        ("logit_bias", {None: 1}),
        ("logit_bias", {"e": 100.5}),
        ("logit_bias", {"e": -101}),
        ("logit_bias", {"e": float("nan")}),
        ("logit_bias", {7: float("-inf")}),
        ("logit_bias", {"e": None}),
        ("logit_bias", {"e": True}),
        ("logprobs", -1),
        ("logprobs", 1.0),
        ("logprobs", True),
        ("seed", -1),
        ("seed", SEED_LIMIT),
        ("stop", "text"),
        ("stop", ["text"]),
        ("stop", ("a", 1)),
        ("stop", ("a", "")),
        ("stop", ("a",) * (STOPS_LIMIT + 1)),
        ("stop", ("a" * (STOP_LENGTH_LIMIT + 1),)),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("include_stop_str_in_output", "yes"),
        ("n", 0),
        ("n", 2**32 + 1),
        ("unknown", "ignore"),
        ("precision", "int4"),
        ("precision", None),
    ],
)
def test_a_value_out_of_range_is_named_with_its_remedy(name: str, value: object) -> None:
    """The sentence begins with the field and says what to give instead."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(OptionError) as caught:
        SamplingParams(**options)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{name} ")
    assert any(remedy in problem for remedy in ("give", "choose", "leave", "name a token"))


def test_a_sentence_in_full() -> None:
    """Field, value and remedy stand in the sentence."""
    with pytest.raises(OptionError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "top_p is 1.5; give a finite number above 0 and at most 1."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"logit_bias": {"e": 101}},
            "logit_bias of 'e' is 101; give a finite number of at least -100 and at most 100.",
        ),
        (
            {"logit_bias": {-1: 0}},
            "logit_bias holds -1; name a token by its text or by its number from 0.",
        ),
        (
            {"frequency_penalty": 3},
            "frequency_penalty is 3; give a finite number of at least -2 and at most 2.",
        ),
        (
            {"min_tokens": 9, "max_tokens": 5},
            "min_tokens is 9, and max_tokens 5; give at most that many.",
        ),
        ({"ignore_eos": 0}, "ignore_eos is 0; give True or False."),
        ({"precision": "int4"}, "precision is 'int4'; choose one of auto, int8, float32."),
    ],
)
def test_sentences_of_penalties_biases_and_precision(
    options: dict[str, Any], sentence: str
) -> None:
    """A bias is told with the token it belongs to, and a choice with all there are."""
    with pytest.raises(OptionError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == sentence


def test_biases_have_a_number_too() -> None:
    """Each costs a look-up and may cost a sentence, so there is one about them all."""
    biases: dict[str | int, float] = dict.fromkeys(range(BIASES_LIMIT), 1.0)
    assert SamplingParams(logit_bias=biases).logit_bias == biases
    with pytest.raises(OptionError) as caught:
        SamplingParams(logit_bias={**biases, "": 1000.0})
    (problem,) = caught.value.problems
    assert problem == f"logit_bias holds {BIASES_LIMIT + 1} tokens; give at most {BIASES_LIMIT}."


def test_every_bias_out_of_range_is_told() -> None:
    """Each token of a mapping has its own sentence."""
    with pytest.raises(OptionError) as caught:
        SamplingParams(logit_bias={"a": 200, "b": 1, "": 0, "c": -200})
    assert len(caught.value.problems) == 3


def test_all_problems_are_told_at_once() -> None:
    """Every field out of range has its sentence, in one error."""
    with pytest.raises(OptionError) as caught:
        SamplingParams(max_tokens=-1, temperature=-1, top_k=0, top_p=2, seed=-3, n=0)
    named = [problem.split(" ")[0] for problem in caught.value.problems]
    assert sorted(named) == ["max_tokens", "n", "seed", "temperature", "top_k", "top_p"]
