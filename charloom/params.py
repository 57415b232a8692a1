"""How a text is drawn: the only home of the defaults and limits of sampling.

The command line makes its options from these fields, Python takes them as keywords and the service
will take them from requests, so each is named, explained, limited and given its default once. "Not
given" is None, never a number with a second meaning: temperature 0, max_tokens 0 and seed 0 are
what they say.

Nothing but the standard library is imported here, so that a process that only passes requests on
knows their options without loading NumPy.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

from charloom.errors import OptionError

Precision = Literal["auto", "int8", "float32"]

UnknownPolicy = Literal["error", "replace", "skip"]
"""What becomes of a character that a model has no token for."""

UNKNOWN_POLICIES: tuple[UnknownPolicy, ...] = get_args(UnknownPolicy)

SEED_LIMIT = 2**53
"""Seeds lie below it, so that a JSON number carries every one of them exactly."""

CHOICE_LIMIT = 2**32
"""Choices of one prompt lie below it: the index is one word of the random generator's counter."""

STOPS_LIMIT = 64
STOP_LENGTH_LIMIT = 500
"""Bounds on the stop matcher's table, which holds every prefix of every stop string."""

THREADS_LIMIT = 256
"""Most processor threads of a step."""

BIASES_LIMIT = 1024
"""Most tokens that logit_bias names: each is looked up before the text begins."""

PENALTY_LIMIT = 2.0
BIAS_LIMIT = 100.0
"""Bounds of OpenAI's API, which clients know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The options of one request; raises `OptionError` with every problem found in them."""

    max_tokens: int = field(
        default=256,
        metadata={
            "help": "Draw at most this many tokens (characters, bytes or pieces, as the model was "
            "trained on)."
        },
    )
    min_tokens: int = field(
        default=0,
        metadata={
            "help": "Draw at least this many: before them a document does not end and no stop "
            "string ends the text."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Divide the logits by this: below 1 is safer, above 1 more surprising, 0 takes "
            "the most likely token each time."
        },
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Draw from this many most likely tokens only."}
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw from the fewest most likely tokens that together have this probability."
        },
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw only tokens at least this many times as likely as the most likely one."
        },
    )
    repetition_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Make tokens that prompt or text already hold less likely (above 1) or more "
            "likely (below 1)."
        },
    )
    frequency_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Lower a token's logit by this for every time that prompt or text hold it; "
            "negative values raise it."
        },
    )
    presence_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Lower a token's logit by this once prompt or text hold it; negative values "
            "raise it."
        },
    )
    typical_p: float | None = field(
        default=None,
        metadata={
            "help": "Draw from the tokens whose surprise is nearest to the mean surprise and that "
            "together have this probability."
        },
    )
    logit_bias: Mapping[str | int, float] | None = field(
        default=None,
        metadata={
            "help": "Add to the logit of a token, named by its text (or in Python by its number): "
            "-100 all but forbids it, 100 all but demands it.",
        },
    )
    logprobs: int | None = field(
        default=None,
        metadata={
            "help": "Give each token's log-probability, before and after these options, and those "
            "of this many most likely tokens."
        },
    )
    seed: int | None = field(
        default=None,
        metadata={
            "help": "Key of the random draws: the same seed writes the same text; drawn when not "
            "given."
        },
    )
    stop: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "End the text before this string, or the first of several; the prompt is not "
            "searched."
        },
    )
    include_stop_str_in_output: bool = field(
        default=False,
        metadata={"help": "End the text with the stop string that was met, not before it."},
    )
    ignore_eos: bool = field(
        default=False,
        metadata={
            "help": "Never draw the end of a document, so that max_tokens or a stop string ends "
            "the text."
        },
    )
    n: int = field(default=1, metadata={"help": "Write this many texts for the prompt."})
    unknown: UnknownPolicy = field(
        default="error",
        metadata={"help": "What to do with prompt characters that the model has no token for."},
    )
    precision: Precision = field(
        default="auto",
        metadata={
            "help": "Arithmetic of the network's step; auto is int8 where this processor computes "
            "it exactly, else float32."
        },
    )

    def __post_init__(self) -> None:
        problems = [
            *_lengths(self.min_tokens, self.max_tokens),
            *_number("temperature", self.temperature, least=0.0),
            *_whole("n", self.n, least=1, most=CHOICE_LIMIT),
            *_stops(self.stop),
            *_switch("include_stop_str_in_output", self.include_stop_str_in_output),
            *_switch("ignore_eos", self.ignore_eos),
            *_choice("unknown", self.unknown, UNKNOWN_POLICIES),
            *_choice("precision", self.precision, get_args(Precision)),
        ]
        if self.top_k is not None:
            problems += _whole("top_k", self.top_k, least=1)
        if self.top_p is not None:
            problems += _number("top_p", self.top_p, above=0.0, most=1.0)
        if self.min_p is not None:
            problems += _number("min_p", self.min_p, least=0.0, most=1.0)
        if self.repetition_penalty is not None:
            problems += _number(
                "repetition_penalty", self.repetition_penalty, least=0.01, most=100.0
            )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if value is not None:
                problems += _number(name, value, least=-PENALTY_LIMIT, most=PENALTY_LIMIT)
        if self.typical_p is not None:
            problems += _number("typical_p", self.typical_p, above=0.0, most=1.0)
        if self.logit_bias is not None:
            problems += _biases(self.logit_bias)
        if self.logprobs is not None:
            problems += _whole("logprobs", self.logprobs, least=0)
        if self.seed is not None:
            problems += _whole("seed", self.seed, least=0, most=SEED_LIMIT - 1)
        if problems:
            raise OptionError(problems)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords of a call (a test holds the two together)."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    typical_p: float | None
    logit_bias: Mapping[str | int, float] | None
    logprobs: int | None
    seed: int | None
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    ignore_eos: bool
    n: int
    unknown: UnknownPolicy
    precision: Precision


