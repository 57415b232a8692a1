"""What completions and chat completions have in common: options in, the frame of an answer out.

OpenAI's names first; what goes beyond them has the names of other open servers. Null means that a
field is not given. Here types are checked; ranges and defaults of sampling belong to
`SamplingParams`, whose sentences come back under the names of the fields. The document tells these
ranges too, and a test holds the two together.
"""

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, WithJsonSchema

from charloom.errors import OptionError
from charloom.params import (
    BIAS_LIMIT,
    PENALTY_LIMIT,
    SEED_LIMIT,
    STOP_LENGTH_LIMIT,
    STOPS_LIMIT,
    Precision,
    SamplingParams,
    UnknownPolicy,
)
from service.errors import invalid_all
from service.messages import Accepted, Delta, Ended, Prompt, Submit
from service.settings import Settings
from service.web.wire import MODEL_LIMIT, Answer, Off, Request, fingerprint_of, unsupported
from service.web.wire.inputs import TOKEN_LIMIT

N_LIMIT = 128
"""Most choices of a prompt; OpenAI's own limit."""

INTERVAL_LIMIT = 60.0
"""Most seconds between two events of a stream."""

_HELP = {field.name: field.metadata["help"] for field in fields(SamplingParams)}

_TOKEN = re.compile(r"0|[1-9][0-9]{0,9}")

_SAME = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "include_stop_str_in_output",
    "ignore_eos",
    "n",
    "unknown",
)
"""Fields that mean here what they mean in `SamplingParams`."""

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A number that the engine's messages can carry."""

Stop = Annotated[
    str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": STOP_LENGTH_LIMIT})
]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=STOPS_LIMIT)]

Biases = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": f"^({_TOKEN.pattern})$"},
            "additionalProperties": {
                "type": "number",
                "minimum": -BIAS_LIMIT,
                "maximum": BIAS_LIMIT,
            },
        }
    ),
]


def _option(name: str, **limits: float) -> Any:
    """A field of `SamplingParams` that need not be given, with its documented range."""
    return Field(default=None, description=_HELP[name], json_schema_extra={**limits})


class StreamOptions(Request):
    """What a stream tells beside the text."""

    include_usage: bool | None = Field(
        default=None, description="Send the usage, in a last chunk without choices."
    )
    include_obfuscation: Off | None = unsupported("events are not padded.")


class WritingRequest(Request):
    """The fields that completions and chat completions share."""

    model: str = Field(description="Name of the model.", max_length=MODEL_LIMIT)
    max_tokens: Whole | None = _option("max_tokens", minimum=0)
    min_tokens: Whole | None = _option("min_tokens", minimum=0)
    temperature: float | None = _option("temperature", minimum=0)
    top_k: Whole | None = _option("top_k", minimum=1)
    top_p: float | None = _option("top_p", exclusiveMinimum=0, maximum=1)
    min_p: float | None = _option("min_p", minimum=0, maximum=1)
    typical_p: float | None = _option("typical_p", exclusiveMinimum=0, maximum=1)
    repetition_penalty: float | None = _option("repetition_penalty", minimum=0.01, maximum=100)
    frequency_penalty: float | None = _option(
        "frequency_penalty", minimum=-PENALTY_LIMIT, maximum=PENALTY_LIMIT
    )
    presence_penalty: float | None = _option(
        "presence_penalty", minimum=-PENALTY_LIMIT, maximum=PENALTY_LIMIT
    )
    logit_bias: Biases | None = Field(
        default=None,
        description="Add to the logit of a token, named by its number as POST /tokenize gives it: "
        f"-{BIAS_LIMIT:g} forbids it, {BIAS_LIMIT:g} all but demands it.",
    )
    seed: Whole | None = _option("seed", minimum=0, maximum=SEED_LIMIT - 1)
    stop: Stop | Stops | None = Field(
        default=None,
        description="End the text before this string, or before the first of these that it comes "
        "to; the prompt is not searched.",
    )
    include_stop_str_in_output: bool | None = _option("include_stop_str_in_output")
    ignore_eos: bool | None = _option("ignore_eos")
    n: Annotated[int, Field(ge=1, le=N_LIMIT)] | None = _option("n")
    unknown: UnknownPolicy | None = _option("unknown")
    precision: Precision | None = _option("precision")
    stream: bool | None = Field(
        default=None, description="Send the text as it is written, over server-sent events."
    )
    stream_options: StreamOptions | None = Field(
        default=None, description="What the stream tells beside the text; only with stream."
    )
    stream_interval: Annotated[float, Field(ge=0, le=INTERVAL_LIMIT)] | None = Field(
        default=None,
        description="Seconds between two events of the stream; its first character comes at once. "
        "Only with stream.",
    )
    user: str | None = Field(
        default=None, description="Taken for the sake of clients; nothing is done with it."
    )

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes in chunks."""
        return self.stream is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def names(self) -> Mapping[str, str]:
        """Fields that the engine knows by other names, by those."""
        return {}

    def order(
        self,
        prompts: Sequence[Prompt],
        settings: Settings,
        owner: str,
        *,
        options: Mapping[str, object],
        problems: Sequence[tuple[str, str]],
        best_of: int | None = None,
        is_echoed: bool = False,
    ) -> Submit:
        """The texts to write, as the engine is told.

        `options` go before what the fields of the same name say, and `problems` are what was found
        wrong already. Raises `RequestError` with everything that is wrong.
        """
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        given["precision"] = settings.precision if self.precision is None else self.precision
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        biases, unnamed = _read_biases(self.logit_bias)
        if biases is not None:
            given["logit_bias"] = biases
        found = [*problems, *unnamed, *self._stream_problems()]
        try:
            params = SamplingParams(**{**given, **options})
        except OptionError as error:
            named = [_name(text, self.names) for text in error.problems]
            raise invalid_all([*found, *named]) from error
        if found:
            raise invalid_all(found)
        return Submit(
            id=0,  # the link gives it one
            model=self.model,
            prompts=prompts,
            params=params,
            best_of=best_of,
            is_echoed=is_echoed,
            is_streamed=self.is_streamed,
            interval=(
                settings.stream_interval if self.stream_interval is None else self.stream_interval
            ),
            timeout=settings.timeout,
            owner=owner,
        )

    def _stream_problems(self) -> list[tuple[str, str]]:
        """What is wrong with the fields that only streams have."""
        return [
            (name, f"{name} is given, and stream is not true; stream, or leave it out.")
            for name in ("stream_options", "stream_interval")
            if getattr(self, name) is not None and not self.is_streamed
        ]


def _read_biases(
    given: Mapping[str, float] | None,
) -> tuple[dict[int, float] | None, list[tuple[str, str]]]:
    """Biases by the numbers of tokens, and what names none."""
    if given is None:
        return None, []
    problems = [
        (
            "logit_bias",
            f"logit_bias holds {name[:20]!r}; name a token by its number, which POST /tokenize "
            "gives.",
        )
        for name in given
        if not _TOKEN.fullmatch(name) or int(name) >= TOKEN_LIMIT
    ]
    return None if problems else {int(name): bias for name, bias in given.items()}, problems


def _name(sentence: str, names: Mapping[str, str]) -> tuple[str, str]:
    """The field that a sentence of `SamplingParams` begins with, and it under the field's name."""
    option, _, rest = sentence.partition(" ")
    field = names.get(option, option)
    return field, f"{field} {rest}"


