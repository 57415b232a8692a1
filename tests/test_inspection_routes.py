import base64
import runpy
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from service.errors import invalid
from service.messages import (
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    Judged,
    ScoreCard,
    Scores,
    ScoreTexts,
    Tokenise,
)
from service.settings import Settings
from service.web.app import create_app

SCRIPTED = runpy.run_path(str(Path(__file__).parent / "scripted_link.py"))
CARD, FINGERPRINT = SCRIPTED["CARD"], SCRIPTED["FINGERPRINT"]


@pytest.fixture
def link() -> Any:
    """Give an engine that says what it is told to."""
    return SCRIPTED["ScriptedLink"]()


@pytest.fixture
def client(link: Any) -> FlaskClient:
    """Give a client of the service on that engine."""
    return create_app(Settings(timeout=60, logprobs=5, precision="float32"), link).test_client()


def refusal(answer: Any) -> Any:
    """Give the error of an answer with status 400."""
    assert answer.status_code == 400, answer.text
    return answer.get_json()["error"]


# Models

MODEL = {
    "id": "demo",
    "object": "model",
    "created": 1795186800,
    "owned_by": "charloom",
    "parameters": 1234,
    "vocabulary": 65,
    "bits_per_character": 2.5,
    "fingerprint": FINGERPRINT,
    "architecture": {"cell": "lstm", "hidden": 2, "tied": False},
    "tokenizer": "characters",
    "documents": "none",
    "is_loaded": False,
}


def test_models_are_listed_in_openais_form(client: FlaskClient, link: Any) -> None:
    """Each has OpenAI's fields, and beside them what charloom knows of it."""
    link.cards = [CARD, msgspec.structs.replace(CARD, name="verse", bits_per_character=None)]
    answer = client.get("/v1/models")
    assert answer.status_code == 200
    assert answer.content_type == "application/json"
    assert answer.get_json() == {
        "object": "list",
        "data": [MODEL, {**MODEL, "id": "verse", "bits_per_character": None}],
    }


def test_no_model_is_an_empty_list(client: FlaskClient, link: Any) -> None:
    """A service whose folder is empty says so in the same form."""
    link.cards = []
    assert client.get("/v1/models").get_json() == {"object": "list", "data": []}


@pytest.mark.parametrize("path", ["demo", "%64emo"])
def test_a_model_is_described_by_its_name(client: FlaskClient, link: Any, path: str) -> None:
    """One model comes as an object, asked of the engine without loading it."""
    assert client.get(f"/v1/models/{path}").get_json() == MODEL
    assert link.asked == [Describe(model="demo")]


@pytest.mark.parametrize("name", ["other", "org/other", "..", "語", "a b", "demo/"])
def test_an_unknown_model_is_not_found(client: FlaskClient, name: str) -> None:
    """A name that is not served, slashes included, is OpenAI's 404."""
    answer = client.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    error = answer.get_json()["error"]
    assert error["code"] == "model_not_found"
    assert repr(name) in error["message"]


def test_models_cannot_be_deleted(client: FlaskClient) -> None:
    """OpenAI's DELETE is no method of this route, and the answer says which are."""
    answer = client.delete("/v1/models/demo")
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


# Scores


