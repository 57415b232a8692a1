"""How likely a model finds a text, token by token: surprise, rank and entropy.

Scoring is the engine's loop with the logits kept: the text is read like a prompt, and each token is
judged by the logits it follows from. Texts are scored `apart`, each from the start of a document,
or `together`, as one text with the hidden state carried on.

`Scorer.apart` and `Scorer.together` wait for the engine; closing their iterators ends the reading.
None among their texts says that the next is not there yet, so the scores of those before it are
given first. Who steps the engine by hand calls `encode`, `submit` and, once the handle has its
outcome, `assemble`; none of them waits.

A model of documents is asked for the end of each document too. In one of plain text the first token
has no score, since nothing stands before it. A character outside the vocabulary costs what the
unknown token costs plus the choice among all the code points it may stand for.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding.assessment import Assessment
from charloom.decoding.engine import Engine
from charloom.decoding.request import Handle, Prompt, Request
from charloom.errors import OptionError
from charloom.params import SamplingParams
from charloom.tokenizer import Tokenizer

CHUNK = 4096
"""Tokens of a continued text that are read by one request: enough that its start costs nothing."""

Item = TypeVar("Item")
Result = TypeVar("Result")
_Encoded = tuple[str, NDArray[np.int32]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Score:
    """How likely each token of a text was; natural logarithms, N tokens."""

    text: str
    """The text as it was given."""
    pieces: tuple[str, ...]
    """What each token adds to the text; "" for a part of a character and for a document's end."""
    tokens_N: NDArray[np.int64]
    logprobs_N: NDArray[np.float64]
    """NaN where there is no score: at the start of a text without documents."""
    ranks_N: NDArray[np.int64]
    """1 for the most likely token; 0 where there is no score."""
    entropies_N: NDArray[np.float64]
    """Expected surprise at this place, in nats; NaN where there is no score."""
    top_NT: NDArray[np.int64]
    """The most likely tokens at this place, where asked for; -1 where there is no score."""
    top_logprobs_NT: NDArray[np.float64]
    unknown: int
    """How many of the tokens stand for characters outside the vocabulary."""

    @property
    def nats(self) -> float:
        """Surprise of all that has a score."""
        return float(0.0 - np.nansum(self.logprobs_N))  # a minus sign alone would give -0.0

    @property
    def bits(self) -> float:
        """The same in bits."""
        return self.nats / math.log(2)

    @property
    def characters(self) -> int:
        """Characters that have a score."""
        return sum(map(len, self._scored))

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of these."""
        return sum(len(piece.encode(errors="surrogatepass")) for piece in self._scored)

    @property
    def bits_per_character(self) -> float:
        """Mean surprise; NaN where no character has a score."""
        return self.bits / self.characters if self.characters else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers and scripts; NaN where no character has a score."""
        return self.bits / self.bytes if self.bytes else math.nan

    @property
    def _scored(self) -> Iterator[str]:
        return (piece for piece, rank in zip(self.pieces, self.ranks_N, strict=True) if rank)


