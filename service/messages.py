"""What HTTP workers and the engine process say to each other over their socket.

Each message is a frame: its length in four bytes, big-endian, then the message in MessagePack,
checked against its type when it is read. Nothing is pickled. A worker opens with `Hello`, the
engine answers `Welcome`; a peer of another version or of other settings is told so and left. After
that:

    worker -> engine                        engine -> worker
    Submit     texts to write               Accepted or Refused, then Deltas ..., and one Ended
    Cancel     write no further             (the Ended still comes)
    Question   score, embed, tokenise ...   Answer or Refused
    Tally      what HTTP counted            -

Numbers identify requests within one connection; they never come again on it. Deltas of all streams
of a worker travel together, and those that could not be sent yet are merged.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from charloom.params import Precision, SamplingParams, UnknownPolicy
from service.errors import Problem

VERSION = 1
"""Of this protocol; workers and engine of different versions do not talk."""

FRAME_LIMIT = 64 << 20
"""Bytes of the largest frame that is read."""

PROMPTS_LIMIT = 2048
"""Prompts or texts of one request, as in OpenAI's embeddings: each takes time before admission."""

TEXTS_LIMIT = 1 << 14
"""Texts that one request may have written, however short: each has an answer of its own."""

NUMBERS_LIMIT = 1 << 18
"""Numbers and texts of one answer about tokens; as Python's objects they take some 25 MB."""

Prompt = str | list[int]
"""A text, or the numbers of tokens."""


class _Message(msgspec.Struct, kw_only=True, frozen=True, tag=True, tag_field="type"):
    """Base of all messages; the type's name tells them apart."""


class Hello(_Message, frozen=True):
    """A worker's first message."""

    version: int
    pid: int
    settings: str = ""
    """The digest of those that it expects the engine to go by."""


class Welcome(_Message, frozen=True):
    """The engine's first message."""

    version: int
    pid: int
    settings: str = ""
    """The digest of those that it goes by."""


# Texts to write


class Submit(_Message, frozen=True):
    """One completion request: `params.n` choices of each prompt."""

    id: int
    model: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    """`seed` may be None: `Accepted` then says which was drawn."""
    best_of: int | None = None
    """Write this many choices of each prompt, and answer the `n` that are likeliest per token."""
    is_echoed: bool = False
    """Whether each text begins with its prompt, which is then judged where `logprobs` asks."""
    is_streamed: bool = False
    interval: float = 0.025
    """Seconds between two deltas of a stream; its first comes at once."""
    timeout: float = 600.0
    """Seconds from admission to the deadline."""
    owner: str = ""
    """Who asks: owners take turns, share budgets and share cached states."""
    fingerprint: str | None = None
    """The model's, where another would not do: a request that goes on after a crash."""
    is_repeated: bool = False
    """Whether this goes on after a crash: its budget has been taken already."""


class Cancel(_Message, frozen=True):
    """Write no further; unknown numbers are passed over."""

    id: int


class Accepted(_Message, frozen=True):
    """The request was admitted: sent before anything is written."""

    id: int
    created: int
    """Seconds since 1970."""
    model: str
    fingerprint: str
    precision: str
    """The arithmetic it came to: "int8" or "float32"."""
    seed: int
    prompt_tokens: int
    """Of all prompts together."""


class Refused(_Message, frozen=True):
    """The request was not admitted, or its question not answered."""

    id: int
    problem: Problem


UNLIKELY = -9999.0
"""The logarithm of a probability of 0, which JSON cannot carry, as other servers have it; OpenAI's
chats also have it for a token without a score.
"""


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """How likely some tokens were, natural logarithms; lists of one length."""

    tokens: list[str]
    """What each token adds to the text."""
    ids: list[int]
    logprobs: list[float | None]
    """None where there is no score; never infinite, never NaN."""
    top: list[list[tuple[str, float]] | None]
    """The likeliest alternatives, the likeliest first."""


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one choice."""

    id: int
    index: int
    """prompt number x n + choice."""
    text: str
    tokens: int
    """How many tokens were drawn for it."""
    judged: Judged | None = None
    finish: Literal["stop", "length"] | None = None
    """Set in the choice's last delta."""
    stop_reason: str | None = None
    """The stop string that was met, or "deadline"."""


class Deltas(_Message, frozen=True):
    """What is new, of any of the worker's requests; a choice comes at most once."""

    parts: list[Delta]


class Ended(_Message, frozen=True):
    """The one end of an accepted request; every delta of it has been sent."""

    id: int
    completion_tokens: int = 0
    """Of all choices that were written, those not answered included."""
    cached_tokens: int = 0
    is_cancelled: bool = False
    problem: Problem | None = None
    """Why the texts are incomplete, where they are."""


