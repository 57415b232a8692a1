"""The bodies of `POST /v1/chat/completions`, for clients that know nothing else.

A character model knows no turns: a template joins the messages into one prompt, which the model
continues. What a chat model does beyond writing is refused by name, and clients may say that they
do not want it.
"""

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    Json,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import no_info_before_validator_function

from service.errors import invalid
from service.messages import UNLIKELY, Accepted, Delta, Ended, Judged, Submit
from service.settings import Settings
from service.web.wire import Answer, Off, Request, example, unsupported
from service.web.wire.errors import ErrorBody
from service.web.wire.writing import CompletionUsage, Reply, Whole, WritingRequest, Written

LINES = "{content}\n"
"""The template where neither a setting nor the model has one: a line for each message."""

MESSAGE_LIMIT = 2048
"""Most messages of one request."""

_TOOLS = "the model calls no tools."
_TEXT = "the model reads and writes plain text."
_CACHE = "prompts are remembered in memory, for as long as there is room."
_TAKEN = "Taken for the sake of clients; nothing is done with it."


def neutral(*values: object) -> GetPydanticSchema:
    """Values of a published field that ask for nothing, and so come to null; no other is taken."""
    return GetPydanticSchema(
        lambda source, handler: no_info_before_validator_function(
            lambda value: None if value in values else value, handler(source)
        ),
        lambda _schema, _handler: {"enum": [*values, None]},
    )


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"] = Field(description="No other kind is read.")
    text: str
    prompt_cache_breakpoint: None = unsupported(_CACHE)


class Message(Request):
    """What somebody said."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"const": "assistant"}}},
                {"properties": {"content": {"not": {"type": "null"}}}},
            ]
        }
    )

    role: Literal["developer", "system", "user", "assistant"] = Field(
        description="Who; a template may name it."
    )
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        description="A text, or parts that are joined as they are; null is an empty text of the "
        "assistant's."
    )
    name: str | None = Field(default=None, description=_TAKEN)
    refusal: None = unsupported("the model refuses nothing.")
    annotations: Annotated[None, neutral([])] = unsupported("the model cites nothing.")
    tool_calls: Annotated[None, neutral([])] = unsupported(_TOOLS)
    function_call: None = unsupported(_TOOLS)
    audio: None = unsupported(_TEXT)

    @field_validator("content")
    @classmethod
    def _leave_null_to_the_assistant(
        cls, content: str | list[TextPart] | None, info: ValidationInfo
    ) -> str | list[TextPart] | None:
        """Refuse null of others; an assistant that called a tool has said nothing."""
        if content is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("content", "give a text or a list")
        return content

    @property
    def text(self) -> str:
        """The content as one text."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(Request):
    """The form of the answer."""

    type: Literal["text"] = Field(description="No other form is written.")


class ChatRequest(WritingRequest):
    """The messages to continue."""

    model_config = example({"model": "demo", "messages": [{"role": "user", "content": "To be"}]})

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGE_LIMIT)
    ] = Field(description="What was said so far; a template makes one prompt of it.")
    max_completion_tokens: Whole | None = Field(
        default=None,
        description="The same as max_tokens, by its newer name.",
        json_schema_extra={"minimum": 0},
    )
    logprobs: bool | None = Field(
        default=None, description="Give each token's log-probability by the model."
    )
    top_logprobs: Whole | None = Field(
        default=None,
        description="Give those of this many most likely tokens too, as far as the service's "
        "settings allow; only with logprobs.",
        json_schema_extra={"minimum": 0},
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="The form of the answer: text."
    )
    prompt_cache_key: str | None = Field(default=None, description=_TAKEN)
    safety_identifier: str | None = Field(default=None, description=_TAKEN)
    parallel_tool_calls: bool | None = Field(default=None, description=_TAKEN)
    audio: None = unsupported(_TEXT)
    function_call: Annotated[None, neutral("none", "auto")] = unsupported(_TOOLS)
    functions: Annotated[None, neutral([])] = unsupported(_TOOLS)
    metadata: Annotated[None, neutral({})] = unsupported("nothing is stored.")
    modalities: Annotated[None, neutral(["text"])] = unsupported(_TEXT)
    moderation: None = unsupported("texts are not moderated.")
    prediction: None = unsupported("a text is written from its beginning.")
    prompt_cache_options: Annotated[None, neutral({}, {"mode": "implicit"})] = unsupported(_CACHE)
    prompt_cache_retention: Annotated[None, neutral("in_memory")] = unsupported(_CACHE)
    reasoning_effort: Annotated[None, neutral("none")] = unsupported(
        "the model writes without reasoning first."
    )
    service_tier: Annotated[None, neutral("auto", "default")] = unsupported(
        "all requests are served alike."
    )
    store: Off | None = unsupported("nothing is stored.")
    tool_choice: Annotated[None, neutral("none", "auto")] = unsupported(_TOOLS)
    tools: Annotated[None, neutral([])] = unsupported(_TOOLS)
    verbosity: Annotated[None, neutral("medium")] = unsupported("the model follows no instruction.")
    web_search_options: None = unsupported(_TOOLS)

    @property
    def names(self) -> Mapping[str, str]:
        """Fields that the engine knows by other names, by those."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names

    def to_submit(self, settings: Settings, owner: str, template: str | None) -> Submit:
        """The texts to write, as the engine is told; `template` is the model's own.

        Raises `RequestError`.
        """
        options, problems = {}, []
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                problems.append(
                    (
                        "max_completion_tokens",
                        f"max_completion_tokens is {self.max_completion_tokens}, and max_tokens "
                        f"{self.max_tokens}; they mean the same, so give one.",
                    )
                )
            options["max_tokens"] = self.max_completion_tokens
        if self.logprobs is True:
            options["logprobs"] = 0 if self.top_logprobs is None else self.top_logprobs
        elif self.top_logprobs is not None:
            problems.append(
                (
                    "top_logprobs",
                    f"top_logprobs is {self.top_logprobs}, and logprobs is not true; set it, or "
                    "leave both out.",
                )
            )
        if self.top_logprobs is not None and self.top_logprobs > settings.logprobs:
            problems.append(
                (
                    "top_logprobs",
                    f"top_logprobs is {self.top_logprobs}; this service gives at most "
                    f"{settings.logprobs} alternatives.",
                )
            )
        if settings.chat_template is not None:
            template = settings.chat_template
        prompt = join(self.messages, LINES if template is None else template, settings.body_limit)
        return self.order([prompt], settings, owner, options=options, problems=problems)


def join(messages: Sequence[Message], template: str, limit: int) -> str:
    """The prompt that a template makes of messages, of at most `limit` characters.

    The template is text around {role} and {content}, as `check_template` found where it came from.
    It may be a stranger's, and repeat them: so the prompt is measured before it is made.
    """
    parts = list(Formatter().parse(template))
    values = [{"role": message.role, "content": message.text} for message in messages]
    length = sum(
        len(literal) + (0 if field is None else len(value[field]))
        for value in values
        for literal, field, _, _ in parts
    )
    if length > limit:
        raise invalid(
            f"messages come to a prompt of {length} characters; give at most {limit}.", "messages"
        )
    return "".join(
        literal if field is None else literal + value[field]
        for value in values
        for literal, field, _, _ in parts
    )


# Answers


class ChatTopLogprob(Answer):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """A token of the text."""

    top_logprobs: list[ChatTopLogprob] = Field(description="The likeliest first.")


class ChatLogprobs(Answer):
    """How likely the tokens of a text were, by the model; natural logarithms."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Answer):
    """The text that was written."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(Answer):
    """What is new of a text."""

    content: str


class ChatOpening(ChatDelta):
    """The same, at the text's beginning."""

    role: Literal["assistant"] = "assistant"