def test_a_score_tells_all_of_each_token(client: FlaskClient, link: Any) -> None:
    """The engine's lists come back by their names, with null where there is no score."""
    answer = client.post("/v1/score", json={"model": "demo", "text": "ab", "top": 2})
    assert answer.status_code == 200
    assert answer.get_json() == {
        "object": "list",
        "model": "demo",
        "system_fingerprint": "fp_0123456789abcdef_int8",
        "data": [
            {
                "object": "score",
                "index": 0,
                "tokens": ["a", "b"],
                "token_ids": [97, 98],
                "logprobs": [None, -0.25],
                "ranks": [None, 1],
                "entropies": [None, 0.75],
                "top_logprobs": [
                    None,
                    [{"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -1.5}],
                ],
                "bits_per_character": 0.36,
                "bits_per_byte": 0.36,
                "characters": 1,
                "unknown": 0,
            }
        ],
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    assert link.asked == [
        ScoreTexts(
            model="demo",
            texts=["ab"],
            unknown="replace",
            precision="float32",
            top=2,
            owner="addr:127.0.0.1",
            timeout=60,
        )
    ]
    assert link.timeouts[0] > 60


def test_texts_are_scored_in_their_order(client: FlaskClient) -> None:
    """A list gives one score for each text, the empty one included, and their tokens' sum."""
    answer = client.post("/v1/score", json={"model": "demo", "text": ["abc", "", "d"]}).get_json()
    assert [part["index"] for part in answer["data"]] == [0, 1, 2]
    assert [part["tokens"] for part in answer["data"]] == [["a", "b", "c"], [], ["d"]]
    assert answer["data"][1]["bits_per_character"] is None
    assert answer["data"][0]["top_logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_options_of_a_score_reach_the_engine(client: FlaskClient, link: Any) -> None:
    """What is given is passed on, and null is not given."""
    client.post(
        "/v1/score",
        json={"model": "demo", "text": "a", "unknown": "skip", "precision": "int8", "top": 5},
    )
    client.post(
        "/v1/score",
        json={"model": "demo", "text": "a", "unknown": None, "precision": None, "top": None},
    )
    given, default = link.asked
    assert (given.unknown, given.precision, given.top) == ("skip", "int8", 5)
    assert (default.unknown, default.precision, default.top) == ("replace", "float32", 0)


def test_a_surrogate_pair_is_one_character(client: FlaskClient, link: Any) -> None:
    """Whole characters beyond the first plane pass in either spelling of JSON."""
    body = b'{"model": "demo", "text": "\\ud83d\\ude00"}'
    client.post("/v1/score", data=body, content_type="application/json")
    assert link.asked[0].texts == ["\U0001f600"]


def test_no_infinite_score_becomes_json(client: FlaskClient, link: Any) -> None:
    """Whatever the engine answers, the body is JSON that any parser takes."""
    judged = Judged(tokens=["a"], ids=[1], logprobs=[float("-inf")], top=[[("a", float("nan"))]])
    card = ScoreCard(
        judged=judged,
        ranks=[None],
        entropies=[float("inf")],
        bits_per_character=float("inf"),
        bits_per_byte=None,
        characters=1,
        unknown=0,
    )
    link.answers[ScoreTexts] = lambda ask: Scores(
        model=ask.model, fingerprint=FINGERPRINT, precision="int8", cards=[card]
    )
    answer = client.post("/v1/score", json={"model": "demo", "text": "a", "top": 1})
    (part,) = msgspec.json.decode(answer.data)["data"]
    assert part["logprobs"] == [None]
    assert part["entropies"] == [None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"model": "m" * 256}, "model"),
        ({"text": None}, "text"),
        ({"text": 5}, "text"),
        ({"text": []}, "text"),
        ({"text": ["a", 5]}, "text.1"),
        ({"text": ["a"] * 2049}, "text"),
        ({"top": -1}, "top"),
        ({"top": 6}, "top"),
        ({"top": 2**80}, "top"),
        ({"top": 1.5}, "top"),
        ({"top": True}, "top"),
        ({"top": "1"}, "top"),
        ({"unknown": "guess"}, "unknown"),
        ({"precision": "int4"}, "precision"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_a_score_that_cannot_be_is_refused_by_name(
    client: FlaskClient, link: Any, change: dict[str, Any], param: str
) -> None:
    """Wrong types, ranges and unknown fields are 400, name the field, and ask the engine
    nothing.
    """
    error = refusal(client.post("/v1/score", json={"model": "demo", "text": "a", **change}))
    assert error["param"] == param
    assert param.partition(".")[0] in error["message"]
    assert link.asked == []


# Embeddings


def test_an_embedding_is_the_hidden_state(client: FlaskClient, link: Any) -> None:
    """The engine's float32 come back as numbers, with the tokens that were read."""
    answer = client.post("/v1/embeddings", json={"model": "demo", "input": "abc"})
    assert answer.get_json() == {
        "object": "list",
        "model": "demo",
        "system_fingerprint": "fp_0123456789abcdef_float32",
        "data": [{"object": "embedding", "index": 0, "embedding": [3.0, -0.5]}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    assert link.asked == [
        Embed(
            model="demo",
            inputs=["abc"],
            unknown="error",
            precision="float32",
            owner="addr:127.0.0.1",
            timeout=60,
        )
    ]


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ["a"]),
        (["a", "bc"], ["a", "bc"]),
        ([7], [[7]]),
        ([7, 0, 8], [[7, 0, 8]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
        (["a"] * 2048, ["a"] * 2048),
    ],
)
def test_inputs_are_texts_or_tokens(
    client: FlaskClient, link: Any, given: Any, inputs: Any
) -> None:
    """All four of OpenAI's forms are taken; a flat list of numbers is one input."""
    answer = client.post("/v1/embeddings", json={"model": "demo", "input": given}).get_json()
    assert link.asked[0].inputs == inputs
    assert [part["index"] for part in answer["data"]] == list(range(len(inputs)))


def test_base64_is_float32_in_little_endian(client: FlaskClient, link: Any) -> None:
    """What OpenAI's Python client asks for by itself comes bit for bit as the engine gave it."""
    vector = struct.pack("<2f", 0.1, -1e-30)
    link.answers[Embed] = lambda ask: Embeddings(
        model=ask.model, fingerprint=FINGERPRINT, precision="int8", vectors=[vector], tokens=1
    )
    request = {"model": "demo", "input": "a"}
    packed = client.post("/v1/embeddings", json={**request, "encoding_format": "base64"})
    assert base64.b64decode(packed.get_json()["data"][0]["embedding"]) == vector
    plain = client.post("/v1/embeddings", json={**request, "encoding_format": "float"})
    assert struct.pack("<2f", *plain.get_json()["data"][0]["embedding"]) == vector


def test_dimensions_may_be_what_the_model_has(client: FlaskClient, link: Any) -> None:
    """The size of the hidden state is taken; any other is refused before any work."""
    request = {"model": "demo", "input": "a"}
    assert client.post("/v1/embeddings", json={**request, "dimensions": 2}).status_code == 200
    link.asked.clear()
    error = refusal(client.post("/v1/embeddings", json={**request, "dimensions": 3}))
    assert error["param"] == "dimensions"
    assert "has 2" in error["message"]
    assert link.asked == [Describe(model="demo")]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[]]}, "input.0"),
        ({"input": [[1], []]}, "input.1"),
        ({"input": [1, -1]}, "input.1"),
        ({"input": [1, 2**31]}, "input.1"),
        ({"input": [1, 1.5]}, "input.1"),
        ({"input": [1, True]}, "input.1"),
        ({"input": [1, "a"]}, "input.1"),
        ({"input": ["a", 1]}, "input.1"),
        ({"input": [{}]}, "input.0"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1]] * 2049}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"user": 5}, "user"),
        ({"normalise": True}, "normalise"),
    ],
)
def test_an_embedding_that_cannot_be_is_refused_by_name(
    client: FlaskClient, link: Any, change: dict[str, Any], param: str
) -> None:
    """Empty inputs, wrong types, ranges and unknown fields are 400 and name the field."""
    error = refusal(client.post("/v1/embeddings", json={"model": "demo", "input": "a", **change}))
    assert error["param"] == param
    assert param.partition(".")[0] in error["message"]
    assert link.asked == []


