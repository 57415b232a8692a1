"""One HTTP worker as the engine process sees it, and what it has asked for."""

from dataclasses import dataclass, field

from service.engine.connection import PeerConnection
from service.engine.inquiry import Work
from service.engine.job import TOLD_AT_ONCE, Job
from service.engine.shelf import Served
from service.frames import FrameError
from service.messages import Delta, Deltas, FromEngine


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """One request or question of a worker, from its message to its end."""

    worker: "Peer"
    id: int
    is_question: bool
    served: Served | None = None
    """The model, pinned."""
    job: Job | None = None
    work: Work | None = None
    numbers: int = 0
    """How many numbers its answer may hold, which take memory until they are sent."""
    is_cancelled: bool = False

    def pin(self, served: Served) -> None:
        """Keep a model in memory until the ticket is closed."""
        served.pin()
        self.served = served


@dataclass(eq=False, slots=True, kw_only=True)
class Peer:
    """A peer, its connection and its open requests by their number."""

    connection: PeerConnection
    tickets: dict[int, Ticket] = field(default_factory=dict)
    is_greeted: bool = False
    is_refused: bool = False
    """Whether its greeting told that it and this engine do not belong together."""
    is_watched: bool = False
    """Whether it is waited for its socket to take more."""
    pid: int = 0
    _turn: int = 0

    def open(self, number: int, *, is_question: bool) -> Ticket:
        """A ticket for something new; raises `FrameError` where its number is taken."""
        if number in self.tickets:
            raise FrameError(f"The number {number} was given to two requests at a time.")
        ticket = self.tickets[number] = Ticket(worker=self, id=number, is_question=is_question)
        return ticket

    def send(self, message: FromEngine) -> None:
        """Tell it something, if it is still there."""
        if self.connection.is_open:
            self.connection.send(message)

    def tell(self, now: float, pace: float) -> None:
        """Send what has become due of its texts, as far as there is room.

        Its requests take turns in being the first, so that a long answer does not hold up streams.
        """
        jobs = [
            ticket.job
            for ticket in self.tickets.values()
            if ticket.job is not None and ticket.job.has_news
        ]
        if not jobs:
            return
        self._turn += 1
        first = self._turn % len(jobs)
        jobs = jobs[first:] + jobs[:first]
        while self.connection.has_room:
            parts: dict[Job, list[Delta]] = {}
            weight = 0
            for job in jobs:
                try:
                    told, heavy = job.tell(now, pace)
                except Exception as error:  # a defect in one job's way is that job's failure
                    job.fail(error)
                    continue
                if told:
                    parts[job] = told
                weight += heavy
                if weight > TOLD_AT_ONCE:
                    break
            if not parts:
                return
            self._pass_on(parts)
            jobs = [job for job in jobs if job.has_news]

    def _pass_on(self, parts: dict[Job, list[Delta]]) -> None:
        """Send deltas in one message; where that cannot be, each job's by themselves."""
        try:
            self.connection.send(Deltas(parts=[delta for told in parts.values() for delta in told]))
        except FrameError as error:
            if len(parts) > 1:
                for job, told in parts.items():
                    self._pass_on({job: told})
            else:
                for job in parts:
                    job.fail(error)
