"""Routes that look at models and texts, and write none.

    GET  /v1/models, /v1/models/<name>      what is served
    POST /v1/score                          how likely a text is, token by token
    POST /v1/embeddings                     the hidden state after a text
    POST /tokenize, /detokenize             text to tokens and back
    GET  /tokenizer_info

The last three stand at the root, where evaluation harnesses look for them. Each route turns its
request into a question to the engine process, and what comes back into its answer.
"""

import base64
import struct

from flask import Response
from flask_openapi import APIBlueprint
from pydantic import BaseModel

from service.errors import RequestError, invalid, renamed, unknown_model
from service.messages import (
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    ModelCard,
    ScoreCard,
    Scores,
    ScoreTexts,
    Tokenise,
)
from service.messages import Prompt as Input
from service.web.access import owner
from service.web.body import dump, with_body
from service.web.context import current, exchange
from service.web.wire.inputs import listed
from service.web.wire.inspection import (
    Alternative,
    DetokenizeAnswer,
    DetokenizeRequest,
    EmbeddingList,
    EmbeddingObject,
    EmbeddingsRequest,
    ModelList,
    ModelObject,
    ModelPath,
    ModelQuery,
    ScoreList,
    ScoreObject,
    ScoreRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
    Usage,
)

MARGIN = 5.0
"""Seconds beyond a request's deadline in which the engine tells that it has passed."""

blueprint = APIBlueprint(
    "inspection",
    __name__,
    abp_tags=[{"name": "Inspection", "description": "What models are, and how they see texts."}],
)


@blueprint.get("/v1/models", summary="List the models", responses={200: ModelList})
def list_models() -> Response:
    """All models that can be asked for, by name; whether loaded or not."""
    return _answer(ModelList(data=[_model(card) for card in _cards()]))


@blueprint.get("/v1/models/<path:model>", summary="Describe a model", responses={200: ModelObject})
def retrieve_model(path: ModelPath) -> Response:
    """One model, without loading it."""
    return _answer(_model(_card(path.model)))


@blueprint.post("/v1/score", summary="Score texts", responses={200: ScoreList})
@with_body
def score(body: ScoreRequest) -> Response:
    """How likely the model finds each text, token by token, read from its start."""
    settings = current().settings
    top = 0 if body.top is None else body.top
    if top > settings.logprobs:
        raise invalid(
            f"top is {top}, and this service gives at most {settings.logprobs} alternatives; "
            "give less.",
            "top",
        )
    texts = [body.text] if isinstance(body.text, str) else body.text
    _note(body.model, texts[0])
    scores = current().link.ask(
        ScoreTexts(
            model=body.model,
            texts=texts,
            unknown="replace" if body.unknown is None else body.unknown,
            precision=settings.precision if body.precision is None else body.precision,
            top=top,
            owner=owner(),
            timeout=settings.timeout,
        ),
        timeout=settings.timeout + MARGIN,
    )
    return _answer(
        ScoreList(
            model=scores.model,
            system_fingerprint=_fingerprint(scores),
            data=[_score(index, card, top) for index, card in enumerate(scores.cards)],
            usage=_usage(sum(len(card.judged.ids) for card in scores.cards)),
        )
    )


@blueprint.post("/v1/embeddings", summary="Embed inputs", responses={200: EmbeddingList})
@with_body
def embed(body: EmbeddingsRequest) -> Response:
    """The hidden state of the last layer after each input, as a vector of float32."""
    settings = current().settings
    inputs = listed(body.input)
    _note(body.model, inputs[0])
    if body.dimensions is not None:
        _check_dimensions(body.dimensions, _card(body.model))
    embeddings = current().link.ask(
        Embed(
            model=body.model,
            inputs=inputs,
            unknown="error" if body.unknown is None else body.unknown,
            precision=settings.precision if body.precision is None else body.precision,
            owner=owner(),
            timeout=settings.timeout,
        ),
        timeout=settings.timeout + MARGIN,
    )
    write = _base64 if body.encoding_format == "base64" else _floats
    return _answer(
        EmbeddingList(
            model=embeddings.model,
            system_fingerprint=_fingerprint(embeddings),
            data=[
                EmbeddingObject(index=index, embedding=write(vector))
                for index, vector in enumerate(embeddings.vectors)
            ],
            usage=_usage(embeddings.tokens),
        )
    )


