"""What a worker's request waits for: texts by a `CompletionCall`, an answer by a `QuestionCall`.

Each has a queue of its own, which the link fills and one request thread empties. Both know what to
send, also for the second time, after the engine crashed: once, since what was under way at two
crashes may be their cause.
"""

import dataclasses
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

import msgspec

from service.errors import Problem, RequestError, failed, unavailable
from service.messages import Accepted, Answer, Delta, Ended, Question, Submit
from service.progress import Progress

CRASHES = 1
"""How many crashes of the engine a call outlives."""

LOOK = 0.5
"""Seconds between two looks at whether an answer is still wanted."""

Event = TypeVar("Event")


Look = Callable[[], None]
"""Raises where an answer is wanted no more, or cannot be given any more."""


def stay() -> None:
    """A look that ends no wait."""


class CompletionCall:
    """A completion under way, as the thread that answers the request sees it.

    One thread calls `next`; any thread may call `cancel`. The other methods are the link's.
    """

    def __init__(self, order: Submit, *, withdraw: Callable[["CompletionCall"], None]) -> None:
        self.id = order.id
        self.is_cancelled = False
        self._order = order
        self._withdraw = withdraw
        self._events: SimpleQueue[Accepted | Delta | Ended] = SimpleQueue()
        self._progress = Progress()
        self._accepted: Accepted | None = None
        self._accepted_at = 0.0
        self._ended: Ended | None = None
        self._crashes = 0

    @property
    def accepted(self) -> Accepted:
        """How the request was admitted."""
        assert self._accepted is not None, "a link gives out accepted calls only"
        return self._accepted

    def next(self, timeout: float) -> list[Delta] | Ended | None:
        """What has come since the last call, waiting for it; None where nothing comes in time.

        After the end it is the end for ever.
        """
        if self._ended is not None:
            return self._ended
        deltas: list[Delta] = []
        try:
            event = self._events.get(timeout=max(timeout, 0.0))
            while isinstance(event, Delta):
                deltas.append(event)
                event = self._events.get_nowait()
        except Empty:
            return deltas if deltas else None
        assert isinstance(event, Ended), "`admission` has taken the one acceptance"
        self._ended = event
        return deltas if deltas else event

    def cancel(self) -> None:
        """Write no further; the end still comes, and cancelling again does nothing."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._withdraw(self)

    # The link's side

    def admission(self, timeout: float, look: Look = stay) -> None:
        """Wait until the request is accepted; raises `RequestError` where it is not.

        What `look` raises ends the wait too.
        """
        event = _await(self._events, timeout, look)
        if isinstance(event, Ended):
            assert event.problem is not None, "nothing ends well that was not accepted"
            raise RequestError(event.problem)

    def message(self) -> Submit:
        """The order; once accepted, the one that leads to the same text."""
        if self._accepted is None:
            return self._order
        used = time.monotonic() - self._accepted_at
        return msgspec.structs.replace(
            self._order,
            params=dataclasses.replace(self._order.params, seed=self._accepted.seed),
            timeout=max(self._order.timeout - used, 0.0),
            fingerprint=self._accepted.fingerprint,
            is_repeated=True,
        )

    def accept(self, accepted: Accepted) -> Problem | None:
        """Note the admission; returns what is wrong where it leads to another text than before."""
        if self._accepted is None:
            self._accepted, self._accepted_at = accepted, time.monotonic()
            self._events.put(accepted)
            return None
        if _text_of(accepted) == _text_of(self._accepted):
            return None
        return unavailable(
            f"The model {accepted.model!r} was replaced while the engine restarted; ask again.",
            code="model_replaced",
        ).problem

    def advance(self, delta: Delta) -> None:
        """Hand over what is new in a delta."""
        new = self._progress.advance(delta)
        if new is not None:
            self._events.put(new)

    def end(self, ended: Ended) -> None:
        """Hand over the end; the link sees to it that there is one."""
        if self._crashes:
            # The second writing may meet the deadline before it is as long as the first was.
            tokens = max(ended.completion_tokens, self._progress.tokens)
            ended = msgspec.structs.replace(ended, completion_tokens=tokens)
        self._events.put(ended)

    def fail(self, problem: Problem) -> None:
        """Hand over an end that nobody wished; to whom cancelled, it is the one they did."""
        if self.is_cancelled:
            self.end(Ended(id=self.id, is_cancelled=True))
        else:
            self.end(Ended(id=self.id, problem=problem))

    def survive(self) -> bool:
        """Note a crash; False where there is nothing to go on with."""
        self._crashes += 1
        self._progress.rewind()
        return self._crashes <= CRASHES and not self.is_cancelled


class QuestionCall:
    """A question under way; one thread waits for its answer, all else is the link's."""

    is_cancelled = False  # nobody takes a question back but by no longer waiting

    def __init__(self, question: Question) -> None:
        self.id = question.id
        self._question = question
        self._events: SimpleQueue[Answer | Problem] = SimpleQueue()
        self._crashes = 0

    def answer(self, timeout: float, look: Look = stay) -> Answer:
        """Wait for the answer; raises `RequestError` where there is none, as `admission` does."""
        event = _await(self._events, timeout, look)
        if isinstance(event, Problem):
            raise RequestError(event)
        return event

    def message(self) -> Question:
        """The question."""
        return self._question

    def end(self, answer: Answer) -> None:
        """Hand over the answer."""
        self._events.put(answer)

    def fail(self, problem: Problem) -> None:
        """Hand over why there is none."""
        self._events.put(problem)

    def survive(self) -> bool:
        """Note a crash; False where it was one too many."""
        self._crashes += 1
        return self._crashes <= CRASHES


Call = CompletionCall | QuestionCall
"""Whatever is under way."""


def _await(events: "SimpleQueue[Event]", timeout: float, look: Look) -> Event:
    """The next event; `look` is called twice a second, and ends the wait by what it raises.

    Raises `RequestError` where nothing comes in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            return events.get(timeout=max(min(left, LOOK), 0.0))
        except Empty:
            if left <= LOOK:
                raise _unanswered(timeout) from None
        look()


def _text_of(accepted: Accepted) -> tuple[str, str, int]:
    """What, beside the request, decides about its text."""
    return accepted.fingerprint, accepted.precision, accepted.seed


def _unanswered(timeout: float) -> RequestError:
    return unavailable(
        f"The engine did not answer within {timeout:g} seconds; ask again in a moment.",
        code="engine_unavailable",
    )


def absent() -> RequestError:
    """No engine answers."""
    return unavailable(
        "The engine that writes the texts is not there; ask again in a moment.",
        code="engine_unavailable",
    )


def closed() -> RequestError:
    """The worker ends."""
    return unavailable("This worker is shutting down; ask again.", code="shutting_down")


def crashed() -> RequestError:
    """It may be this request that the engine does not bear."""
    return failed(
        "The engine crashed twice while it worked on this request; it is not tried again.",
        code="engine_crashed",
    )


def cut_off() -> RequestError:
    """The engine runs, and has ended the connection."""
    return unavailable(
        "The connection to the engine was cut; ask again in a moment.", code="engine_unavailable"
    )
