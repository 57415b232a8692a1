"""Questions about models and texts, and their answers.

What is asked about texts is a *work*: they are encoded when it is made, so that its cost is known
and can be agreed to; for scores and embeddings the engine then reads them; at last the answer is
put together. No call waits for the engine, which whoever steps it does between them. The model
stays pinned by the caller meanwhile.

Encoding and `answer` take microseconds a token and may be done in another thread.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.request import Handle, Outcome, Request
from charloom.decoding.request import Prompt as Script
from charloom.errors import CharloomError
from charloom.params import SamplingParams, UnknownPolicy
from charloom.scoring import Score
from charloom.tokenizer import Tokenizer
from service.engine.faults import explain
from service.engine.judgement import Spelling, alternatives, finite
from service.engine.shelf import Served, Shelf
from service.errors import RequestError, invalid, unavailable, unknown_model
from service.messages import (
    NUMBERS_LIMIT,
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    Judged,
    Models,
    Prompt,
    ScoreCard,
    Scores,
    ScoreTexts,
    Text,
    Tokenise,
    Tokens,
)

PACKED = 8
"""Numbers of a vector, four bytes each, that take as much room as one number about a token."""


def describe(shelf: Shelf, ask: Describe) -> Models:
    """One model or all; raises `RequestError` for one that is not served."""
    if ask.model is None:
        return Models(cards=shelf.cards())
    card = shelf.card(ask.model)
    if card is None:
        raise unknown_model(ask.model)
    return Models(cards=[card])


class Work(ABC):
    """A question about texts, on its way to its answer."""

    def __init__(self, *, cost: int, numbers: int) -> None:
        self.cost = cost
        """How many tokens it is charged."""
        self.numbers = numbers
        """About how many numbers and texts the answer holds."""
        self._handles: Sequence[Handle] | None = None
        self._refusal: RequestError | None = None
        # How many of the first requests are known to have an outcome.
        self._ended = 0

    @property
    def handles(self) -> Sequence[Handle]:
        """The requests to the engine, submitted when they are first asked for: until then the work
        may be refused, and nothing has been done.
        """
        if self._handles is None:
            self._handles = []
            try:
                if self._refusal is None:
                    self._handles = self._submit()
            except Exception as error:  # a defect in one question's way is its failure
                self._refusal = explain(error)
        return self._handles

    @property
    def is_done(self) -> bool:
        """Whether all has been read or broken off, so that `answer` waits for nothing."""
        while self._ended < len(self.handles):
            handle = self.handles[self._ended]
            handle.take()
            if handle.outcome is None:
                return False
            self._ended += 1
        return True

    def cancel(self) -> None:
        """Read no further; the work is done soon, and its answer is a refusal."""
        self._refusal = _broken_off()
        for handle in [] if self._handles is None else self._handles:
            handle.cancel()

    @abstractmethod
    def answer(self) -> Scores | Embeddings | Tokens | Text:
        """Put the answer together; raises `RequestError` where there is none.

        To be asked for when the work is done, as it would wait for the engine.
        """

    def _submit(self) -> Sequence[Handle]:
        """Ask the engine, where there is something to ask."""
        return []


class TokeniseWork(Work):
    """The tokens of texts."""

    def __init__(self, served: Served, ask: Tokenise) -> None:
        """Encode the texts; raises `RequestError` for a character that the model does not know."""
        self._tokenizer = served.model.tokenizer
        self._tokens = _encode(ask.texts, self._tokenizer, unknown=ask.unknown, param="prompt")
        tokens = sum(map(len, self._tokens))
        super().__init__(cost=tokens, numbers=_count(tokens, each=2, param="prompt"))

    def answer(self) -> Tokens:
        """The tokens, and how they are spelled, for each text in their order."""
        tokens = [tokens_N.tolist() for tokens_N in self._tokens]
        pieces = [list(map(self._tokenizer.stream_decoder().push, text)) for text in tokens]
        return Tokens(tokens=tokens, pieces=pieces)


class DetokeniseWork(Work):
    """The text of tokens."""

    def __init__(self, served: Served, ask: Detokenise) -> None:
        """Check the tokens; raises `RequestError` for a number that is none of the model's."""
        self._tokenizer = served.model.tokenizer
        try:
            self._tokens = self._tokenizer.check(ask.tokens)
        except CharloomError as error:
            raise explain(error, param="tokens") from error
        super().__init__(cost=len(ask.tokens), numbers=len(ask.tokens))

    def answer(self) -> Text:
        """What the tokens say."""
        return Text(text=self._tokenizer.decode(self._tokens))


