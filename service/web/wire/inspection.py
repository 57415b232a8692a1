"""The bodies of the routes that list models and read texts: OpenAI's shapes where it has one.

Names beyond OpenAI's are its own terms or those of other open servers. In a request, null means
that a field is not given; an unknown field is refused.
"""

import base64
import struct
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from charloom.params import Precision, UnknownPolicy
from service.messages import Embeddings, ModelCard, ScoreCard, Scores
from service.web.wire import MODEL_LIMIT, Answer, Request, example, fingerprint_of
from service.web.wire.inputs import Inputs, Texts

Name = Annotated[str, Field(max_length=MODEL_LIMIT, description="Name of the model.")]


class Usage(Answer):
    """What a request cost; nothing is written by these routes."""

    prompt_tokens: int = Field(description="Tokens that were read.")
    total_tokens: int = Field(description="The same.")

    @classmethod
    def of(cls, tokens: int) -> Self:
        """So many tokens were read."""
        return cls(prompt_tokens=tokens, total_tokens=tokens)


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

    @classmethod
    def of(cls, card: ModelCard) -> Self:
        """What is known of a model."""
        return cls(
            id=card.name,
            created=card.created,
            parameters=card.parameters,
            vocabulary=card.vocabulary,
            bits_per_character=card.bits_per_character,
            fingerprint=card.fingerprint,
            architecture=card.architecture,
            tokenizer=card.tokenizer,
            documents=card.documents,
            is_loaded=card.is_loaded,
        )


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

    @classmethod
    def of(cls, index: int, card: ScoreCard, top: int) -> Self:
        """The score of a text, and `top` alternatives at each place."""
        judged = card.judged
        return cls(
            index=index,
            tokens=judged.tokens,
            token_ids=judged.ids,
            logprobs=judged.logprobs,
            ranks=card.ranks,
            entropies=card.entropies,
            top_logprobs=None
            if top == 0
            else [
                None
                if row is None
                else [Alternative(token=token, logprob=logprob) for token, logprob in row]
                for row in judged.top
            ],
            bits_per_character=card.bits_per_character,
            bits_per_byte=card.bits_per_byte,
            characters=card.characters,
            unknown=card.unknown,
        )


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

    @classmethod
    def of(cls, scores: Scores, top: int) -> Self:
        """What the engine has found."""
        return cls(
            model=scores.model,
            system_fingerprint=fingerprint_of(scores.fingerprint, scores.precision),
            data=[ScoreObject.of(index, card, top) for index, card in enumerate(scores.cards)],
            usage=Usage.of(sum(len(card.judged.ids) for card in scores.cards)),
        )


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

    @classmethod
    def of(cls, index: int, vector: bytes, *, is_packed: bool) -> Self:
        """A vector of float32, little-endian: its bytes in base64 where it is to be packed."""
        if is_packed:
            return cls(index=index, embedding=base64.b64encode(vector).decode("ascii"))
        return cls(index=index, embedding=list(struct.unpack(f"<{len(vector) // 4}f", vector)))


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

    @classmethod
    def of(cls, embeddings: Embeddings, *, is_packed: bool) -> Self:
        """What the engine has found."""
        return cls(
            model=embeddings.model,
            system_fingerprint=fingerprint_of(embeddings.fingerprint, embeddings.precision),
            data=[
                EmbeddingObject.of(index, vector, is_packed=is_packed)
                for index, vector in enumerate(embeddings.vectors)
            ],
            usage=Usage.of(embeddings.tokens),
        )
