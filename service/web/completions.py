"""Routes that write texts.

    POST /v1/completions         continue prompts
    POST /v1/chat/completions    the same for clients that know only chats

A request is admitted by the engine before the first header goes out, streamed or not, so that a
refusal is a real 429 or 503. After that its texts come in deltas, which are sent on or collected.
"""

from collections.abc import Sequence

from flask import Response
from flask_openapi import APIBlueprint
from pydantic import BaseModel

from service.call import LOOK
from service.errors import RequestError, renamed, unknown_model
from service.messages import Delta, Describe, Ended, Judged, Submit
from service.web import stream
from service.web.access import owner
from service.web.body import dump, with_body
from service.web.context import current
from service.web.exchange import WRITING, exchange
from service.web.waiting import Waiting, Watch
from service.web.wire.chat import ChatCompletion, ChatEvent, ChatReply, ChatRequest
from service.web.wire.completions import (
    Completion,
    CompletionEvent,
    CompletionReply,
    CompletionRequest,
)
from service.web.wire.writing import Reply, WritingRequest

blueprint = APIBlueprint(
    WRITING,
    __name__,
    abp_tags=[{"name": "Completions", "description": "Texts that a model writes."}],
)


def _whole_or_streamed(whole: type[BaseModel], event: type[BaseModel]) -> dict[str, object]:
    """The document's entry for an answer that comes whole or as events, as the request says.

    OpenAPI 3.1 has no word for events; tools that know them take this schema for that of each one.
    """
    return {
        "content": {
            kind: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
            for kind, model in (("application/json", whole), ("text/event-stream", event))
        }
    }


@blueprint.post(
    "/v1/completions",
    summary="Continue prompts",
    responses={200: _whole_or_streamed(Completion, CompletionEvent)},
)
@with_body
def complete(body: CompletionRequest) -> Response:
    """Texts that begin where the prompts end, written by the model character by character.

    The same request gives the same texts; without a seed one is drawn, and the answer says which.
    """
    order = body.to_submit(current().settings, owner())
    return _answer(body, order, CompletionReply)


@blueprint.post(
    "/v1/chat/completions",
    summary="Continue messages",
    responses={200: _whole_or_streamed(ChatCompletion, ChatEvent)},
)
@with_body
def chat(body: ChatRequest) -> Response:
    """For clients that know only chats: the messages become one prompt, which is continued.

    A character model has learned no turns and answers nobody; it goes on with the text.
    """
    service = current()
    template = None
    if service.settings.chat_template is None:
        cards = service.link.ask(Describe(model=body.model), look=Watch.current()).cards
        if not cards:
            raise unknown_model(body.model)
        template = cards[0].chat_template
    order = body.to_submit(service.settings, owner(), template)
    return _answer(body, order, ChatReply)


def _answer(body: WritingRequest, order: Submit, form: type[Reply]) -> Response:
    """Have the texts written, and answer them in a form, whole or as they come."""
    service, this, watch = current(), exchange(), Watch.current()
    this.ask(order.model, order.prompts[0])
    try:
        call = service.link.submit(order, look=watch)
    except RequestError as error:
        raise RequestError(renamed(error.problem, body.names)) from error
    this.prompt_tokens = call.accepted.prompt_tokens
    reply = form(
        call.accepted,
        wants_logprobs=order.params.logprobs is not None,
        wants_usage=body.wants_usage,
    )
    waiting = Waiting(call, watch, timeout=order.timeout)
    if body.is_streamed:
        return stream.respond(waiting, reply, this, heartbeat=service.settings.heartbeat)
    try:
        texts, ended = _collect(waiting)
    finally:
        waiting.close()
    this.completion_tokens = ended.completion_tokens
    return Response(dump(reply.whole(texts, ended)), content_type="application/json")


def _collect(waiting: Waiting) -> tuple[list[Delta], Ended]:
    """All of each choice as one delta, in the order of their index; raises what ended them."""
    parts: dict[int, list[Delta]] = {}
    while not isinstance(event := waiting.next(LOOK), Ended):
        for delta in () if event is None else event:
            parts.setdefault(delta.index, []).append(delta)
    if event.problem is not None:
        raise RequestError(event.problem)
    return [_join(parts[index]) for index in sorted(parts)], event


def _join(parts: Sequence[Delta]) -> Delta:
    """Deltas of one choice as one."""
    if len(parts) == 1:
        return parts[0]
    judged = [part.judged for part in parts if part.judged is not None]
    return Delta(
        id=parts[0].id,
        index=parts[0].index,
        text="".join(part.text for part in parts),
        tokens=sum(part.tokens for part in parts),
        judged=None
        if not judged
        else Judged(
            tokens=[token for part in judged for token in part.tokens],
            ids=[number for part in judged for number in part.ids],
            logprobs=[logprob for part in judged for logprob in part.logprobs],
            top=[row for part in judged for row in part.top],
        ),
        finish=parts[-1].finish,
        stop_reason=parts[-1].stop_reason,
    )