# Answers


class PromptTokensDetails(Answer):
    """What became of the prompt's tokens."""

    cached_tokens: int = Field(
        description="How many were not read, since their hidden state was known."
    )


class CompletionUsage(Answer):
    """What a request cost, in tokens."""

    prompt_tokens: int = Field(description="Tokens of all prompts.")
    completion_tokens: int = Field(
        description="Tokens of all texts that were written, those of best_of included."
    )
    total_tokens: int = Field(description="Both together.")
    prompt_tokens_details: PromptTokensDetails


class Written(Answer):
    """What every answer and every chunk begins with."""

    id: str = Field(description="Names this request; all chunks of a stream have the same.")
    created: int = Field(description="When it was admitted, in seconds since 1970.")
    model: str = Field(description="Name of the model.")
    system_fingerprint: str = Field(
        description="Weights, tokenizer and arithmetic: the same request gives the same text where "
        "it is the same."
    )
    seed: int = Field(
        description="The seed, as given or as drawn, which writes the same text again."
    )


class Reply(ABC):
    """How the texts of one request go back, whole or in chunks; the form is a subclass's."""

    prefix: ClassVar[str]
    """What the request's id begins with."""

    chunk: ClassVar[Callable[..., BaseModel]]
    """The form of a chunk."""

    usage_chunk: ClassVar[Callable[..., BaseModel]]
    """Its form where usage was asked for."""

    def __init__(self, accepted: Accepted, *, wants_logprobs: bool, wants_usage: bool) -> None:
        self._wants_logprobs = wants_logprobs
        self._wants_usage = wants_usage
        self._prompt_tokens = accepted.prompt_tokens
        self._head: dict[str, Any] = {
            "id": self.prefix + secrets.token_hex(12),
            "created": accepted.created,
            "model": accepted.model,
            "system_fingerprint": fingerprint_of(accepted.fingerprint, accepted.precision),
            "seed": accepted.seed,
        }

    @abstractmethod
    def whole(self, texts: Sequence[Delta], ended: Ended) -> BaseModel:
        """The answer, from one delta that holds all of each choice, in the order of their index."""

    @abstractmethod
    def choice(self, delta: Delta) -> BaseModel:
        """What a chunk tells of a choice; deltas come in their order."""

    def frame(self, usage: CompletionUsage | None = None) -> BaseModel:
        """A chunk without choices; it has a field for the usage where that was asked for."""
        if self._wants_usage:
            return self.usage_chunk(**self._head, choices=[], usage=usage)
        return self.chunk(**self._head, choices=[])

    def usage(self, ended: Ended) -> CompletionUsage:
        """What the request cost."""
        return CompletionUsage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=ended.completion_tokens,
            total_tokens=self._prompt_tokens + ended.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=ended.cached_tokens),
        )

    def last(self, ended: Ended) -> BaseModel | None:
        """The chunk that ends a stream where its usage was asked for."""
        return self.frame(self.usage(ended)) if self._wants_usage else None
