"""The engine process: one thread that talks with all HTTP workers and writes all texts.

A turn of its loop: take what the workers have sent, look at the models, let every engine that has
work move its rows on by one block (10 milliseconds, or one step), and send what has become due. One
thread, since whoever computes would otherwise have to win Python's lock back after every step; so
nothing here may block, and what does is done in the background. Models take turns block by block.

Without work the loop sleeps, but for a look at the models' folder once a second. The process ends
when the last worker has been gone for a while; whether it is started again is its supervisor's
affair.
"""

import logging
import math
import os
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Protocol

from charloom.decoding.engine import Engine
from service.engine.background import Background
from service.engine.connection import PeerConnection
from service.engine.metrics import Metrics, Sample
from service.engine.peer import Peer
from service.engine.quota import Quota
from service.engine.reception import Reception
from service.engine.shelf import SCAN_INTERVAL, Shelf
from service.frames import FrameError
from service.launch import engine_digest
from service.messages import (
    VERSION,
    Answer,
    AskMetrics,
    AskStatus,
    Cancel,
    FromWorker,
    Hello,
    Status,
    Submit,
    Tally,
    Text,
    Welcome,
)
from service.settings import Settings

LINGER = 3.0
"""Seconds without a worker after which the process ends."""

FIRST_LINGER = 30.0
"""The same before the first worker has come."""

STREAM_COST = 0.0004
"""Seconds by which each stream widens the intervals of all: together they send some 2,500 deltas a
second at most.
"""

_log = logging.getLogger("charloom.engine")


class MakeShelf(Protocol):
    """What `Shelf` is called with."""

    def __call__(
        self, settings: Settings, *, wake: Callable[[], None], clock: Callable[[], float]
    ) -> Shelf:
        """The models."""