class _Ending(Answer):
    """What all choices tell."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(
        description="stop at a stop string or the end of a document, length at max_tokens or the "
        "deadline; null while the text goes on."
    )
    stop_reason: str | None = Field(
        description='The stop string that was met, or "deadline"; otherwise null.'
    )


class ChatChoice(_Ending):
    """One text."""

    message: ChatMessage


class ChatChunkChoice(_Ending):
    """What is new of a text."""

    delta: ChatOpening | ChatDelta


class ChatCompletion(Written):
    """The texts that were written."""

    model_config = example(
        {
            "id": "chatcmpl-0f1e2d3c4b5a69788796a5b4",
            "created": 1795186800,
            "model": "demo",
            "system_fingerprint": "fp_9f86d081884c7d65_int8",
            "seed": 7,
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                    "message": {
                        "role": "assistant",
                        "content": "Or not to be",
                        "refusal": None,
                    },
                }
            ],
            "usage": {
                "prompt_tokens": 6,
                "completion_tokens": 12,
                "total_tokens": 18,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
    )

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChatChunk(Written):
    """What a stream's event holds."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ChatUsageChunk(ChatChunk):
    """The same where usage was asked for: null until the last chunk, which has no choices."""

    usage: CompletionUsage | None


class ChatEvent(BaseModel):
    """An event of the stream: what is new of a text, or what went wrong; the last is [DONE]."""

    data: Json[ChatUsageChunk | ChatChunk | ErrorBody] | Literal["[DONE]"]


class ChatReply(Reply):
    """Answers a chat request."""

    prefix = "chatcmpl-"
    chunk = ChatChunk
    usage_chunk = ChatUsageChunk

    def __init__(self, accepted: Accepted, *, wants_logprobs: bool, wants_usage: bool) -> None:
        super().__init__(accepted, wants_logprobs=wants_logprobs, wants_usage=wants_usage)
        self._opened: set[int] = set()
        """Choices whose first chunk, which has the role, is under way."""

    def whole(self, texts: Sequence[Delta], ended: Ended) -> ChatCompletion:
        """All texts."""
        choices = [
            ChatChoice(message=ChatMessage(content=text.text), **self._ending(text))
            for text in texts
        ]
        return ChatCompletion(**self._head, choices=choices, usage=self.usage(ended))

    def choice(self, delta: Delta) -> ChatChunkChoice:
        """What is new of a text."""
        form = ChatDelta if delta.index in self._opened else ChatOpening
        self._opened.add(delta.index)
        return ChatChunkChoice(delta=form(content=delta.text), **self._ending(delta))

    def _ending(self, delta: Delta) -> dict[str, object]:
        return {
            "index": delta.index,
            "logprobs": _judge(delta.judged) if self._wants_logprobs else None,
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }


def _judge(judged: Judged | None) -> ChatLogprobs:
    """The judgements; an empty list where there are none."""
    if judged is None:
        return ChatLogprobs(content=[])
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=token,
                logprob=UNLIKELY if logprob is None else logprob,
                bytes=list(token.encode()),
                top_logprobs=[
                    ChatTopLogprob(token=other, logprob=value, bytes=list(other.encode()))
                    for other, value in (() if row is None else row)
                ],
            )
            for token, logprob, row in zip(judged.tokens, judged.logprobs, judged.top, strict=True)
        ]
    )
