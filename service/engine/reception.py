"""Admission: from a worker's message to a job in its lane, a question's answer, or a refusal.

In this order, so that nothing is charged that is not going to be done:

    1. there is a place: each HTTP worker has threads for all places 503
    2. the model is there, loaded if need be                         404, 500, 503
    3. the request can be read, and is not too much work             400
    4. it need not wait, or the queue is not full                    503
    5. there is memory for its answer's numbers beside the others'   503
    6. the owner's budget allows for it                              429
    7. `Accepted` is sent, and it waits for a row

Whatever takes long happens elsewhere and comes back: models are loaded by the shelf, engines opened
and long texts encoded in the background, budgets perhaps asked for in Redis. A request may be
cancelled meanwhile, so that is looked at after every step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from charloom.decoding.engine import Engine
from service.engine.background import Background
from service.engine.faults import explain
from service.engine.inquiry import (
    DetokeniseWork,
    EmbedWork,
    ScoreWork,
    TokeniseWork,
    Work,
    describe,
)
from service.engine.job import Job
from service.engine.lane import Lane
from service.engine.metrics import Metrics
from service.engine.peer import Peer, Ticket
from service.engine.places import Places
from service.engine.quota import Quota
from service.engine.shelf import Served, Shelf
from service.errors import RequestError, invalid, unavailable
from service.frames import FrameTooLongError, encode
from service.messages import (
    PROMPTS_LIMIT,
    Answer,
    AskMetrics,
    AskStatus,
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    Models,
    Question,
    Refused,
    Scores,
    ScoreTexts,
    Status,
    Submit,
    Text,
    Tokenise,
    Tokens,
)
from service.settings import Settings

QUICK = 1 << 16
"""Characters or tokens that are encoded at once; more are encoded in the background."""

QUICK_SPELLING = 1 << 12
"""Characters, tokens and biases that are looked up one by one at once: some milliseconds."""

QUICK_ANSWER = 1 << 12
"""Numbers about tokens that are put into words and encoded at once."""

Inquiry = Tokenise | Detokenise | ScoreTexts | Embed
Body = Models | Scores | Embeddings | Tokens | Text | Status
Result = TypeVar("Result")


class Reception:
    """Admits, refuses and lets go; `jobs` and `works` are what was admitted and is not over, and
    `answers` what waits, encoded, for room in its worker's buffer.
    """

    def __init__(
        self,
        settings: Settings,
        shelf: Shelf,
        quota: Quota,
        background: Background,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._shelf = shelf
        self._quota = quota
        self._background = background
        self._metrics = metrics
        self._clock = clock
        self.lanes: dict[Engine, Lane] = {}
        self.jobs: dict[Ticket, Job] = {}
        self.works: dict[Ticket, Work] = {}
        self.answers: dict[Ticket, bytes] = {}
        self._places = Places(settings.rows + settings.queue)
        self._charging = 0
        """Requests that wait for their budget, after there was room for them."""

    @property
    def waiting(self) -> int:
        """How many requests wait for a row, or are about to."""
        return self._charging + sum(lane.waiting for lane in self.lanes.values())

    # Texts to write

    def submit(self, worker: Peer, order: Submit) -> None:
        """Begin to admit a request; raises `FrameError` where its number is taken."""
        ticket = worker.open(order.id, is_question=False)
        refusal = self._places.enter()
        if refusal is not None and not order.is_repeated:
            self.refuse(ticket, refusal)
            return
        self._shelf.get(order.model, partial(self._read, ticket, order))

    def _read(self, ticket: Ticket, order: Submit, served: Served | RequestError) -> None:
        """The model is known: encode the prompts."""
        if isinstance(served, Exception) or ticket.is_cancelled:
            self._give_up(ticket, served)
            return
        if order.fingerprint not in (None, served.fingerprint):
            error = unavailable(
                f"The model {order.model!r} has been replaced while its text was being written; "
                "send the request again.",
                code="model_replaced",
            )
            self.refuse(ticket, error)
            return
        ticket.pin(served)
        is_open = served.model.is_open(served.precision(order.params.precision))
        self._do(
            partial(Job, order, served, self._settings),
            partial(self._weigh, ticket, order),
            is_quick=is_open and _is_quick(order),
        )

    def _weigh(self, ticket: Ticket, order: Submit, job: Job | Exception) -> None:
        """The prompts are read: look whether there is room and budget."""
        if isinstance(job, Exception) or ticket.is_cancelled:
            self._give_up(ticket, job)
            return
        if order.is_repeated:  # it was admitted and charged before the engine was restarted
            self._accept(ticket, job, None)
            return
        lane = self.lanes.get(job.engine)
        room = job.engine.capacity if lane is None else lane.room
        if room <= self._charging and self.waiting >= self._settings.queue:
            self.refuse(
                ticket,
                unavailable(
                    f"{self._settings.queue} requests are waiting, which is all that may; try "
                    "again later.",
                    code="queue_full",
                ),
            )
            return
        refusal = self._places.reserve(ticket, job.numbers)
        if refusal is not None:
            self.refuse(ticket, refusal)
            return
        self._charging += 1
        self._quota.charge(order.owner, job.cost, partial(self._charged, ticket, job))

    def _charged(self, ticket: Ticket, job: Job, refusal: RequestError | None) -> None:
        self._charging -= 1
        self._accept(ticket, job, refusal)

    def _accept(self, ticket: Ticket, job: Job, refusal: RequestError | None) -> None:
        """The budget is known: let the job wait for its row."""
        if isinstance(refusal, Exception) or ticket.is_cancelled:
            self._give_up(ticket, refusal)
            return
        now = self._clock()
        ticket.worker.send(job.admit(now))
        ticket.job = self.jobs[ticket] = job
        lane = self.lanes.get(job.engine)
        if lane is None:
            lane = self.lanes[job.engine] = Lane(job.engine)
        lane.push(job)
        lane.feed(now)

    # Questions

    def ask(self, worker: Peer, question: Question) -> None:
        """Begin to answer; raises `FrameError` where its number is taken.

        How the process is doing it tells itself.
        """
        ticket, ask = worker.open(question.id, is_question=True), question.ask
        refusal = self._places.enter()
        assert not isinstance(ask, AskStatus | AskMetrics), "no model is asked about these"
        if isinstance(ask, Describe):
            then = partial(self._describe, ticket, ask)
            if ask.model is None:
                then(None)
            else:
                self._shelf.seek(ask.model, then)
        elif refusal is not None:
            self.refuse(ticket, refusal)
        else:
            self._shelf.get(ask.model, partial(self._inquire, ticket, ask))

    def _describe(self, ticket: Ticket, ask: Describe, refusal: RequestError | None) -> None:
        """The models are known: tell of them, which takes no work."""
        if refusal is not None:
            self._give_up(ticket, refusal)
            return
        self._do(
            partial(_word, ticket.id, partial(describe, self._shelf, ask)),
            partial(self._tell, ticket),
        )

    def _inquire(self, ticket: Ticket, ask: Inquiry, served: Served | RequestError) -> None:
        """The model is known: encode the texts."""
        if isinstance(served, Exception) or ticket.is_cancelled:
            self._give_up(ticket, served)
            return
        ticket.pin(served)
        is_ready = not isinstance(ask, ScoreTexts | Embed) or served.model.is_open(
            served.precision(ask.precision)
        )
        self._do(
            partial(_encode, served, ask, self._clock()),
            partial(self._charge, ticket, ask),
            is_quick=is_ready and _size(ask) <= QUICK,
        )

    def _charge(self, ticket: Ticket, ask: Inquiry, work: Work | Exception) -> None:
        """The texts are encoded: look whether there is room and budget."""
        if isinstance(work, Exception) or ticket.is_cancelled:
            self._give_up(ticket, work)
            return
        if work.cost > self._settings.work:
            problem = (
                f"The texts cost {work.cost} tokens, of which each text to score costs at least "
                f"one, and a request may cost {self._settings.work}; send fewer or shorter texts."
            )
            self.refuse(ticket, invalid(problem, code="too_much_work"))
            return
        refusal = self._places.reserve(ticket, work.numbers)
        if refusal is not None:
            self.refuse(ticket, refusal)
        else:
            self._quota.charge(ask.owner, work.cost, partial(self._study, ticket, work))

    def _study(self, ticket: Ticket, work: Work, refusal: RequestError | None) -> None:
        """The budget is known: the engine may read, as soon as the work is looked at."""
        if isinstance(refusal, Exception) or ticket.is_cancelled:
            self._give_up(ticket, refusal)
            return
        ticket.work = self.works[ticket] = work

    def settle(self, ticket: Ticket, work: Work) -> None:
        """Answer a question whose texts have been read."""
        del self.works[ticket]
        self._do(
            partial(_word, ticket.id, work.answer),
            partial(self._tell, ticket),
            is_quick=work.numbers <= QUICK_ANSWER,
        )

    def _tell(self, ticket: Ticket, frame: bytes | Exception) -> None:
        """Let an answer wait for room in its worker's buffer."""
        if isinstance(frame, Exception) or ticket.is_cancelled:
            self._give_up(ticket, frame)
        else:
            self.answers[ticket] = frame

    def deliver(self) -> None:
        """Send the answers that there is room for; the others keep their places meanwhile."""
        for ticket, frame in [*self.answers.items()]:
            if ticket.is_cancelled:
                self._give_up(ticket, None)
            elif ticket.worker.connection.has_room:
                ticket.worker.connection.put(frame)
                self.close(ticket)

    @property
    def can_tell(self) -> bool:
        """Whether something waits to be told to a worker that has room for it."""
        waiting = (*self.answers, *(ticket for ticket, job in self.jobs.items() if job.has_news))
        return any(ticket.worker.connection.has_room for ticket in waiting)

    # The end

    def cancel(self, ticket: Ticket) -> None:
        """Do no more for a request than its end takes."""
        ticket.is_cancelled = True
        if ticket.job is not None:
            ticket.job.cancel()
            lane = self.lanes.get(ticket.job.engine)
            if lane is not None:
                lane.remove(ticket.job)
        if ticket.work is not None:
            ticket.work.cancel()

    def refuse(self, ticket: Ticket, error: Exception) -> None:
        """Say why something is not done."""
        problem = explain(error).problem
        self._metrics.refuse(problem, is_request=not ticket.is_question)
        ticket.worker.send(Refused(id=ticket.id, problem=problem))
        self.close(ticket)

    def close(self, ticket: Ticket) -> None:
        """Forget it."""
        if ticket.served is not None:
            ticket.served.unpin()
        self.jobs.pop(ticket, None)
        self.works.pop(ticket, None)
        self.answers.pop(ticket, None)
        self._places.leave(ticket)
        del ticket.worker.tickets[ticket.id]

    # Steps on the way

    def _give_up(self, ticket: Ticket, result: object) -> None:
        """End what has failed at a step, or is not wanted any more."""
        if not isinstance(result, Exception):
            result = unavailable("The request was cancelled before it began.", code="cancelled")
        self.refuse(ticket, result)

    def _do(
        self,
        work: Callable[[], Result],
        then: Callable[[Result | Exception], None],
        *,
        is_quick: bool = True,
    ) -> None:
        """Do something here or in the background, and go on with what it gives or raises."""
        if not is_quick:
            self._background.run(work, then)
            return
        result: Result | Exception
        try:
            result = work()
        except Exception as error:  # a defect in one request's way is that request's failure
            result = error
        then(result)


