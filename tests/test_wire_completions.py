import json
from dataclasses import fields
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import OptionError
from charloom.params import SEED_LIMIT, SamplingParams
from service import frames
from service.errors import RequestError
from service.messages import Accepted, Delta, Ended, Judged, Submit
from service.settings import Settings
from service.web.body import check, dump
from service.web.wire.completions import Completion, CompletionReply, CompletionRequest
from service.web.wire.errors import envelope

SETTINGS = Settings(logprobs=20)

PUBLISHED = {
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
}
"""The fields of OpenAI's description of this request."""


def order(settings: Settings = SETTINGS, **body: Any) -> Submit:
    """What a body comes to."""
    return check(CompletionRequest, {"model": "demo", **body}).to_submit(settings, "me")


def refused(**body: Any) -> tuple[str | None, str]:
    """The field and the message with which a body is refused."""
    with pytest.raises(RequestError) as caught:
        order(**body)
    assert caught.value.problem.status == 400
    return caught.value.problem.param, caught.value.problem.message


# Requests


def test_a_bare_request_has_the_defaults() -> None:
    """Only the model is needed: the rest is what the core and the settings say."""
    settings = Settings(precision="float32", timeout=5, stream_interval=0.5)
    assert order(settings) == Submit(
        id=0,
        model="demo",
        prompts=[""],
        params=SamplingParams(precision="float32"),
        interval=0.5,
        timeout=5.0,
        owner="me",
    )


def test_every_field_reaches_the_engine() -> None:
    """Each option arrives as it was given."""
    options = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.25,
        "logprobs": 5,
        "seed": 11,
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "n": 2,
        "unknown": "skip",
        "precision": "int8",
    }
    found = order(
        prompt=["a", "b"],
        best_of=3,
        echo=True,
        stop=["x", "y"],
        logit_bias={"5": -100, "0": 1.5},
        user="someone",
        **options,
    )
    assert found.params == SamplingParams(
        stop=("x", "y"), logit_bias={5: -100.0, 0: 1.5}, **options
    )
    assert (found.prompts, found.best_of, found.is_echoed) == (["a", "b"], 3, True)
    assert {field.name for field in fields(SamplingParams)} == {*options, "stop", "logit_bias"}


def test_a_stream_has_its_own_fields() -> None:
    """Interval and usage are asked for with the stream."""
    body = {"stream": True, "stream_options": {"include_usage": True}, "stream_interval": 0}
    found = order(**body)
    assert (found.is_streamed, found.interval) == (True, 0.0)
    assert check(CompletionRequest, {"model": "demo", **body}).wants_usage


def test_all_published_fields_are_known() -> None:
    """Each field of OpenAI's description is read or refused by name, never passed over."""
    assert set(CompletionRequest.model_fields) >= PUBLISHED


@pytest.mark.parametrize("name", sorted(set(CompletionRequest.model_fields) - {"model"}))
def test_null_means_not_given(name: str) -> None:
    """Clients send null for what they leave out."""
    assert order(**{name: None}) == order()


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "temperature", "seed", "logprobs", "min_p", "frequency_penalty", "min_tokens"],
)
def test_zero_is_zero(name: str) -> None:
    """Zero is a value, and no other word for the default."""
    assert getattr(order(**{name: 0}).params, name) == 0


