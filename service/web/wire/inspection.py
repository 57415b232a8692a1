"""The bodies of the routes that look at models and texts: OpenAI's shapes where it has one.

Names beyond OpenAI's are its own terms or those of other open servers. In a request, null means
that a field is not given; an unknown field is refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from charloom.params import Precision, UnknownPolicy
from service.web.wire import MODEL_LIMIT, Answer, Off, Request, example
from service.web.wire.inputs import Inputs, Texts, Token

Name = Annotated[str, Field(max_length=MODEL_LIMIT, description="Name of the model.")]


class Usage(Answer):
    """What a request cost; nothing is written by these routes."""

    prompt_tokens: int = Field(description="Tokens that were read.")
    total_tokens: int = Field(description="The same.")


# Models

_MODEL = {
    "id": "demo",
    "object": "model",
    "created": 1795186800,
    "owned_by": "charloom",
    "parameters": 3459137,
    "vocabulary": 65,
    "bits_per_character": 2.0556,
    "fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "architecture": {
        "cell": "lstm",
        "vocabulary": 65,
        "embedding": 512,
        "hidden": 512,
        "layers": 2,
        "residual": False,
        "tied": False,
    },
    "tokenizer": "characters",
    "documents": "none",
    "is_loaded": True,
}


class ModelPath(BaseModel):
    """The part of a path that names a model."""

    model: Name


class ModelQuery(BaseModel):
    """The query that names a model, where several are served."""

    model_config = ConfigDict(extra="forbid")

    model: Name | None = Field(None, description="May be left out where one model is served.")


class ModelObject(Answer):
    """A model that is served."""

    model_config = example(_MODEL)

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970.")
    owned_by: Literal["charloom"] = "charloom"
    parameters: int = Field(description="How many numbers it has learned.")
    vocabulary: int = Field(description="How many tokens it knows.")
    bits_per_character: float | None = Field(description="On its own held-out text.")
    fingerprint: str = Field(description="Identifies weights and tokenizer.")
    architecture: dict[str, str | int | bool] = Field(description="The shape of its network.")
    tokenizer: str = Field(description="What its tokens are.")
    documents: str = Field(description="What its training text was divided into.")
    is_loaded: bool = Field(description="Whether it is in memory; others are loaded when asked.")


class ModelList(Answer):
    """All models that are served."""

    model_config = example({"object": "list", "data": [_MODEL]})

    object: Literal["list"] = "list"
    data: list[ModelObject]


# Scores


class ScoreRequest(Request):
    """Texts whose probability is asked for."""

    model_config = example({"model": "demo", "text": "To be, or not", "top": 2})

    model: Name
    text: Texts = Field(description="A text or several; each is scored from its own start.")
    top: int | None = Field(
        None,
        ge=0,
        description="Give this many of the likeliest tokens at each place; 0 by default.",
    )
    unknown: UnknownPolicy | None = Field(
        None,
        description="What to do with characters that the model has no token for; replace by "
        "default, which counts each of them.",
    )
    precision: Precision | None = Field(None, description="Arithmetic of the network's step.")


class Alternative(Answer):
    """A token that could have stood at a place."""

    token: str = Field(description="What it adds to the text.")
    logprob: float = Field(description="Natural logarithm of its probability.")


class ScoreObject(Answer):
    """How likely one text is; the lists have an entry for each token."""

    object: Literal["score"] = "score"
    index: int = Field(description="Which of the texts this is, from 0.")
    tokens: list[str] = Field(description="What each token adds to the text.")
    token_ids: list[int]
    logprobs: list[float | None] = Field(
        description="Natural logarithms of their probabilities; null where there is no score."
    )
    ranks: list[int | None] = Field(description="1 for the likeliest token at its place.")
    entropies: list[float | None] = Field(
        description="How uncertain the model was before each token, in nats."
    )
    top_logprobs: list[list[Alternative] | None] | None = Field(
        description="The likeliest tokens at each place, in order; null unless asked for."
    )
    bits_per_character: float | None = Field(description="The mean over the scored characters.")
    bits_per_byte: float | None = Field(description="The same, by bytes of UTF-8.")
    characters: int = Field(description="How many have a score.")
    unknown: int = Field(description="How many of them the model has no token for.")


class ScoreList(Answer):
    """A score for each text, in their order."""

    model_config = example(
        {
            "object": "list",
            "model": "demo",
            "system_fingerprint": "fp_9f86d081884c7d65_int8",
            "data": [
                {
                    "object": "score",
                    "index": 0,
                    "tokens": ["T", "o"],
                    "token_ids": [32, 53],
                    "logprobs": [None, -0.8414],
                    "ranks": [None, 1],
                    "entropies": [None, 1.2345],
                    "top_logprobs": [
                        None,
                        [{"token": "o", "logprob": -0.8414}, {"token": "h", "logprob": -1.2}],
                    ],
                    "bits_per_character": 1.2139,
                    "bits_per_byte": 1.2139,
                    "characters": 1,
                    "unknown": 0,
                }
            ],
            "usage": {"prompt_tokens": 2, "total_tokens": 2},
        }
    )

    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str = Field(description="Identifies weights, tokenizer and arithmetic.")
    data: list[ScoreObject]
    usage: Usage


# Embeddings


class EmbeddingsRequest(Request):
    """Inputs whose hidden state is asked for."""

    model_config = example({"model": "demo", "input": ["To be", "or not to be"]})

    model: Name
    input: Inputs = Field(description="A text, a list of tokens, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None,
        description="base64 gives the numbers as float32 in little-endian bytes; float by default.",
    )
    dimensions: int | None = Field(
        None, ge=1, description="May be given where it is the size of the model's hidden state."
    )
    user: str | None = Field(None, description="Accepted for OpenAI's clients; plays no part.")
    unknown: UnknownPolicy | None = Field(
        None,
        description="What to do with characters that the model has no token for; error by default.",
    )
    precision: Precision | None = Field(None, description="Arithmetic of the network's step.")


class EmbeddingObject(Answer):
    """The hidden state of the last layer after one input."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Which of the inputs this is, from 0.")
    embedding: list[float] | str