def thread_problems(threads: int | None) -> list[str]:
    """What is wrong with a number of processor threads, if anything."""
    return [] if threads is None else _whole("threads", threads, least=1, most=THREADS_LIMIT)


def _lengths(least: object, most: object) -> list[str]:
    """What is wrong with the least and the greatest length of a text."""
    problems = [*_whole("max_tokens", most, least=0), *_whole("min_tokens", least, least=0)]
    if not problems and isinstance(least, int) and isinstance(most, int) and least > most:
        problems.append(f"min_tokens is {least}, and max_tokens {most}; give at most that many.")
    return problems


def _whole(name: str, value: object, *, least: int, most: int | None = None) -> list[str]:
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= least
        and (most is None or value <= most)
    ):
        return []
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"
    return [f"{name} is {value!r}; give a whole number {limits}."]


def _number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> list[str]:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # false for NaN, infinity and integers beyond a float
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return []
    limits = [
        f"{words} {limit:g}"
        for words, limit in (("of at least", least), ("above", above), ("at most", most))
        if limit is not None
    ]
    return [f"{name} is {value!r}; give a finite number {' and '.join(limits)}."]


def _switch(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name} is {value!r}; give True or False."]


def _stops(value: object) -> list[str]:
    if not isinstance(value, tuple) or not all(isinstance(stop, str) for stop in value):
        return [f"stop is {value!r}; give a tuple of texts, such as ('\\n',)."]
    problems = []
    if len(value) > STOPS_LIMIT:
        problems.append(f"stop holds {len(value)} texts; give at most {STOPS_LIMIT}.")
    if "" in value:
        problems.append(
            "stop holds an empty text, which would end every text at once; leave it out."
        )
    longest = max(map(len, value), default=0)
    if longest > STOP_LENGTH_LIMIT:
        problems.append(
            f"stop holds a text of {longest} characters; give at most {STOP_LENGTH_LIMIT}."
        )
    return problems


def _biases(value: object) -> list[str]:
    if not isinstance(value, Mapping):
        return [
            f"logit_bias is {value!r}; give a mapping of tokens to numbers, such as {{'e': -5}}."
        ]
    if len(value) > BIASES_LIMIT:
        return [f"logit_bias holds {len(value)} tokens; give at most {BIASES_LIMIT}."]
    problems = []
    for token, bias in value.items():
        is_token = isinstance(token, str) or (type(token) is int and token >= 0)
        if not is_token or token == "":
            problems.append(
                f"logit_bias holds {token!r}; name a token by its text or by its number from 0."
            )
        problems += _number(f"logit_bias of {token!r}", bias, least=-BIAS_LIMIT, most=BIAS_LIMIT)
    return problems


def _choice(name: str, value: object, choices: tuple[str, ...]) -> list[str]:
    if value in choices:
        return []
    return [f"{name} is {value!r}; choose one of {', '.join(choices)}."]