@pytest.mark.parametrize("name", ["echo", "stream", "include_stop_str_in_output", "ignore_eos"])
def test_false_is_the_default(name: str) -> None:
    """Saying no is the same as saying nothing."""
    assert order(**{name: False}) == order()


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("", [""]),
        ("To be", ["To be"]),
        ([""], [""]),
        (["To", "be"], ["To", "be"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([0], [[0]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([2**31 - 1], [[2**31 - 1]]),
        (["a"] * 2048, ["a"] * 2048),
    ],
)
def test_prompts_come_in_four_forms(prompt: object, prompts: object) -> None:
    """A text, texts, tokens, and lists of tokens; a list of numbers is one prompt."""
    assert order(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (5, "prompt"),
        ({}, "prompt"),
        (True, "prompt"),
        ([], "prompt"),
        ([[]], "prompt.0"),
        ([[1], []], "prompt.1"),
        (["a", 5], "prompt.1"),
        (["a", None], "prompt.1"),
        ([1, "a"], "prompt.1"),
        ([1, 2.0], "prompt.1"),
        ([True], "prompt.0"),
        ([-1], "prompt.0"),
        ([2**31], "prompt.0"),
        ([[1], 2], "prompt.1"),
        ([[1, -2]], "prompt.0.1"),
        ([["a"]], "prompt.0.0"),
        (["a"] * 2049, "prompt"),
        ([[1]] * 2049, "prompt"),
    ],
)
def test_other_prompts_are_refused_where_they_are_wrong(prompt: object, param: str) -> None:
    """The path leads to the item that does not fit."""
    assert refused(prompt=prompt)[0] == param


@pytest.mark.parametrize(("stop", "stops"), [("a", ("a",)), (["a"], ("a",)), ([], ())])
def test_stop_is_one_string_or_several(stop: object, stops: tuple[str, ...]) -> None:
    """Both forms come to the same."""
    assert order(stop=stop).params.stop == stops


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"seed": -1}, "seed", f"from 0 to {SEED_LIMIT - 1}"),
        ({"seed": SEED_LIMIT}, "seed", f"from 0 to {SEED_LIMIT - 1}"),
        ({"max_tokens": 10**30}, "max_tokens", "less than"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 129}, "n", "at most 128"),
        ({"best_of": 1, "n": 2}, "best_of", "at least n"),
        ({"best_of": 21}, "best_of", "at most 20"),
        ({"best_of": 2, "stream": True}, "best_of", "stream"),
        ({"logprobs": -1}, "logprobs", "at least 0"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"logit_bias": {"e": 1}}, "logit_bias", "'e'"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "'05'"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
        ({"logit_bias": {str(2**31): 1}}, "logit_bias", "number"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "at most 100"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5", "a number"),
        ({"suffix": ""}, "suffix", "does not support"),
        ({"stream_options": {}}, "stream_options", "stream is not true"),
        ({"stream": False, "stream_interval": 1}, "stream_interval", "stream is not true"),
        ({"stream": True, "stream_interval": 61}, "stream_interval", "at most 60"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "does not support",
        ),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no field"),
        ({"unknown": "guess"}, "unknown", "'replace'"),
        ({"precision": "int4"}, "precision", "'int8'"),
        ({"stop_token_ids": [1]}, "stop_token_ids", "no field"),
        ({"model": "m" * 256}, "model", "255"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    body: dict[str, Any], param: str, words: str
) -> None:
    """Each sentence names the field and the remedy."""
    found = refused(**body)
    assert found[0] == param
    assert words in found[1]


def test_problems_of_all_kinds_are_told_together() -> None:
    """What this module and what the core object to come in one answer."""
    _, message = refused(best_of=1, n=2, temperature=-1, logit_bias={"e": 1})
    assert all(f"{name} " in message for name in ("best_of", "temperature", "logit_bias"))


def test_false_for_obfuscation_is_taken() -> None:
    """Some clients say that they want none."""
    order(stream=True, stream_options={"include_obfuscation": False, "include_usage": None})


LIMITS = [
    (name, key, limit)
    for name, schema in CompletionRequest.model_json_schema()["properties"].items()
    for key, limit in schema.items()
    if key in ("minimum", "exclusiveMinimum", "maximum") and name != "logprobs"
]


@pytest.mark.parametrize(("name", "key", "limit"), LIMITS)
def test_documented_ranges_are_those_of_the_core(name: str, key: str, limit: float) -> None:
    """Each end of a range in the document is where the core begins to refuse."""
    options: dict[str, Any] = {"max_tokens": 2**62} if name == "min_tokens" else {}
    step = {"minimum": -1, "exclusiveMinimum": 0, "maximum": 1}[key]
    if key == "exclusiveMinimum":
        SamplingParams(**{name: limit + 0.01})
    else:
        SamplingParams(**{name: limit, **options})
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: limit + step, **options})


@pytest.mark.parametrize("stop", ["", "x" * 501, ["x", ""], ["x"] * 65, "x" * 500, ["x"] * 64])
def test_documented_stops_are_those_of_the_core(stop: object) -> None:
    """The document allows a stop string where the core does."""
    schema = CompletionRequest.model_json_schema()["properties"]["stop"]
    is_allowed = jsonschema_rs.is_valid(schema, stop)
    if is_allowed:
        order(stop=stop)
    else:
        assert refused(stop=stop)[0] == "stop"