class Reading(Work):
    """A question that an engine reads texts for."""

    def __init__(
        self, served: Served, ask: ScoreTexts | Embed, now: float, *, cost: int, numbers: int
    ) -> None:
        super().__init__(cost=cost, numbers=numbers)
        self._served = served
        self._precision = served.precision(ask.precision)
        self._owner = ask.owner
        self._timeout = ask.timeout
        self._deadline = now + ask.timeout

    def _outcomes(self) -> list[Outcome]:
        """What came of the requests; raises `RequestError` unless all texts were read to their
        ends.
        """
        try:
            outcomes = [handle.result() for handle in self.handles]
        except CharloomError as error:
            raise explain(error) from error
        if self._refusal is not None:
            raise self._refusal
        endings = {outcome.ending for outcome in outcomes}
        if "cancelled" in endings:  # by the engine, when it is closed
            raise _broken_off()
        if "deadline" in endings:
            raise unavailable(
                f"The texts were not read within {self._timeout:g} seconds; send fewer or shorter "
                "ones, or ask again later.",
                code="deadline",
            )
        return outcomes


class ScoreWork(Reading):
    """How likely texts are, each read from its own start."""

    def __init__(self, served: Served, ask: ScoreTexts, now: float) -> None:
        """Encode the texts; `now` is by the engine's clock. Raises `RequestError`."""
        self._scorer = served.model.scorer(
            unknown=ask.unknown, precision=served.precision(ask.precision), top=ask.top
        )
        self._texts = ask.texts
        self._tokens: list[NDArray[np.int32]] = []
        for number, text in enumerate(ask.texts):
            try:
                self._tokens.append(self._scorer.encode(text))
            except CharloomError as error:
                raise _named(error, number, len(ask.texts), param="text") from error
        top = min(ask.top, served.model.tokenizer.vocabulary_size)
        numbers = _count(sum(map(len, self._tokens)), each=5 + 2 * top, param="text", top=top)
        cost = sum(max(len(text), 1) for text in self._tokens)
        super().__init__(served, ask, now, cost=cost, numbers=numbers)

    def _submit(self) -> Sequence[Handle]:
        return [
            self._scorer.submit(tokens_N, owner=self._owner, deadline=self._deadline)
            for tokens_N in self._tokens
        ]

    def answer(self) -> Scores:
        """A card for each text, in their order."""
        spelling = Spelling(self._served.model.tokenizer)
        cards = [
            _score_card(self._scorer.assemble(text, tokens_N, outcome.prompt_scores), spelling)
            for text, tokens_N, outcome in zip(
                self._texts, self._tokens, self._outcomes(), strict=True
            )
        ]
        return Scores(
            model=self._served.name,
            fingerprint=self._served.fingerprint,
            precision=self._served.model.arithmetic(self._precision),
            cards=cards,
        )