class EmbeddingList(Answer):
    """An embedding for each input, in their order."""

    model_config = example(
        {
            "object": "list",
            "model": "demo",
            "system_fingerprint": "fp_9f86d081884c7d65_int8",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.125, -0.5]}],
            "usage": {"prompt_tokens": 5, "total_tokens": 5},
        }
    )

    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str = Field(description="Identifies weights, tokenizer and arithmetic.")
    data: list[EmbeddingObject]
    usage: Usage


# Tokens


_GIVEN: dict[str, Any] = {"type": "string"}
_NOT_GIVEN: dict[str, Any] = {"type": "null"}


class TokenizeRequest(Request):
    """A text whose tokens are asked for."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "demo", "prompt": "To be"}],
            "oneOf": [
                {"required": [one], "properties": {one: _GIVEN, other: _NOT_GIVEN}}
                for one, other in (("prompt", "text"), ("text", "prompt"))
            ],
        }
    )

    model: Name | None = Field(None, description="May be left out where one model is served.")
    prompt: str | None = Field(None, description="The text.")
    text: str | None = Field(None, description="Another name for it.")
    add_special_tokens: Off | None = Field(
        None, description="Nothing is ever added; clients of other servers may say so."
    )
    unknown: UnknownPolicy | None = Field(
        None,
        description="What to do with characters that the model has no token for; error by default.",
    )


class TokenizeAnswer(Answer):
    """The tokens of a text."""

    model_config = example({"tokens": [32, 53], "count": 2, "pieces": ["T", "o"]})

    tokens: list[int]
    count: int = Field(description="How many there are.")
    pieces: list[str] = Field(description="What each of them adds to the text.")


class DetokenizeRequest(Request):
    """Tokens whose text is asked for."""

    model_config = example({"model": "demo", "tokens": [20, 53, 1, 40, 43]})

    model: Name | None = Field(None, description="May be left out where one model is served.")
    tokens: Annotated[list[Token], Field(fail_fast=True)] = Field(description="The tokens.")


class DetokenizeAnswer(Answer):
    """The text of tokens."""

    model_config = example({"prompt": "To"})

    prompt: str = Field(description="The text.")


class TokenizerInfo(Answer):
    """What a client has to know that encodes texts itself."""

    model_config = example(
        {
            "tokenizer_class": "characters",
            "vocabulary_size": 65,
            "eos_token": None,
            "bos_token": None,
            "pad_token": None,
            "chat_template": None,
        }
    )

    tokenizer_class: str = Field(description="What its tokens are.")
    vocabulary_size: int = Field(description="How many there are.")
    eos_token: str | None = Field(description="Null: the end of a document is no text.")
    bos_token: str | None = Field(description="Null: nothing stands before a text.")
    pad_token: str | None = Field(description="Null: nothing is filled up.")
    chat_template: str | None = Field(
        description="How chat messages become a prompt, in Python's str.format."
    )