def test_ranges_are_documented() -> None:
    """The document has a range for every option that has one."""
    assert {name for name, _, _ in LIMITS} == {
        "frequency_penalty",
        "max_tokens",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=0, max_value=30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(min_value=0, max_value=1)
    | st.text(max_size=5)
    | st.sampled_from(["skip", "float32"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
bodies = st.dictionaries(
    st.sampled_from(sorted(CompletionRequest.model_fields)) | st.text(max_size=5),
    values,
    max_size=6,
).map(lambda body: {"model": "demo", **body})


@given(values | bodies)
def test_any_body_is_an_order_or_a_refusal(body: object) -> None:
    """Nothing that JSON can hold raises anything else, and both can be sent on."""
    try:
        found = check(CompletionRequest, body).to_submit(SETTINGS, "me")
    except RequestError as error:
        dump(envelope(error.problem))
    else:
        frames.encode(found)


valid = st.fixed_dictionaries(
    {"model": st.text(max_size=20)},
    optional={
        "prompt": st.none()
        | st.text()
        | st.lists(st.text(), min_size=1)
        | st.lists(st.integers(0, 2**31 - 1), min_size=1)
        | st.lists(st.lists(st.integers(0, 99), min_size=1), min_size=1),
        "max_tokens": st.integers(0, 2**63 - 1),
        "temperature": st.floats(0, 1e300) | st.integers(0, 2**60),
        "top_k": st.integers(1, 2**63 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(0.01, 100),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1).map(str), st.floats(-100, 100)),
        "seed": st.integers(0, SEED_LIMIT - 1),
        "stop": st.text(min_size=1, max_size=500)
        | st.lists(st.text(min_size=1, max_size=9), max_size=64),
        "n": st.integers(1, 128),
        "logprobs": st.integers(0, 20),
        "echo": st.booleans(),
        "user": st.text(),
        "unknown": st.sampled_from(["error", "replace", "skip"]),
    },
)


@given(valid)
def test_valid_bodies_come_through_unchanged(body: dict[str, Any]) -> None:
    """What is allowed reaches the engine as it was written, over its socket too."""
    found = check(CompletionRequest, json.loads(json.dumps(body))).to_submit(SETTINGS, "me")
    (read,) = frames.FrameReader(Submit).push(frames.encode(found))
    assert read == found
    for name in {"max_tokens", "temperature", "top_k", "top_p", "seed", "n", "logprobs"} & {*body}:
        assert getattr(found.params, name) == body[name]
    if "logit_bias" in body:
        assert found.params.logit_bias == {
            int(name): bias for name, bias in body["logit_bias"].items()
        }


# Answers

ACCEPTED = Accepted(
    id=1,
    created=1795186800,
    model="demo",
    fingerprint="0123456789abcdef" * 4,
    precision="int8",
    seed=99,
    prompt_tokens=5,
)
ENDED = Ended(id=1, completion_tokens=7, cached_tokens=3)


def reply(*, logprobs: bool = False, usage: bool = False) -> CompletionReply:
    """The form of an answer."""
    return CompletionReply(ACCEPTED, wants_logprobs=logprobs, wants_usage=usage)


def written(value: object) -> Any:
    """A body as a client reads it."""
    return json.loads(dump(value))


def judged(
    tokens: list[str],
    logprobs: list[float | None],
    top: list[list[tuple[str, float]] | None] | None = None,
) -> Judged:
    """Judgements of tokens whose numbers do not matter."""
    return Judged(
        tokens=tokens,
        ids=list(range(len(tokens))),
        logprobs=logprobs,
        top=[[] for _ in tokens] if top is None else top,
    )


def test_an_answer_has_the_published_shape() -> None:
    """Every key of OpenAI's, and ours beside them."""
    texts = [
        Delta(id=1, index=0, text="ab", tokens=3, finish="stop", stop_reason="\n"),
        Delta(id=1, index=1, text="", tokens=4, finish="length"),
    ]
    found = written(reply().whole(texts, ENDED))
    assert found.pop("id").startswith("cmpl-")
    assert found == {
        "object": "text_completion",
        "created": 1795186800,
        "model": "demo",
        "system_fingerprint": "fp_0123456789abcdef_int8",
        "seed": 99,
        "choices": [
            {
                "index": 0,
                "text": "ab",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": "\n",
            },
            {
                "index": 1,
                "text": "",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            },
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


def test_ids_are_24_hexadecimal_digits_and_never_the_same() -> None:
    """Each request has a name of its own."""
    names = {written(reply().frame())["id"] for _ in range(100)}
    assert len(names) == 100
    assert all(len(bytes.fromhex(name.removeprefix("cmpl-"))) == 12 for name in names)


def test_chunks_have_usage_only_where_it_was_asked_for() -> None:
    """Without the wish there is no such key; with it, null and a last chunk without choices."""
    plain, asked = reply(), reply(usage=True)
    assert "usage" not in written(plain.frame())
    assert plain.last(ENDED) is None
    assert written(asked.frame())["usage"] is None
    last = written(asked.last(ENDED))
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 12
    assert last["id"] == written(asked.frame())["id"]


def test_logprobs_are_parallel_lists_with_offsets_in_characters() -> None:
    """Offsets count code points from the start of the text returned, across chunks."""
    form = reply(logprobs=True)
    first = Delta(
        id=1, index=0, text="é😀", tokens=2, judged=judged(["é", "😀"], [None, -0.5], [None, []])
    )
    second = Delta(id=1, index=0, text="xy", tokens=1, judged=judged(["xy"], [-1.0]))
    other = Delta(id=1, index=1, text="z", tokens=1, judged=judged(["z"], [-2.0]))
    assert written(form.choice(first))["logprobs"] == {
        "tokens": ["é", "😀"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"😀": -0.5}],
        "text_offset": [0, 1],
    }
    assert written(form.choice(other))["logprobs"]["text_offset"] == [0]
    assert written(form.choice(second))["logprobs"]["text_offset"] == [2]


def test_logprobs_are_objects_wherever_they_were_asked_for() -> None:
    """Where no token was judged the lists are empty; where nothing was asked there are none."""
    delta = Delta(id=1, index=0, text="", tokens=0)
    assert written(reply(logprobs=True).choice(delta))["logprobs"] == {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    assert written(reply().choice(delta))["logprobs"] is None


@pytest.mark.parametrize(
    ("logprob", "row", "found"),
    [
        (-0.5, [("a", -0.5), ("b", -1.0)], {"a": -0.5, "b": -1.0}),
        (-3.0, [("b", -0.5), ("c", -1.0)], {"b": -0.5, "c": -1.0, "a": -3.0}),
        (-0.5, [], {"a": -0.5}),
        (-0.5, None, {"a": -0.5}),
        (None, None, None),
        (None, [], None),
        (None, [("b", -0.5)], {"b": -0.5}),
        (-3.0, [("x", -0.5), ("x", -0.7)], {"x": -0.5, "a": -3.0}),
        (-3.0, [("a", -0.5), ("b", -0.7)], {"a": -3.0, "b": -0.7}),
    ],
)
def test_alternatives_hold_the_token_itself_with_its_own_number(
    logprob: float | None, row: list[tuple[str, float]] | None, found: object
) -> None:
    """Of tokens that read alike the likeliest is told, but the text's own goes before all."""
    delta = Delta(id=1, index=0, text="a", tokens=1, judged=judged(["a"], [logprob], [row]))
    assert written(reply(logprobs=True).choice(delta))["logprobs"]["top_logprobs"] == [found]


@given(
    st.lists(st.floats(max_value=0, allow_infinity=False), min_size=1, max_size=5),
    st.integers(0, 4),
)
def test_a_greedy_token_equals_its_alternative_exactly(numbers: list[float], place: int) -> None:
    """As evaluation harnesses compare them: the very same number in both lists."""
    row = [(str(k), number) for k, number in enumerate(sorted(numbers, reverse=True))]
    token, logprob = row[min(place, len(row) - 1)]
    delta = Delta(id=1, index=0, text=token, tokens=1, judged=judged([token], [logprob], [row]))
    found = written(reply(logprobs=True).choice(delta))["logprobs"]
    assert found["token_logprobs"][0] == logprob
    assert found["top_logprobs"][0][token] == logprob
    is_greedy = found["token_logprobs"][0] == max(found["top_logprobs"][0].values())
    assert is_greedy == (logprob == max(numbers))


def test_an_answer_is_what_the_document_says() -> None:
    """The body of an answer passes its own model, which the document shows."""
    delta = Delta(
        id=1, index=0, text="a", tokens=1, judged=judged(["a"], [-0.5], [[("b", -0.1)]]),
        finish="length", stop_reason="deadline",
    )  # fmt: skip
    Completion.model_validate_json(dump(reply(logprobs=True).whole([delta], ENDED)))