def _size(ask: Inquiry) -> int:
    """About how much there is to encode."""
    if isinstance(ask, Detokenise):
        return len(ask.tokens)
    return sum(map(len, ask.inputs if isinstance(ask, Embed) else ask.texts))


def _is_quick(order: Submit) -> bool:
    """Whether the prompts are encoded soon; an echo is spelled, token by token."""
    size, biases = sum(map(len, order.prompts)), order.params.logit_bias
    named = 0 if biases is None else len(biases)
    return size <= QUICK and named + size * order.is_echoed <= QUICK_SPELLING


def _encode(served: Served, ask: Inquiry, now: float) -> Work:
    """Encode texts, and open the engine that is to read them; raises `RequestError`."""
    if isinstance(ask, Detokenise):
        return DetokeniseWork(served, ask)
    texts: Sequence[object] = ask.inputs if isinstance(ask, Embed) else ask.texts
    if len(texts) > PROMPTS_LIMIT:
        raise invalid(
            f"The request holds {len(texts)} texts; send at most {PROMPTS_LIMIT} at a time.",
            code="too_much_work",
        )
    if isinstance(ask, Tokenise):
        return TokeniseWork(served, ask)
    served.model.engine(served.precision(ask.precision))
    return EmbedWork(served, ask, now) if isinstance(ask, Embed) else ScoreWork(served, ask, now)


def _word(number: int, answer: Callable[[], Body]) -> bytes:
    """Make an answer and encode it.

    Raises `RequestError`, and `FrameError` for a value that cannot be told: no fault of who asks.
    """
    body = answer()
    try:
        return encode(Answer(id=number, body=body))
    except FrameTooLongError as error:
        problem = f"The answer is too long: {error} Ask for less at a time."
        raise invalid(problem, code="too_much_work") from error
