"""The jobs of one engine: those that wait for a row, and the texts that have one.

The lane hands the engine no more texts than it has rows. So a job waits in one place, where it is
known that it waits, where owners take their turns and from where it is cheaply taken back; and a
look at what the engine has to tell is a look at its rows.

A defect that shows while a job is handled fails that job: an exception that got out of here would
take the process along, and everybody's requests.
"""

import math

from charloom.decoding.admission import WaitingLine
from charloom.decoding.engine import Engine
from charloom.decoding.request import Handle
from service.engine.job import Job


class Lane:
    """The way of jobs into and out of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._line: WaitingLine[Job] = WaitingLine()
        # Jobs whose next text waits for its prompt to be read.
        self._held: dict[Job, None] = {}
        self._running: dict[Handle, Job] = {}
        self._next_deadline = math.inf
        self.streams = 0
        """How many of the texts in the making are told as they are written."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._line or self._held or self._running)

    @property
    def room(self) -> int:
        """How many further jobs would have a row at once."""
        return 0 if self._line else max(self.engine.capacity - len(self._running), 0)

    @property
    def waiting(self) -> int:
        """How many jobs have no row yet."""
        return sum(job.is_waiting for job in self._line)

    @property
    def active(self) -> int:
        """How many texts are in the making."""
        return len(self._running)

    def push(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self._line.push(job.order.owner, job)
        self._next_deadline = min(self._next_deadline, job.deadline)

    def remove(self, job: Job) -> None:
        """Take a job out that is to start no further text."""
        self._held.pop(job, None)
        self._line.take(lambda other: other is job)

    def feed(self, now: float) -> None:
        """Start texts as far as there are rows, owner by owner."""
        if now >= self._next_deadline:
            self._expire(now)
        # One that has failed meanwhile takes its turn too, and is gone.
        for job in [job for job in self._held if job.can_start or not job.has_more]:
            del self._held[job]
            self._line.push_back(job.order.owner, job)
        while self._line and len(self._running) < self.engine.capacity:
            job = self._line.pop()
            try:
                self._advance(job, now)
            except Exception as error:  # a defect in one job's way is that job's failure
                job.fail(error)

    def collect(self, now: float) -> None:
        """Take over what the engine tells of its texts."""
        ended = []
        for handle, job in self._running.items():
            events = handle.take()
            if events:
                try:
                    job.take(handle, events, now)
                except Exception as error:  # a defect in one job's way is that job's failure
                    job.fail(error)
                if handle.outcome is not None:
                    ended.append(handle)
        for handle in ended:
            self.streams -= self._running.pop(handle).order.is_streamed

    def _advance(self, job: Job, now: float) -> None:
        """Start a job's next text, or let the job wait until that can be."""
        if job.can_start:
            self._running[job.start(now)] = job
            self.streams += job.order.is_streamed
            if job.has_more:
                self._line.push_back(job.order.owner, job)
        elif job.has_more:
            self._held[job] = None

    def _expire(self, now: float) -> None:
        """Give up what could not be started in time."""
        over = self._line.take(lambda job: now >= job.deadline)
        over += [job for job in self._held if now >= job.deadline]
        for job in over:
            self._held.pop(job, None)
            try:
                job.expire()
            except Exception as error:  # a defect in one job's way is that job's failure
                job.fail(error)
        left = (*self._line, *self._held)
        self._next_deadline = min((job.deadline for job in left), default=math.inf)
