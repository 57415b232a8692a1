"""One submitted completion: from its prompts to requests of the engine, and from what the engine
tells to deltas and the one `Ended`.

A job starts its texts one by one, as its lane has room: all prompts' first choices, then their
second ones. So a request for thousands of texts takes no more of the engine than it has rows. A
prompt's further choices wait until the first has read it, since they branch from there. Where a
prompt is echoed with log-probabilities it is judged first, once for all its choices, by a request
that writes nothing.

With `best_of` nothing is told before all choices of a prompt have ended; the likeliest per token
are then the answer.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.assessment import Assessment
from charloom.decoding.request import Handle, Outcome, Piece, Request
from charloom.errors import ModelError, OptionError
from charloom.model import Model, draw_seed
from service.engine.choice import JUDGED_AT_ONCE, Choice
from service.engine.faults import explain
from service.engine.judgement import Spelling
from service.engine.shelf import Served
from service.engine.source import Source, encode
from service.errors import Problem, invalid, invalid_all
from service.messages import NUMBERS_LIMIT, TEXTS_LIMIT, Accepted, Delta, Ended, Submit
from service.settings import Settings

TOLD_AT_ONCE = 1 << 18
"""About as many characters and numbers are told in one go."""

Result = Literal["completed", "cancelled", "deadline", "failed"]


class Job:
    """One request for texts, from its prompts to its end; belongs to one thread at a time."""

    def __init__(self, order: Submit, served: Served, settings: Settings) -> None:
        """Encode what is asked for, and open the engine where that is not open yet.

        Raises `RequestError` for what cannot be done. Nothing is submitted yet.
        """
        model, params = served.model, order.params
        choices = params.n if order.best_of is None else order.best_of
        self.order = order
        self.served = served
        self.seed = draw_seed() if params.seed is None else params.seed
        self._is_ranked = order.best_of is not None and choices > 1
        self._is_judged = order.is_echoed and params.logprobs is not None
        assert not (self._is_ranked and order.is_streamed), "what is chosen from is not streamed"
        assert choices >= params.n, "as many are written as are answered"
        self._params = params
        if self._is_ranked and params.logprobs is None:
            self._params = replace(params, logprobs=0)
        self._bias_V = _bias(model, order)
        self._sources = encode(order, model.tokenizer)
        self.prompt_tokens = sum(len(source.prompt.tokens) for source in self._sources)
        self.texts = len(self._sources) * choices
        self.cost, self.numbers = self._count(settings.work)
        precision = served.precision(params.precision)
        self.engine = model.engine(precision)
        self.arithmetic = model.arithmetic(precision)
        self._spelling = Spelling(model.tokenizer)
        self._timeout = min(order.timeout, settings.timeout)
        # Texts are started round by round, a text of each prompt in a round; the first round may be
        # the judging of the prompts.
        self._next = 0
        self._total = self.texts + self._is_judged * len(self._sources)
        self._running: dict[Handle, tuple[Source, Choice | None]] = {}
        self._telling: dict[Choice, None] = {}
        self._problem: Problem | None = None
        self._is_stopped = False
        self._is_cancelled = False
        self._is_late = False
        self.completion_tokens = 0
        self.deadline = math.inf
        self.admitted_at = math.nan
        self.started_at: float | None = None
        self.first_at: float | None = None
        """When the first token came; known of streams."""

    def _count(self, work: int) -> tuple[int, int]:
        """How many tokens it may come to, and how many log-probabilities; raises `RequestError`
        where that is too much.

        A prompt is read once, but counts for each choice that begins with it.
        """
        params, texts = self.order.params, self.texts
        read = self.prompt_tokens * (params.n if self.order.is_echoed else 1)
        cost = read + texts * params.max_tokens
        top = min(params.logprobs or 0, self.served.model.tokenizer.vocabulary_size)
        numbers = 0 if params.logprobs is None else cost * (1 + top)
        if cost > work:
            param, problem = (
                "max_tokens",
                f"The request may cost {cost} tokens ({read} of prompts, and up to "
                f"{params.max_tokens} of each of {texts} texts), and a request may cost {work}; "
                "ask for fewer or shorter texts.",
            )
        elif texts > TEXTS_LIMIT:
            param, problem = (
                "n",
                f"The request is for {texts} texts of {len(self._sources)} prompts; ask for at "
                f"most {TEXTS_LIMIT} texts at a time.",
            )
        elif numbers > NUMBERS_LIMIT:
            param, problem = (
                "logprobs",
                f"The request may come to {numbers} log-probabilities ({1 + top} of each "
                f"of {cost} tokens), and a request may ask for {NUMBERS_LIMIT}; ask for "
                f"{'fewer alternatives or ' if top > 0 else ''}shorter texts.",
            )
        else:
            return cost, numbers
        raise invalid(problem, param=param, code="too_much_work")

    def admit(self, now: float) -> Accepted:
        """Let its time begin; what the worker is to be told."""
        self.admitted_at = now
        self.deadline = now + self._timeout
        return Accepted(
            id=self.order.id,
            created=int(time.time()),
            model=self.served.name,
            fingerprint=self.served.fingerprint,
            precision=self.arithmetic,
            seed=self.seed,
            prompt_tokens=self.prompt_tokens,
        )

    # Towards the engine

    @property
    def is_waiting(self) -> bool:
        """Whether none of its texts has been started."""
        return self.started_at is None

    @property
    def has_more(self) -> bool:
        """Whether there is a text that has not been started."""
        return self._next < self._total

    @property
    def can_start(self) -> bool:
        """Whether there is one that can be started now."""
        if not self.has_more:
            return False
        number, source = self._turn()
        return number < 0 or (source.is_read and not (self._is_judged and source.judged is None))

    def start(self, now: float) -> Handle:
        """Submit the next text, which must be one that can start."""
        number, source = self._turn()
        self._next += 1
        choice = None if number < 0 else self._open(number, source)
        request = Request(
            prompt=source.prompt,
            params=self._params
            if choice is not None
            else replace(self._params, max_tokens=0, min_tokens=0),
            seed=self.seed,
            choice=max(number, 0),
            bias_V=self._bias_V,
            is_streamed=self.order.is_streamed,
            is_scored=choice is None,
            deadline=self.deadline,
            owner=self.order.owner,
            salt=self.order.owner.encode(),
        )
        handle = self.engine.submit(request)
        self._running[handle] = source, choice
        if choice is not None and source.first is None:
            source.first = handle
        if self.started_at is None:
            self.started_at = now
        return handle

    def _turn(self) -> tuple[int, Source]:
        """The choice that is next, -1 for the judging of its prompt, and its prompt."""
        turn, place = divmod(self._next, len(self._sources))
        return turn - self._is_judged, self._sources[place]

    def _open(self, number: int, source: Source) -> Choice:
        """A choice with what it takes over from its prompt."""
        params = self.order.params
        choice = Choice(
            source.number * params.n + number,
            self.served.model.tokenizer,
            self._spelling,
            top=params.logprobs,
        )
        choice.begin("".join(source.pieces), source.judged or ())
        return choice

    # From the engine

    def take(self, handle: Handle, events: Sequence[Piece | Outcome], now: float) -> None:
        """Note what the engine tells of a text."""
        source, choice = self._running[handle]
        for event in events:
            if isinstance(event, Outcome):
                del self._running[handle]
                self._end(source, choice, event)
            elif choice is not None and not self._is_stopped:
                choice.add(event.text, len(event.tokens), event.logprobs)
                if choice.has_text:
                    self._telling[choice] = None
                if self.first_at is None and event.tokens:
                    self.first_at = now

    def _end(self, source: Source, choice: Choice | None, outcome: Outcome) -> None:
        """Note the end of a text, or of a prompt's judging."""
        self.completion_tokens += len(outcome.tokens)
        source.cached_tokens = max(source.cached_tokens, outcome.cached_tokens)
        if self._is_stopped:
            return
        if outcome.error is not None:
            self._problem = self._explain(outcome.error)
            self._stop()
        elif choice is None:
            source.judge(outcome.prompt_scores if outcome.ending == "length" else None)
        else:
            if not self.order.is_streamed:
                choice.add(outcome.text, len(outcome.tokens), outcome.logprobs)
            if outcome.ending == "deadline":
                self._is_late = True
                choice.end("length", "deadline")
            else:
                assert outcome.ending != "cancelled", "a job that is cancelled is stopped"
                choice.end("stop" if outcome.ending == "stop" else "length", outcome.stop)
            self._offer(source, choice, outcome.logprobs)

    def _offer(self, source: Source, choice: Choice, logprobs: Assessment | None) -> None:
        """Let a text that has ended be told, or be chosen from with its prompt's others."""
        if not self._is_ranked:
            self._telling[choice] = None
            return
        likelihood = float(logprobs.logprobs_N.mean()) if logprobs else -math.inf
        source.ranked.append((likelihood, choice))
        if len(source.ranked) == self.order.best_of:
            source.ranked.sort(key=lambda entry: (-entry[0], entry[1].index))
            n = self.order.params.n
            for rank, (_, chosen) in enumerate(source.ranked[:n]):
                chosen.index = source.number * n + rank
                self._telling[chosen] = None
            source.ranked.clear()

    def _explain(self, error: BaseException) -> Problem:
        """What the worker is told of an error that ended a text."""
        if isinstance(error, ModelError) and self._bias_V is not None:  # it may forbid all tokens
            return invalid(str(error), param="logit_bias").problem
        return explain(error).problem

    # The end

    def expire(self) -> None:
        """Give up the texts that have not been started, since the deadline is over."""
        while self.has_more:
            number, source = self._turn()
            self._next += 1
            if self._is_judged and source.judged is None:
                source.judge(None)
            if number >= 0:
                self._is_late = True
                choice = self._open(number, source)
                choice.end("length", "deadline")
                self._offer(source, choice, None)

    def cancel(self) -> None:
        """Write no further, and tell nothing but the end."""
        self._is_cancelled = True
        self._stop()

    def fail(self, error: Exception) -> None:
        """End it for a defect that showed while it was started, taken from or told."""
        self._problem = self._explain(error)
        # Where the defect kept an outcome from being noted, no other will come.
        self._running = {
            handle: text for handle, text in self._running.items() if handle.outcome is None
        }
        self._stop()

    def _stop(self) -> None:
        self._is_stopped = True
        self._next = self._total
        self._telling.clear()
        for handle in self._running:
            handle.cancel()

    # Towards the worker

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell, if perhaps not yet."""
        return bool(self._telling)

    def tell(self, now: float, pace: float) -> tuple[list[Delta], int]:
        """What is to be sent now, at most one delta of a choice, and about its size.

        `pace` is the shortest interval. To be called again until nothing comes.
        """
        told: list[Delta] = []
        weight = 0
        interval = max(self.order.interval, pace)
        for choice in list(self._telling):
            if choice.is_ended or now >= choice.due:
                delta, is_all = choice.tell(self.order.id)
                told.append(delta)
                choice.due = now + interval
                if is_all:
                    del self._telling[choice]
                weight += len(delta.text) + (0 if delta.judged is None else JUDGED_AT_ONCE)
                if weight > TOLD_AT_ONCE:
                    break
        return told, weight

    @property
    def is_over(self) -> bool:
        """Whether the engine has let go of every text, and all of it has been told."""
        return not (self.has_more or self._running or self._telling)

    @property
    def cached_tokens(self) -> int:
        """How many of the prompts' tokens were not read."""
        return sum(source.cached_tokens for source in self._sources)

    @property
    def result(self) -> Result:
        """How it went, once it is over."""
        if self._problem is not None:
            return "failed"
        if self._is_cancelled:
            return "cancelled"
        return "deadline" if self._is_late else "completed"

    def ended(self) -> Ended:
        """The last message about it."""
        return Ended(
            id=self.order.id,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            is_cancelled=self._is_cancelled,
            problem=self._problem,
        )


def _bias(model: Model, order: Submit) -> NDArray[np.float32] | None:
    size = model.tokenizer.vocabulary_size
    given = order.params.logit_bias
    strangers = [name for name in given or () if isinstance(name, int) and name >= size]
    if strangers:  # the model's own sentence would advise texts too, which no request may give
        problems = [
            f"logit_bias names {name}, which is no token of this model; give numbers from 0 to "
            f"{size - 1}."
            for name in strangers
        ]
        raise invalid_all([("logit_bias", problem) for problem in problems])
    try:
        return model.bias(order.params)
    except OptionError as error:
        raise invalid_all([("logit_bias", problem) for problem in error.problems]) from error
