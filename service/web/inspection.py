"""Routes that look at models and texts, and write none.

    GET  /v1/models, /v1/models/<name>      what is served
    POST /v1/score                          how likely a text is, token by token
    POST /v1/embeddings                     the hidden state after a text
    POST /tokenize, /detokenize             text to tokens and back
    GET  /tokenizer_info

The last three stand at the root, where evaluation harnesses look for them. Each route turns its
request into a question to the engine process, and what comes back into its answer.
"""

from flask import Response
from flask_openapi import APIBlueprint
from pydantic import BaseModel

from service.errors import RequestError, invalid, renamed, unknown_model
from service.messages import (
    Describe,
    Detokenise,
    Embed,
    ModelCard,
    ScoreTexts,
    Tokenise,
)
from service.web.access import owner
from service.web.body import dump, with_body
from service.web.context import current
from service.web.exchange import exchange
from service.web.waiting import MARGIN, Watch
from service.web.wire.inputs import listed
from service.web.wire.inspection import (
    EmbeddingList,
    EmbeddingsRequest,
    ModelList,
    ModelObject,
    ModelPath,
    ModelQuery,
    ScoreList,
    ScoreRequest,
)
from service.web.wire.tokens import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)

blueprint = APIBlueprint(
    "inspection",
    __name__,
    abp_tags=[{"name": "Inspection", "description": "What models are, and how they see texts."}],
)


@blueprint.get("/v1/models", summary="List the models", responses={200: ModelList})
def list_models() -> Response:
    """All models that can be asked for, by name; whether loaded or not."""
    return _answer(ModelList(data=[ModelObject.of(card) for card in _cards()]))


@blueprint.get("/v1/models/<path:model>", summary="Describe a model", responses={200: ModelObject})
def retrieve_model(path: ModelPath) -> Response:
    """One model, without loading it."""
    return _answer(ModelObject.of(_card(path.model)))


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
    exchange().ask(body.model, texts[0])
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
        look=Watch.current(),
    )
    return _answer_read(ScoreList.of(scores, top))


@blueprint.post("/v1/embeddings", summary="Embed inputs", responses={200: EmbeddingList})
@with_body
def embed(body: EmbeddingsRequest) -> Response:
    """The hidden state of the last layer after each input, as a vector of float32."""
    settings = current().settings
    inputs = listed(body.input)
    exchange().ask(body.model, inputs[0])
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
        look=Watch.current(),
    )
    is_packed = body.encoding_format == "base64"
    return _answer_read(EmbeddingList.of(embeddings, is_packed=is_packed))


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
    exchange().ask(model, text)
    ask = Tokenise(
        model=model,
        texts=[text],
        unknown="error" if body.unknown is None else body.unknown,
        owner=owner(),
    )
    try:
        tokens = current().link.ask(ask, look=Watch.current())
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
    exchange().ask(model, body.tokens)
    ask = Detokenise(model=model, tokens=body.tokens, owner=owner())
    text = current().link.ask(ask, look=Watch.current())
    return _answer(DetokenizeAnswer(prompt=text.text))


@blueprint.get("/tokenizer_info", summary="Describe a tokenizer", responses={200: TokenizerInfo})
def tokenizer_info(query: ModelQuery) -> Response:
    """What a client has to know that works with tokens itself."""
    card = _card(query.model)
    template = current().settings.chat_template
    return _answer(TokenizerInfo.of(card, template))


# Questions


def _cards(model: str | None = None) -> list[ModelCard]:
    """What is known of one model, or of all that are served."""
    return current().link.ask(Describe(model=model), look=Watch.current()).cards


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


# Answers


def _answer(value: BaseModel) -> Response:
    return Response(dump(value), content_type="application/json")


def _answer_read(value: ScoreList | EmbeddingList) -> Response:
    """The same, with what it cost in the journal."""
    exchange().prompt_tokens = value.usage.prompt_tokens
    return _answer(value)
