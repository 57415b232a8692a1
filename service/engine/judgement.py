"""How likely tokens were, on its way from the engine's arrays to a worker's lists.

Lists of Python's numbers and texts take some four times the room of the arrays, so they are made
only of what is sent next. Their numbers are fit for JSON: what has no probability at all gets
`UNLIKELY`, as in other servers. A token and the same token among the alternatives get the same
number, so that clients may compare them with `==` to find out whether the likeliest was drawn.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.assessment import Assessment, Floats
from charloom.tokenizer import Tokenizer
from service.messages import UNLIKELY, Judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Some tokens in the order of the text, and how likely they were, if that is known."""

    ids: Sequence[int]
    pieces: Sequence[str]
    """What each of them adds to the text."""
    assessment: Assessment | None

    def __len__(self) -> int:
        return len(self.ids)


class Spelling:
    """What tokens are called when they stand alone; worked out when first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """What the token alone adds to a text, U+FFFD for a part of a character."""
        name = self._names.get(token)
        if name is None:
            decoder = self._tokenizer.stream_decoder()
            name = self._names[token] = decoder.push(token) + decoder.flush()
        return name


class Judgements:
    """Judged tokens of one text that were not sent yet; each has `width` numbers."""

    def __init__(self, spelling: Spelling, *, width: int) -> None:
        self.width = width
        self._spelling = spelling
        self._parts: deque[Judgement] = deque()
        self._taken = 0
        """How many tokens of the first part were."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, parts: Iterable[Judgement]) -> None:
        """Go on with these."""
        for part in parts:
            if len(part):
                self._parts.append(part)
                self._length += len(part)

    def take(self, limit: int) -> Judged:
        """The first tokens, at most so many, which then are no longer here."""
        judged = Judged(tokens=[], ids=[], logprobs=[], top=[])
        while self._parts and limit > 0:
            part = self._parts[0]
            some = slice(self._taken, self._taken + limit)
            judged.ids.extend(part.ids[some])
            judged.tokens.extend(part.pieces[some])
            if part.assessment is None:
                judged.logprobs.extend([None] * len(part.ids[some]))
                judged.top.extend([None] * len(part.ids[some]))
            else:
                judged.logprobs.extend(finite(part.assessment.logprobs_N[some]))
                known = part.assessment[some]
                judged.top.extend(alternatives(known.top_NT, known.top_logprobs_NT, self._spelling))
            count = min(limit, len(part) - self._taken)
            limit -= count
            self._length -= count
            self._taken += count
            if self._taken == len(part):
                self._parts.popleft()
                self._taken = 0
        return judged


def judge_prompt(
    ids: Sequence[int], pieces: Sequence[str], assessment: Assessment | None
) -> list[Judgement]:
    """A prompt's tokens; what nothing stands before has no score, as OpenAI has it.

    `assessment` is of the last tokens; in a model of documents it is of the first one too.
    """
    scored = 0 if assessment is None else min(len(assessment), len(ids) - 1)
    bare = len(ids) - scored
    known = None if assessment is None else assessment[len(assessment) - scored :]
    return [
        Judgement(ids=ids[:bare], pieces=pieces[:bare], assessment=None),
        Judgement(ids=ids[bare:], pieces=pieces[bare:], assessment=known),
    ]


def finite(logprobs: Floats) -> list[float]:
    """The same numbers where they are numbers, else `UNLIKELY`."""
    fit: list[float] = np.nan_to_num(logprobs, nan=UNLIKELY, neginf=UNLIKELY).tolist()
    return fit


def alternatives(
    top_NT: NDArray[np.integer[Any]], top_logprobs_NT: Floats, spelling: Spelling
) -> list[list[tuple[str, float]]]:
    """The likeliest tokens at each of N places, the likeliest first."""
    values = np.nan_to_num(top_logprobs_NT, nan=UNLIKELY, neginf=UNLIKELY)
    return [
        list(zip(map(spelling, tokens), logprobs, strict=True))
        for tokens, logprobs in zip(top_NT.tolist(), values.tolist(), strict=True)
    ]