@blueprint.post("/tokenize", summary="Text to tokens", responses={200: TokenizeAnswer})
@with_body
def tokenize(body: TokenizeRequest) -> Response:
    """The tokens of a text, and what each of them adds to it."""
    text = body.prompt if body.text is None else body.text
    if text is None:
        raise invalid("prompt is missing; give the text whose tokens you want.", "prompt")
    if body.prompt is not None and body.text is not None:
        raise invalid("prompt and text are both given; they mean the same, so give one.", "text")
    model = _card(body.model).name if body.model is None else body.model
    _note(model, text)
    ask = Tokenise(
        model=model,
        texts=[text],
        unknown="error" if body.unknown is None else body.unknown,
    )
    try:
        tokens = current().link.ask(ask)
    except RequestError as error:
        names = {} if body.text is None else {"prompt": "text"}
        raise RequestError(renamed(error.problem, names)) from error
    (ids,), (pieces,) = tokens.tokens, tokens.pieces
    return _answer(TokenizeAnswer(tokens=ids, count=len(ids), pieces=pieces))


@blueprint.post("/detokenize", summary="Tokens to text", responses={200: DetokenizeAnswer})
@with_body
def detokenize(body: DetokenizeRequest) -> Response:
    """The text that tokens stand for."""
    model = _card(body.model).name if body.model is None else body.model
    _note(model, body.tokens)
    text = current().link.ask(Detokenise(model=model, tokens=body.tokens))
    return _answer(DetokenizeAnswer(prompt=text.text))


@blueprint.get("/tokenizer_info", summary="Describe a tokenizer", responses={200: TokenizerInfo})
def tokenizer_info(query: ModelQuery) -> Response:
    """What a client has to know that works with tokens itself."""
    card = _card(query.model)
    template = current().settings.chat_template
    return _answer(
        TokenizerInfo(
            tokenizer_class=card.tokenizer,
            vocabulary_size=card.vocabulary,
            eos_token=None,
            bos_token=None,
            pad_token=None,
            chat_template=card.chat_template if template is None else template,
        )
    )


# Questions


def _cards(model: str | None = None) -> list[ModelCard]:
    """What is known of one model, or of all that are served."""
    return current().link.ask(Describe(model=model)).cards


def _card(model: str | None) -> ModelCard:
    """One model; without a name the only one. Raises `RequestError` where there is none."""
    cards = _cards(model)
    if model is not None:
        exchange().model = model
        if not cards:
            raise unknown_model(model)
    elif len(cards) != 1:
        raise invalid(
            f"model is not given, and {len(cards)} models are served; name one of those that GET "
            "/v1/models lists.",
            "model",
        )
    return cards[0]


def _check_dimensions(dimensions: int, card: ModelCard) -> None:
    """Refuse to cut or fill up a hidden state."""
    hidden = card.architecture["hidden"]
    if dimensions != hidden:
        raise invalid(
            f"dimensions is {dimensions}, and the hidden state of {card.name!r} has {hidden}; give "
            "that, or leave it out.",
            "dimensions",
        )


def _note(model: str, prompt: Input) -> None:
    """Tell the journal what is asked."""
    this = exchange()
    this.model = model
    this.prompt = prompt if isinstance(prompt, str) else str(prompt[:100])


# Answers


def _answer(value: BaseModel) -> Response:
    return Response(dump(value), content_type="application/json")


def _model(card: ModelCard) -> ModelObject:
    return ModelObject(
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


def _score(index: int, card: ScoreCard, top: int) -> ScoreObject:
    judged = card.judged
    return ScoreObject(
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


def _usage(tokens: int) -> Usage:
    exchange().prompt_tokens = tokens
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def _fingerprint(answer: Scores | Embeddings) -> str:
    return f"fp_{answer.fingerprint[:16]}_{answer.precision}"


def _floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")