# Tokens


@pytest.mark.parametrize("field", ["prompt", "text"])
def test_a_text_becomes_tokens(client: FlaskClient, link: Any, field: str) -> None:
    """Tokens, how many there are, and what each adds to the text."""
    answer = client.post("/tokenize", json={"model": "demo", field: "ab"})
    assert answer.get_json() == {"tokens": [97, 98], "count": 2, "pieces": ["a", "b"]}
    assert link.asked == [
        Tokenise(model="demo", texts=["ab"], unknown="error", owner="addr:127.0.0.1")
    ]


@pytest.mark.parametrize("field", ["prompt", "text"])
def test_a_text_without_tokens_is_refused_by_the_name_it_was_sent_by(
    client: FlaskClient, link: Any, field: str
) -> None:
    """The text has two names, and the refusal uses the client's."""

    def refuse(_: Tokenise) -> Any:
        raise invalid("The character 'X' is not in the vocabulary.", "prompt")

    link.answers[Tokenise] = refuse
    error = refusal(client.post("/tokenize", json={"model": "demo", field: "X"}))
    assert error["param"] == field


def test_an_empty_text_has_no_tokens(client: FlaskClient) -> None:
    """Nothing is added to a text, so that nothing stays nothing."""
    answer = client.post("/tokenize", json={"prompt": ""})
    assert answer.get_json() == {"tokens": [], "count": 0, "pieces": []}


def test_tokens_become_a_text(client: FlaskClient, link: Any) -> None:
    """What tokenize has taken apart comes back."""
    answer = client.post("/detokenize", json={"model": "demo", "tokens": [97, 98]})
    assert answer.get_json() == {"prompt": "ab"}
    assert link.asked == [Detokenise(model="demo", tokens=[97, 98], owner="addr:127.0.0.1")]
    assert client.post("/detokenize", json={"tokens": []}).get_json() == {"prompt": ""}


