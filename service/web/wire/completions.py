"""The bodies of `POST /v1/completions`: OpenAI's, with what charloom can beyond it."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, Json

from charloom.params import SamplingParams
from service.messages import Accepted, Delta, Ended, Judged, Submit
from service.settings import Settings
from service.web.wire import Answer, example, unsupported
from service.web.wire.errors import ErrorBody
from service.web.wire.inputs import Prompts, listed
from service.web.wire.writing import CompletionUsage, Reply, Whole, WritingRequest, Written

BEST_OF_LIMIT = 20
"""Most choices to pick from; OpenAI's own limit."""


class CompletionRequest(WritingRequest):
    """What to write."""

    model_config = example(
        {"model": "demo", "prompt": "To be", "max_tokens": 200, "temperature": 0.8}
    )

    prompt: Prompts | None = Field(
        default=None,
        description="What to continue: a text or its tokens, or a list of either. Without one a "
        "text is written from its beginning.",
    )
    best_of: Annotated[int, Field(ge=1, le=BEST_OF_LIMIT)] | None = Field(
        default=None,
        description="Write this many texts for each prompt, and answer the n of them whose tokens "
        "are the likeliest on average. Not with stream.",
    )
    echo: bool | None = Field(default=None, description="Begin each text with its prompt.")
    logprobs: Whole | None = Field(
        default=None,
        description="Give each token's log-probability by the model, and those of this many most "
        "likely tokens, as far as the service's settings allow.",
        json_schema_extra={"minimum": 0},
    )
    suffix: None = unsupported("the model reads forwards, and cannot write towards an end.")

    def to_submit(self, settings: Settings, owner: str) -> Submit:
        """The texts to write, as the engine is told; raises `RequestError`."""
        problems = []
        if self.best_of is not None:
            n = SamplingParams().n if self.n is None else self.n
            if self.best_of < n:
                problems.append(
                    ("best_of", f"best_of is {self.best_of}, and n is {n}; give at least n.")
                )
            if self.is_streamed:
                problems.append(
                    (
                        "best_of",
                        f"best_of is {self.best_of}, and stream is true; the best is known only at "
                        "the end, so leave one of them out.",
                    )
                )
        if self.logprobs is not None and self.logprobs > settings.logprobs:
            problems.append(
                (
                    "logprobs",
                    f"logprobs is {self.logprobs}; this service gives at most "
                    f"{settings.logprobs} alternatives.",
                )
            )
        return self.order(
            [""] if self.prompt is None else listed(self.prompt),
            settings,
            owner,
            options={} if self.logprobs is None else {"logprobs": self.logprobs},
            problems=problems,
            best_of=self.best_of,
            is_echoed=self.echo is True,
        )


# Answers


class CompletionLogprobs(Answer):
    """How likely the tokens of a text were, by the model; lists of one length."""

    tokens: list[str] = Field(
        description="What each token adds to the text; those of a stop string are among them."
    )
    token_logprobs: list[float | None] = Field(
        description="Natural logarithms; null for a token that nothing stands before."
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The most likely tokens, and the text's own."
    )
    text_offset: list[int] = Field(
        description="Where each token begins: characters from the start of the text returned."
    )


class CompletionChoice(Answer):
    """One text, or in a stream what is new of it."""

    index: int = Field(description="Number of the prompt x n + number of the choice.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(
        description="stop at a stop string or the end of a document, length at max_tokens or the "
        "deadline; null while the text goes on."
    )
    stop_reason: str | None = Field(
        description='The stop string that was met, or "deadline"; otherwise null.'
    )


class CompletionChunk(Written):
    """What a stream's event holds."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionUsageChunk(CompletionChunk):
    """The same where usage was asked for: null until the last chunk, which has no choices."""

    usage: CompletionUsage | None


class Completion(CompletionChunk):
    """The texts that were written."""

    model_config = example(
        {
            "id": "cmpl-0f1e2d3c4b5a69788796a5b4",
            "created": 1795186800,
            "model": "demo",
            "system_fingerprint": "fp_9f86d081884c7d65_int8",
            "seed": 7,
            "object": "text_completion",
            "choices": [
                {
                    "index": 0,
                    "text": ", or not to be",
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ],
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 14,
                "total_tokens": 19,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }
    )

    usage: CompletionUsage


class CompletionEvent(BaseModel):
    """An event of the stream: what is new of a text, or what went wrong; the last is [DONE]."""

    data: Json[CompletionUsageChunk | CompletionChunk | ErrorBody] | Literal["[DONE]"]


class CompletionReply(Reply):
    """Answers a completion request."""

    prefix = "cmpl-"
    chunk = CompletionChunk
    usage_chunk = CompletionUsageChunk

    def __init__(self, accepted: Accepted, *, wants_logprobs: bool, wants_usage: bool) -> None:
        super().__init__(accepted, wants_logprobs=wants_logprobs, wants_usage=wants_usage)
        self._offsets: dict[int, int] = {}
        """Where the next token of each choice begins."""

    def whole(self, texts: Sequence[Delta], ended: Ended) -> Completion:
        """All texts."""
        choices = [self.choice(text) for text in texts]
        return Completion(**self._head, choices=choices, usage=self.usage(ended))

    def choice(self, delta: Delta) -> CompletionChoice:
        """What is new of a text."""
        return CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._judge(delta.index, delta.judged) if self._wants_logprobs else None,
            finish_reason=delta.finish,
            stop_reason=delta.stop_reason,
        )

    def _judge(self, index: int, judged: Judged | None) -> CompletionLogprobs:
        """The judgements, with their places in the text; empty lists where there are none."""
        if judged is None:
            judged = Judged(tokens=[], ids=[], logprobs=[], top=[])
        offset, offsets = self._offsets.get(index, 0), []
        for token in judged.tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return CompletionLogprobs(
            tokens=judged.tokens,
            token_logprobs=judged.logprobs,
            top_logprobs=[
                _alternatives(token, logprob, row)
                for token, logprob, row in zip(
                    judged.tokens, judged.logprobs, judged.top, strict=True
                )
            ],
            text_offset=offsets,
        )


def _alternatives(
    token: str, logprob: float | None, row: list[tuple[str, float]] | None
) -> dict[str, float] | None:
    """The most likely tokens by their text, the text's own always with its own number.

    Of several tokens with one text the likeliest stands for all.
    """
    found: dict[str, float] = {}
    for other, value in () if row is None else row:
        found.setdefault(other, value)
    if logprob is not None:
        found[token] = logprob
    return found if found else None