class EngineProcess:
    """Serves the workers that connect to a listening socket."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        *,
        restarts: int = 0,
        linger: float = LINGER,
        first_linger: float = FIRST_LINGER,
        clock: Callable[[], float] = time.monotonic,
        make_shelf: MakeShelf = Shelf,
    ) -> None:
        """`restarts` is how many engine processes before this one have died; `clock` must be the
        engines'. Raises `OptionError` for settings that cannot be used.
        """
        self._settings = settings
        self._digest = engine_digest(settings)
        self._listener = listener
        self._restarts = restarts
        self._linger = linger
        self._clock = clock
        self._workers: dict[Peer, None] = {}
        # When the process ends, unless a worker comes.
        self._end = clock() + first_linger
        # When all work was last looked at.
        self._looked_at = clock()
        self._background = Background(self._wake)
        # Not the same threads: where Redis is silent, texts are encoded all the same.
        self._accounts = Background(self._wake)
        self._quota = Quota(
            settings.limits_storage,
            settings.requests_per_minute,
            settings.tokens_per_minute,
            self._accounts.run,
            clock=clock,
        )
        self._metrics = Metrics(self._look, clock)
        self._bell, self._ear = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for end in (self._bell, self._ear, listener):
            end.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._hear)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._shelf = make_shelf(settings, wake=self._wake, clock=clock)
        self._reception = Reception(
            settings, self._shelf, self._quota, self._background, self._metrics, clock
        )

    @property
    def is_over(self) -> bool:
        """Whether the last worker has been gone for so long that no other is expected."""
        return not self._workers and self._clock() >= self._end

    def run(self) -> None:
        """Turn until it is over."""
        while not self.is_over:
            self.turn()

    def turn(self, timeout: float = math.inf) -> None:
        """Do all there is to do once, after waiting for it up to `timeout` seconds."""
        is_busy = self._is_busy
        ready = self._selector.select(0 if is_busy else self._pause(timeout))
        if not is_busy:  # it slept, and was right to
            self._looked_at = self._clock()
        for key, _ in ready:
            key.data()
        self._background.deliver()
        self._accounts.deliver()
        self._shelf.poll()
        self._quota.poll()
        self._step()
        self._tell()
        for worker in [*self._workers]:
            self._send(worker)
        self._looked_at = self._clock()

    def close(self) -> None:
        """Break everything off and close every socket."""
        for worker in [*self._workers]:
            self._part(worker)
        self._background.close()
        self._accounts.close()
        self._shelf.close()
        self._selector.close()
        for end in (self._bell, self._ear, self._listener):
            end.close()

    # Waiting

    @property
    def _is_busy(self) -> bool:
        """Whether there is something to do that nobody has to be waited for."""
        reception = self._reception
        return bool(reception.lanes or reception.works) or reception.can_tell

    def _pause(self, timeout: float) -> float:
        """How long there may be nothing to do."""
        left = math.inf if self._workers else max(self._end - self._clock(), 0)
        return min(timeout, SCAN_INTERVAL, self._shelf.pause, left)

    def _wake(self) -> None:
        """End the loop's sleep, from any thread."""
        with suppress(BlockingIOError):  # it has been rung often enough
            self._bell.send(b"\0")

    def _hear(self) -> None:
        self._ear.recv(4096)

    # Workers

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        worker = Peer(connection=PeerConnection(peer))
        self._workers[worker] = None
        self._selector.register(
            worker.connection, selectors.EVENT_READ, partial(self._receive, worker)
        )

    def _receive(self, worker: Peer) -> None:
        """Do what a worker has asked for."""
        try:
            messages = worker.connection.receive()
            for message in messages or ():
                self._obey(worker, message)
        except FrameError as error:
            _log.error("The worker %d is cut off: %s", worker.pid, error)
            messages = None
        if messages is None:
            self._part(worker)

    def _obey(self, worker: Peer, message: FromWorker) -> None:
        """Do what one message says; raises `FrameError` where that breaks the protocol."""
        if worker.connection.is_leaving:
            return
        if isinstance(message, Hello) == worker.is_greeted:
            raise FrameError(f"It sent {type(message).__name__} where it may not.")
        if isinstance(message, Submit):
            self._reception.submit(worker, message)
        elif isinstance(message, Cancel):
            ticket = worker.tickets.get(message.id)
            if ticket is not None:
                self._reception.cancel(ticket)
        elif isinstance(message, Tally):
            self._metrics.tally(message)
        elif isinstance(message, Hello):
            self._greet(worker, message)
        elif isinstance(message.ask, AskStatus):
            worker.send(Answer(id=message.id, body=self._status()))
        elif isinstance(message.ask, AskMetrics):
            worker.send(Answer(id=message.id, body=Text(text=self._metrics.text())))
        else:
            self._reception.ask(worker, message)

    def _greet(self, worker: Peer, hello: Hello) -> None:
        """Tell a worker what is spoken and gone by here; to whom that is nothing has to go."""
        worker.is_greeted, worker.pid = True, hello.pid
        worker.send(Welcome(version=VERSION, pid=os.getpid(), settings=self._digest))
        if hello.version != VERSION:
            _log.error(
                "The worker %d speaks version %d of the protocol and this engine %d: restart the "
                "older of them.",
                hello.pid,
                hello.version,
                VERSION,
            )
        # Of other settings the worker's log tells, once; here there would be a line at each try.
        worker.is_refused = hello.version != VERSION or hello.settings != self._digest
        worker.connection.is_leaving = worker.is_refused

    def _part(self, worker: Peer) -> None:
        """Forget a worker; what it asked for is cancelled."""
        self._selector.unregister(worker.connection)
        worker.connection.close()
        del self._workers[worker]
        for ticket in [*worker.tickets.values()]:
            self._reception.cancel(ticket)
        # Others only looked whether somebody listens, or try until this engine has gone.
        if worker.is_greeted and not worker.is_refused:
            self._end = self._clock() + self._linger

    def _send(self, worker: Peer) -> None:
        """Let the socket take what it takes, and be told when it takes more."""
        connection, now = worker.connection, self._clock()
        connection.flush(now)
        is_flooded = connection.is_flooded(now)
        if is_flooded:
            _log.error("The worker %d is cut off: it asks and does not read.", worker.pid)
        if connection.is_finished or is_flooded:
            self._part(worker)
        elif connection.is_stuck != worker.is_watched:
            worker.is_watched = connection.is_stuck
            events = selectors.EVENT_READ
            if worker.is_watched:
                events |= selectors.EVENT_WRITE
            self._selector.modify(connection, events, partial(self._receive, worker))

    # Texts

    def _step(self) -> None:
        """Move the rows of every engine that has work on by a block."""
        lanes = self._reception.lanes
        engines: dict[Engine, None] = dict.fromkeys(lanes)
        if self._reception.works:
            for served in self._shelf.in_memory():
                engines.update(dict.fromkeys(served.model.engines))
        for engine in engines:
            lane = lanes.get(engine)
            if lane is None:
                engine.step()
                continue
            lane.feed(self._clock())
            self._metrics.step(lane.active)
            engine.step()
            lane.collect(self._clock())
            if lane.is_empty:
                del lanes[engine]

    def _tell(self) -> None:
        """Tell what is due, end what is over and answer what has been read."""
        reception, now = self._reception, self._clock()
        pace = STREAM_COST * sum(lane.streams for lane in reception.lanes.values())
        for worker in self._workers:
            worker.tell(now, pace)
        for ticket, job in [*reception.jobs.items()]:
            if job.is_over:
                self._metrics.finish(job, now)
                ticket.worker.send(job.ended())
                reception.close(ticket)
        for ticket, work in [*reception.works.items()]:
            if work.is_done:
                reception.settle(ticket, work)
        reception.deliver()

    # How it is

    def _status(self) -> Status:
        return Status(
            active=self._active,
            waiting=self._reception.waiting,
            queue=self._settings.queue,
            models=self._shelf.count,
            can_count=not self._quota.is_away,
            step_age=self._clock() - self._looked_at,
        )

    @property
    def _active(self) -> int:
        """How many texts have a row, those to score included."""
        engines = (engine for served in self._shelf.in_memory() for engine in served.model.engines)
        return sum(engine.load.active for engine in engines)

    def _look(self) -> Iterator[Sample]:
        """The numbers that are counted elsewhere."""
        in_memory = self._shelf.in_memory()
        yield "charloom_engine_restarts", (), self._restarts
        yield "charloom_workers", (), len(self._workers)
        yield "charloom_waiting_requests", (), self._reception.waiting
        yield "charloom_active_texts", (), self._active
        yield "charloom_models_served", (), self._shelf.count
        yield "charloom_models_loaded", (), len(in_memory)
        yield "charloom_models_broken", (), len(self._shelf.broken)
        # Versions of one model have one name.
        sums: Counter[tuple[str, str]] = Counter()
        for served in in_memory:
            loads = [engine.load for engine in served.model.engines]
            cache = served.model.cache
            sums["charloom_model_bytes", served.name] += served.bytes
            sums["charloom_read_tokens", served.name] += sum(load.tokens_read for load in loads)
            sums["charloom_drawn_tokens", served.name] += sum(load.tokens_drawn for load in loads)
            sums["charloom_cache_hits", served.name] += cache.hits
            sums["charloom_cache_misses", served.name] += cache.misses
            sums["charloom_cache_bytes", served.name] += cache.bytes
        for (name, model), value in sums.items():
            yield name, (model,), value
