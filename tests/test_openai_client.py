"""The client that users have, against the service as they start it."""

import base64
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI

import charloom
from charloom.model import Model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[OpenAI]:
    """OpenAI's client, told of our address; it does not ask twice."""
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(service: Any) -> Model:
    """The model that is served, in this process."""
    return charloom.load(service.models / "tiny")


def test_a_completion_is_what_python_writes(client: OpenAI, model: Model) -> None:
    """Text, finish reason, seed and usage equal those of `Model.generate`."""
    answer = client.completions.create(model="tiny", prompt="the ", max_tokens=40, seed=7)
    here = model.generate("the ", max_tokens=40, seed=7)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert answer.model_extra is not None
    assert answer.model_extra["seed"] == 7
    assert [choice.text for choice in answer.choices] == [here.text]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 40)
    assert answer.usage.total_tokens == 44
    assert answer.system_fingerprint is not None
    assert model.fingerprint[:16] in answer.system_fingerprint


def test_a_seed_is_drawn_and_told(client: OpenAI) -> None:
    """Without a seed the answer names one that writes the same text again."""
    first = client.completions.create(model="tiny", prompt="a", max_tokens=30)
    assert first.model_extra is not None
    seed = first.model_extra["seed"]
    again = client.completions.create(model="tiny", prompt="a", max_tokens=30, seed=seed)
    assert first.choices[0].text == again.choices[0].text


def test_lists_of_prompts_and_choices_keep_their_order(client: OpenAI, model: Model) -> None:
    """Choice k of prompt p stands at p x n + k and is what it is when sent alone."""
    answer = client.completions.create(
        model="tiny", prompt=["ab", "cd"], n=3, max_tokens=20, seed=1
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = [
        model.generate(prompt, max_tokens=20, seed=1, choice=choice).text
        for prompt in ("ab", "cd")
        for choice in range(3)
    ]
    assert [choice.text for choice in answer.choices] == expected


def test_token_prompts_are_texts(client: OpenAI, model: Model) -> None:
    """A list of token numbers, or several, stands for the text of these tokens."""
    tokens = model.tokenizer.encode("the ").tolist()
    as_text = client.completions.create(model="tiny", prompt="the ", max_tokens=9, seed=3)
    as_tokens = client.completions.create(model="tiny", prompt=tokens, max_tokens=9, seed=3)
    as_lists = client.completions.create(
        model="tiny", prompt=[tokens, tokens], max_tokens=9, seed=3
    )
    texts = {choice.text for choice in (*as_tokens.choices, *as_lists.choices)}
    assert texts == {as_text.choices[0].text}


def test_a_stream_is_the_same_text(client: OpenAI) -> None:
    """The deltas of each choice make the text that comes in one piece otherwise, and usage last."""
    fields: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 60, "n": 2, "seed": 5}
    whole = client.completions.create(**fields)
    texts, reasons, usages = ["", ""], [[], []], []
    for chunk in client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index].append(choice.finish_reason)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [["length"], ["length"]]
    assert usages[-1] == whole.usage
    assert set(usages[:-1]) == {None}


def test_echo_with_logprobs_scores_the_prompt(client: OpenAI, model: Model) -> None:
    """Echo and no new tokens give the log-probabilities that `Model.score` gives."""
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == "the cat"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("the cat")
    assert choice.logprobs.text_offset == list(range(7))
    score = model.score("the cat")
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == score.logprobs_N[1:].tolist()
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    for token, logprob, top in zip(
        choice.logprobs.tokens[1:],
        choice.logprobs.token_logprobs[1:],
        choice.logprobs.top_logprobs[1:],
        strict=True,
    ):
        assert top[token] == logprob


def test_extras_travel_at_the_top_level(client: OpenAI) -> None:
    """What other open servers call `top_k` does what it says: the likeliest token alone."""
    sure = client.completions.create(
        model="tiny", prompt="a", max_tokens=20, extra_body={"top_k": 1, "min_p": 0.0}
    )
    cold = client.completions.create(model="tiny", prompt="a", max_tokens=20, temperature=0)
    assert sure.choices[0].text == cold.choices[0].text


def test_best_of_gives_the_likeliest(client: OpenAI) -> None:
    """Of `best_of` choices those of the highest mean log-probability come back, best first."""
    fields: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 15, "seed": 2}
    all_of_them = client.completions.create(**fields, n=4, logprobs=0)
    best = client.completions.create(**fields, n=2, best_of=4)

    def likelihood(choice: Any) -> float:
        return math.fsum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(all_of_them.choices, key=likelihood, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]


def test_stop_strings_end_the_text(client: OpenAI) -> None:
    """The text ends before the stop string and says so."""
    fields: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 200, "seed": 2}
    whole = client.completions.create(**fields).choices[0].text
    stop = whole[20:22]
    answer = client.completions.create(**fields, stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "tempratur"),
        ({"prompt": "日"}, openai.BadRequestError, "prompt"),
        ({"max_tokens": 10_000_000}, openai.BadRequestError, "max_tokens"),
    ],
)
def test_mistakes_become_the_clients_exceptions(
    client: OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    """Each mistake raises the class that the client has for it and names the field."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 5, **fields}
    with pytest.raises(kind) as caught:
        client.completions.create(**asked)
    assert caught.value.param == param
    assert caught.value.request_id is not None


def test_models_are_listed_and_found(client: OpenAI, model: Model) -> None:
    """The list holds the model, and asked for by name it is the same object."""
    (listed,) = client.models.list()
    assert (listed.id, listed.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == listed
    assert listed.model_extra is not None
    assert listed.model_extra["vocabulary"] == model.tokenizer.vocabulary_size
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such")


def test_embeddings_are_the_hidden_state(client: OpenAI) -> None:
    """Asked for as base64 or as numbers, the vectors are the same, one for each input."""
    packed = client.embeddings.create(model="tiny", input=["the cat", "the dog"])
    plain = client.embeddings.create(
        model="tiny", input=["the cat", "the dog"], encoding_format="float"
    )
    assert len(packed.data) == 2
    for one, other in zip(packed.data, plain.data, strict=True):
        assert np.array_equal(
            np.array(one.embedding, np.float32), np.array(other.embedding, np.float32)
        )
        assert len(one.embedding) == 16
    assert packed.data[0].embedding != packed.data[1].embedding


def test_base64_is_little_endian_float32(client: OpenAI) -> None:
    """What goes over the wire as base64 is float32, little-endian."""
    raw = client.embeddings.with_raw_response.create(
        model="tiny", input="the cat", encoding_format="base64"
    )
    fields = raw.http_response.json()
    vector = np.frombuffer(base64.b64decode(fields["data"][0]["embedding"]), "<f4")
    plain = client.embeddings.create(model="tiny", input="the cat", encoding_format="float")
    assert vector.tolist() == np.array(plain.data[0].embedding, np.float32).tolist()


def test_chat_goes_through_the_same_engine(client: OpenAI, model: Model) -> None:
    """A message becomes a line, and the answer is what the model writes after it."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "the cat"}],
        "max_tokens": 30,
        "seed": 4,
    }
    answer = client.chat.completions.create(**fields)
    expected = model.generate("the cat\n", max_tokens=30, seed=4).text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    streamed = "".join(
        choice.delta.content or ""
        for chunk in client.chat.completions.create(**fields, stream=True)
        for choice in chunk.choices
    )
    assert streamed == expected