class EmbedWork(Reading):
    """The last layer's hidden state after inputs, each read from its own start.

    The engine keeps the state before a prompt's last token, from which all its choices branch. So
    each input gets one more token, whichever it is, and what is drawn after that is not looked at.
    Like any prompt, an input whose beginning is known is not read again.
    """

    def __init__(self, served: Served, ask: Embed, now: float) -> None:
        """Encode the inputs; `now` is by the engine's clock. Raises `RequestError`."""
        tokenizer = served.model.tokenizer
        inputs = _encode(ask.inputs, tokenizer, unknown=ask.unknown, param="input")
        for number, tokens_N in enumerate(inputs):
            if not len(tokens_N):
                name = "input" if len(inputs) == 1 else f"input {number}"
                raise invalid(
                    f"{name} has no token; give at least one character that the model knows.",
                    param="input",
                )
        self._tokens = sum(map(len, inputs))
        after = np.array([tokenizer.end], np.int32)
        self._scripts = [Script(np.concatenate([tokens_N, after])) for tokens_N in inputs]
        hidden = served.model.checkpoint.architecture.hidden
        numbers = len(inputs) * hidden // PACKED
        super().__init__(served, ask, now, cost=self._tokens, numbers=numbers)

    def _submit(self) -> Sequence[Handle]:
        engine = self._served.model.engine(self._precision)
        params = SamplingParams(max_tokens=1)
        return [
            engine.submit(
                Request(
                    prompt=script,
                    params=params,
                    seed=0,
                    deadline=self._deadline,
                    owner=self._owner,
                    salt=self._owner.encode(),
                )
            )
            for script in self._scripts
        ]

    def answer(self) -> Embeddings:
        """A vector for each input, in their order."""
        self._outcomes()
        vectors = []
        for script in self._scripts:
            assert script.state is not None, "what was read to its end has left its state"
            vectors.append(script.state[-1, 0].astype("<f4").tobytes())
        return Embeddings(
            model=self._served.name,
            fingerprint=self._served.fingerprint,
            precision=self._served.model.arithmetic(self._precision),
            vectors=vectors,
            tokens=self._tokens,
        )


def _encode(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, unknown: UnknownPolicy, param: str
) -> list[NDArray[np.int32]]:
    """The tokens of texts, and of lists of tokens, which are checked."""
    encoded = []
    for number, prompt in enumerate(prompts):
        try:
            encoded.append(
                tokenizer.encode(prompt, unknown=unknown)
                if isinstance(prompt, str)
                else tokenizer.check(prompt).astype(np.int32)
            )
        except CharloomError as error:
            raise _named(error, number, len(prompts), param=param) from error
    return encoded


def _named(error: CharloomError, number: int, count: int, *, param: str) -> RequestError:
    """The refusal of one of several texts, which says which of them it was."""
    refusal = explain(error, param=param)
    if count == 1:
        return refusal
    return invalid(f"{param} {number} (counted from 0): {refusal}", param=param)


def _count(tokens: int, *, each: int, param: str, top: int = 0) -> int:
    """How many numbers an answer holds, of which each token has `each`, for its `top` alternatives
    too; raises `RequestError` where they would fill the memory.
    """
    if tokens * each > NUMBERS_LIMIT:
        fewer = ", or ask for fewer alternatives" if top > 0 else ""
        raise invalid(
            f"{param} has {tokens} tokens, and with {each} numbers for each an answer may be "
            f"about {NUMBERS_LIMIT // each}; send less text at a time{fewer}.",
            param=param,
            code="too_much_work",
        )
    return tokens * each


def _broken_off() -> RequestError:
    """The refusal of what somebody else has ended."""
    return unavailable("The texts were not read to their end.", code="cancelled")


def _score_card(score: Score, spelling: Spelling) -> ScoreCard:
    """A score in lists and numbers that JSON carries."""
    has_score_N = score.ranks_N > 0
    has_score = has_score_N.tolist()
    tops = iter(
        alternatives(score.top_NT[has_score_N], score.top_logprobs_NT[has_score_N], spelling)
    )
    judged = Judged(
        tokens=list(score.pieces),
        ids=score.tokens_N.tolist(),
        logprobs=[
            logprob if known else None
            for logprob, known in zip(finite(score.logprobs_N), has_score, strict=True)
        ],
        top=[next(tops) if known else None for known in has_score],
    )
    return ScoreCard(
        judged=judged,
        ranks=[rank if rank else None for rank in score.ranks_N.tolist()],
        entropies=[_finite(entropy) for entropy in score.entropies_N.tolist()],
        bits_per_character=_finite(score.bits_per_character),
        bits_per_byte=_finite(score.bits_per_byte),
        characters=score.characters,
        unknown=score.unknown,
    )


def _finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