@pytest.mark.parametrize("value", [False, None])
def test_no_special_tokens_are_asked_for(client: FlaskClient, value: bool | None) -> None:
    """Evaluation harnesses say so, and there are none."""
    answer = client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": value})
    assert answer.get_json()["tokens"] == [97, 98]


def test_a_tokenizer_tells_what_a_harness_needs(client: FlaskClient) -> None:
    """Tokens that stand for no text are null, and their names are there."""
    assert client.get("/tokenizer_info").get_json() == {
        "tokenizer_class": "characters",
        "vocabulary_size": 65,
        "eos_token": None,
        "bos_token": None,
        "pad_token": None,
        "chat_template": None,
    }


def test_a_chat_template_is_the_services_or_the_models(link: Any) -> None:
    """The setting goes before what the model brings."""
    link.cards = [msgspec.structs.replace(CARD, chat_template="{content}!")]
    own = create_app(Settings(), link).test_client()
    assert own.get("/tokenizer_info").get_json()["chat_template"] == "{content}!"
    set_here = create_app(Settings(chat_template="{content}?"), link).test_client()
    assert set_here.get("/tokenizer_info").get_json()["chat_template"] == "{content}?"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/tokenize", {"prompt": "a"}),
        ("POST", "/detokenize", {"tokens": [97]}),
        ("GET", "/tokenizer_info", None),
    ],
)
def test_one_model_need_not_be_named(
    client: FlaskClient, link: Any, method: str, path: str, body: Any
) -> None:
    """Harnesses name none: the only model is meant, and with several the field is asked for."""
    assert client.open(path, method=method, json=body).status_code == 200
    link.cards = [CARD, msgspec.structs.replace(CARD, name="verse")]
    error = refusal(client.open(path, method=method, json=body))
    assert error["param"] == "model"
    assert "2 models" in error["message"]
    link.cards = []
    assert refusal(client.open(path, method=method, json=body))["param"] == "model"


def test_a_tokenizer_is_named_in_the_query(client: FlaskClient, link: Any) -> None:
    """Where several models are served, the query says which."""
    link.cards = [CARD, msgspec.structs.replace(CARD, name="verse", vocabulary=3)]
    answer = client.get("/tokenizer_info?model=verse")
    assert answer.get_json()["vocabulary_size"] == 3
    assert client.get("/tokenizer_info?model=none").status_code == 404
    for name, value in (("model", "m" * 256), ("modal", "verse"), ("", "0")):
        assert refusal(client.get("/tokenizer_info", query_string={name: value}))["param"] == name


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": "a", "text": "a"}, "text"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 0}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "unknown": "guess"}, "unknown"),
        ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": None}, "tokens"),
        ("/detokenize", {"tokens": "97"}, "tokens"),
        ("/detokenize", {"tokens": [97, -1]}, "tokens.1"),
        ("/detokenize", {"tokens": [97, 2**31]}, "tokens.1"),
        ("/detokenize", {"tokens": [True]}, "tokens.0"),
        ("/detokenize", {"tokens": [97], "skip_special_tokens": True}, "skip_special_tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused_by_name(
    client: FlaskClient, link: Any, path: str, body: Any, param: str
) -> None:
    """What is missing, wrong, doubled or unsupported is 400 and names the field."""
    error = refusal(client.post(path, json=body))
    assert error["param"] == param
    assert param.partition(".")[0] in error["message"]
    assert link.asked == []


def test_what_the_engine_refuses_is_told(client: FlaskClient, link: Any) -> None:
    """A text that the model cannot encode comes back as the engine's sentence."""
    sentence = "The text has 'q' at position 1, which the model has no token for."

    def refuse(_: Any) -> Any:
        raise invalid(sentence, "prompt", "unknown_character")

    link.answers[Tokenise] = refuse
    error = refusal(client.post("/tokenize", json={"prompt": "aq"}))
    assert error == {
        "message": sentence,
        "type": "invalid_request_error",
        "param": "prompt",
        "code": "unknown_character",
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", {"text": "To be"}),
        ("/v1/embeddings", {"input": "To be"}),
        ("/tokenize", {"prompt": "To be"}),
        ("/detokenize", {"tokens": [84]}),
    ],
)
def test_nobody_is_answered_who_has_left(client: FlaskClient, path: str, body: Any) -> None:
    """A wait for the engine ends with its client."""
    near, far = socket.socketpair()
    near.close()
    with far:
        ask = {"model": "demo", **body}
        answer = client.post(path, json=ask, environ_base={"gunicorn.socket": far})
        assert answer.status_code == 499