class Scorer:
    """Reads texts through an engine and tells how likely they were."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        documents: bool,
    ) -> None:
        """Of `params` count `unknown`, `logprobs` (alternatives to give) and `max_tokens` (0)."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._params = params
        self._documents = documents

    def apart(self, texts: Iterable[str | None]) -> Generator[Score, None, None]:
        """Each text by itself, in their order; many are read at a time."""

        def start(text: str) -> Callable[[], Score]:
            tokens_N = self.encode(text)
            reading = _Reading(self.submit(tokens_N))
            return lambda: self.assemble(text, tokens_N, reading.result())

        return run_ahead(start, texts, ahead=self._engine.ahead)

    def encode(self, text: str) -> NDArray[np.int32]:
        """The tokens of a text that stands by itself, (N,), with its end in a model of documents.

        Raises `OptionError` for what is no text and `UnknownTextError` as `unknown` says.
        """
        tokens_N = self._encode(text)
        return np.append(tokens_N, np.int32(self._tokenizer.end)) if self._documents else tokens_N

    def submit(
        self, tokens_N: NDArray[np.int32], *, owner: str = "", deadline: float | None = None
    ) -> Handle:
        """Let the engine judge what `encode` gave; raises as `Engine.submit` does."""
        return self._submit(Prompt(tokens_N), None, owner=owner, deadline=deadline)

    def assemble(
        self, text: str, tokens_N: NDArray[np.int32], assessment: Assessment | None
    ) -> Score:
        """Put a text, its tokens and what was found of the last of them together.

        The text must have been read to its end: what a deadline or a cancelling leaves is an
        assessment of its first tokens.
        """
        top = min(self._params.logprobs or 0, self._tokenizer.vocabulary_size)
        missing = len(tokens_N) - (0 if assessment is None else len(assessment))

        def column(name: str, gap: float, kind: type, width: int | None = None) -> NDArray[Any]:
            shape = (missing,) if width is None else (missing, width)
            blank: NDArray[Any] = np.full(shape, gap, kind)
            return (
                blank if assessment is None else np.concatenate([blank, getattr(assessment, name)])
            )

        logprobs_N = column("logprobs_N", math.nan, np.float64)
        is_unknown_N = tokens_N == (
            -1 if self._tokenizer.unknown is None else self._tokenizer.unknown
        )
        if is_unknown_N.any():
            logprobs_N[is_unknown_N] -= math.log(self._tokenizer.strangers)
        return Score(
            text=text,
            pieces=self._pieces(text, tokens_N),
            tokens_N=tokens_N.astype(np.int64),
            logprobs_N=logprobs_N,
            ranks_N=column("ranks_N", 0, np.int64),
            entropies_N=column("entropies_N", math.nan, np.float64),
            top_NT=column("top_NT", -1, np.int64, top),
            top_logprobs_NT=column("top_logprobs_NT", math.nan, np.float64, top),
            unknown=int(is_unknown_N.sum()),
        )

    def together(self, texts: Iterable[str | None]) -> Generator[Score, None, None]:
        """The texts as one text, in their order; a model of documents is not asked for its end."""
        state: State | None = None
        last = np.empty(0, np.int32)
        for group in _chunks(
            (None if text is None else (text, self._encode(text)) for text in texts), CHUNK
        ):
            encoded = [tokens for _, tokens in group]
            tokens = np.concatenate([last, *encoded])
            prompt = Prompt(tokens)
            assessment = _Reading(self._submit(prompt, state)).result()
            if assessment is not None:
                state = prompt.state
            last = tokens[-1:]
            ends = accumulate(map(len, encoded), initial=0)
            scored = 0 if assessment is None else len(assessment)
            missing = sum(map(len, encoded)) - scored
            for (text, tokens), (start, end) in zip(group, pairwise(ends), strict=True):
                part = slice(max(start - missing, 0), max(end - missing, 0))
                yield self.assemble(text, tokens, None if assessment is None else assessment[part])

    def pieces(
        self,
        tokens: NDArray[np.integer[Any]],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
    ) -> Iterator[Assessment]:
        """Judge pieces of a sequence of tokens, each from a state of zeros, in their order.

        A piece reads tokens[start : start + length] and judges the token after each. A long one
        comes in parts, in bounded memory.
        """

        def start(piece: tuple[int, int]) -> Callable[[], Iterator[Assessment]]:
            first, length = piece

            def submit(at: int, state: State | None) -> tuple[Prompt, _Reading]:
                end = min(at + CHUNK, first + length) + 1
                prompt = Prompt(np.asarray(tokens[at:end]).astype(np.int32))
                return prompt, _Reading(self._submit(prompt, state, is_beginning=False))

            begun = submit(first, None)

            def read() -> Iterator[Assessment]:
                prompt, reading = begun
                for at in range(first, first + length, CHUNK):
                    if at > first:
                        prompt, reading = submit(at, prompt.state)
                    part = reading.result()
                    assert part is not None, "a piece has at least one token to judge"
                    yield part

            return read

        pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
        for parts in run_ahead(start, pairs, ahead=self._engine.ahead):
            yield from parts

    def _encode(self, text: str) -> NDArray[np.int32]:
        if not isinstance(text, str):
            raise OptionError([f"text is {text!r}; give a text."])
        return self._tokenizer.encode(text, unknown=self._params.unknown)

    def _submit(
        self,
        prompt: Prompt,
        state: State | None,
        *,
        is_beginning: bool = True,
        owner: str = "",
        deadline: float | None = None,
    ) -> Handle:
        return self._engine.submit(
            Request(
                prompt=prompt,
                params=self._params,
                seed=0,
                is_scored=True,
                state=state,
                is_beginning=is_beginning,
                owner=owner,
                deadline=deadline,
            )
        )

    def _pieces(self, text: str, tokens: NDArray[np.int32]) -> tuple[str, ...]:
        """What each token adds to the text, unknown characters as they stood there."""
        decoder = self._tokenizer.stream_decoder()
        pieces = tuple(map(decoder.push, tokens.tolist()))
        if "".join(pieces) == text:
            return pieces
        # Unknown tokens are shown by a stand-in; where each token is a character, by that itself.
        is_ended = tokens[-1:].tolist() == [self._tokenizer.end]
        characters = (*text, "") if is_ended else tuple(text)
        return characters if len(characters) == len(pieces) else pieces


class _Reading:
    """A text that is being read; forgetting it, or breaking off the wait for it, ends that."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __del__(self) -> None:
        self._handle.cancel()

    def result(self) -> Assessment | None:
        """Wait for what was found of its tokens."""
        try:
            return self._handle.result().prompt_scores
        except BaseException:
            self._handle.cancel()  # a traceback may hold this object
            raise


def run_ahead(
    start: Callable[[Item], Callable[[], Result]], items: Iterable[Item | None], *, ahead: int
) -> Generator[Result, None, None]:
    """The results of work that is started early: up to `ahead` items before it is waited for.

    None among the items says that the next is not there yet: what was started is waited for first.
    What is left when the results are no longer wanted is forgotten, which is to cancel it.
    """
    started: deque[Callable[[], Result]] = deque()
    try:
        for item in chain(items, [None]):
            if item is not None:
                started.append(start(item))
            while len(started) >= (ahead if item is not None else 1):
                yield started.popleft()()
    finally:
        started.clear()  # a traceback may hold this frame, and it all that was started


def _chunks(encoded: Iterable[_Encoded | None], size: int) -> Iterator[list[_Encoded]]:
    """The texts and their tokens in groups of at least this many tokens, or up to a None."""
    group: list[_Encoded] = []
    count = 0
    for item in chain(encoded, [None]):
        if item is not None:
            group.append(item)
            count += len(item[1])
        if group and (item is None or count >= size):
            yield group
            group, count = [], 0