# Questions with one answer


class _Part(msgspec.Struct, kw_only=True, frozen=True, tag=True, tag_field="type"):
    """Base of what questions and answers hold."""


class Describe(_Part, frozen=True):
    """One model, or all that are served; answered by `Models`."""

    model: str | None = None


class Tokenise(_Part, frozen=True):
    """The tokens of texts; answered by `Tokens`."""

    model: str
    texts: list[str]
    unknown: UnknownPolicy = "error"
    owner: str = ""


class Detokenise(_Part, frozen=True):
    """The text of tokens; answered by `Text`."""

    model: str
    tokens: list[int]
    owner: str = ""


class ScoreTexts(_Part, frozen=True):
    """How likely texts are, each from its start; answered by `Scores`."""

    model: str
    texts: list[str]
    unknown: UnknownPolicy = "replace"
    precision: Precision = "auto"
    top: int = 0
    owner: str = ""
    timeout: float = 600.0


class Embed(_Part, frozen=True):
    """The last layer's hidden state after each input; answered by `Embeddings`."""

    model: str
    inputs: list[Prompt]
    unknown: UnknownPolicy = "error"
    precision: Precision = "auto"
    owner: str = ""
    timeout: float = 600.0


class AskStatus(_Part, frozen=True):
    """How the engine is; answered by `Status`."""


class AskMetrics(_Part, frozen=True):
    """All that was counted, in Prometheus' text format; answered by `Text`."""


class Question(_Message, frozen=True):
    """A question and its number."""

    id: int
    ask: Describe | Tokenise | Detokenise | ScoreTexts | Embed | AskStatus | AskMetrics


class ModelCard(msgspec.Struct, kw_only=True, frozen=True):
    """What is known of a model that is served."""

    name: str
    created: int
    """Seconds since 1970."""
    fingerprint: str
    architecture: dict[str, str | int | bool]
    parameters: int
    """How many numbers it has learned."""
    tokenizer: str
    vocabulary: int
    documents: str
    bits_per_character: float | None
    """On its own held-out text, by windows of 256 characters."""
    is_loaded: bool
    chat_template: str | None = None


class Models(_Part, frozen=True):
    """Models that are served, by name."""

    cards: list[ModelCard]


class ScoreCard(msgspec.Struct, kw_only=True, frozen=True):
    """How likely one text is; None where there is no score. Natural logarithms."""

    judged: Judged
    ranks: list[int | None]
    entropies: list[float | None]
    bits_per_character: float | None
    bits_per_byte: float | None
    characters: int
    """How many have a score."""
    unknown: int
    """How many tokens stand for characters outside the vocabulary."""


class Scores(_Part, frozen=True):
    """One card for each text, in their order."""

    model: str
    fingerprint: str
    precision: str
    cards: list[ScoreCard]


class Embeddings(_Part, frozen=True):
    """One vector for each input, float32, little-endian, in their order."""

    model: str
    fingerprint: str
    precision: str
    vectors: list[bytes]
    tokens: int
    """Of all inputs."""


class Tokens(_Part, frozen=True):
    """The tokens of each text, and what each of them adds to it."""

    tokens: list[list[int]]
    pieces: list[list[str]]


class Text(_Part, frozen=True):
    """A text."""

    text: str


class Status(_Part, frozen=True):
    """How the engine is at this moment."""

    active: int
    """Texts in the making."""
    waiting: int
    """Requests that wait."""
    queue: int
    """How many requests may wait."""
    models: int
    """How many models can be served."""
    step_age: float
    """Seconds since the engine last looked at all its work: near 0 in health."""
    can_count: bool = True
    """Whether the storage of budgets answers; without it nothing is admitted."""


class Answer(_Message, frozen=True):
    """What was asked for."""

    id: int
    body: Models | Scores | Embeddings | Tokens | Text | Status


class TurnedAway(msgspec.Struct, kw_only=True, frozen=True, array_like=True):
    """A request that a worker has refused by itself, so that the engine never saw it."""

    code: str
    is_request: bool
    """Whether it was for texts; a question is not among the requests."""


class Tally(_Message, frozen=True):
    """HTTP answers since the last tally."""

    answers: list[tuple[str, str, int, float]]
    """Route, method, status and seconds of each."""
    refusals: list[TurnedAway] = []
    """Those of them that the worker turned away."""


FromWorker = Hello | Submit | Cancel | Question | Tally
FromEngine = Welcome | Accepted | Refused | Deltas | Ended | Answer
