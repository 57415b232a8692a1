"""An HTTP worker's way to the engine process, for all its request threads at once.

Each process has one connection and one thread that reads it and hands what comes to the call (see
`service.call`) that it is for, so that a thread is woken for its own text only. Both begin with the
first request, hence after the worker's fork. Threads send for themselves; the engine always reads.

Where the engine is lost, the reading thread dials again, and all that is under way is sent once
more: the same request gives the same bytes, and what a call was given already is passed over. Where
the same engine answers, it has cut this worker off, as it would again, so all of that ends. Where
no engine answers within `patience` seconds, all that waits is refused, the thread ends, and the
next request begins anew.

A request takes 12 microseconds of Python here and two wakes of its thread, a delta 2 and one wake;
450 requests and 3,150 deltas a second together 18 % of a core, nearly all of it the system's work
of waking threads (30 microseconds each, on two virtual cores).
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import overload

import msgspec

from charloom.errors import CharloomError
from service import frames
from service.call import (
    Call,
    CompletionCall,
    Look,
    QuestionCall,
    absent,
    closed,
    crashed,
    cut_off,
    stay,
)
from service.connection import EngineConnection
from service.errors import RequestError, failed, invalid
from service.frames import FrameError
from service.messages import (
    Accepted,
    AskMetrics,
    AskStatus,
    Cancel,
    Deltas,
    Describe,
    Detokenise,
    Embed,
    Embeddings,
    Ended,
    FromEngine,
    Models,
    Question,
    Refused,
    Scores,
    ScoreTexts,
    Status,
    Submit,
    Tally,
    Text,
    Tokenise,
    Tokens,
    TurnedAway,
    Welcome,
)

TICK = 1.0
"""Seconds between two tallies."""

TALLY_LIMIT = 100_000
"""Most answers that are kept for a tally while there is no engine to count them."""

_log = logging.getLogger(__name__)


class Link:
    """The engine, as the request threads of a worker see it; a forked child has a line of its own.

    `start` is called, in the link's thread, before each attempt to connect: it sees to it that an
    engine listens on `path`, at once where one does. `settings` is the digest of those that the
    engine has to go by. `patience` bounds, in seconds, how long an engine is waited for, and how
    long it may take nothing that is sent.
    """

    def __init__(
        self,
        path: Path,
        *,
        start: Callable[[], None] | None = None,
        settings: str = "",
        patience: float = 15.0,
    ) -> None:
        self._path = path
        self._start = start
        self._settings = settings
        self._patience = patience
        self._lines: dict[int, _Line] = {}
        """By process; never more than one for long."""

    def open(self) -> None:
        """Connect in the background, rather than with the first request: an engine to which no
        worker is connected ends.
        """
        self._line().open()

    def submit(self, order: Submit, *, look: Look = stay) -> CompletionCall:
        """Have texts written, under a number of the link's own; returns once they are accepted.

        `look` is called twice a second meanwhile; what it raises takes the order back. Raises
        `RequestError` where the engine refuses, or where there is none.
        """
        line = self._line()
        call = CompletionCall(
            msgspec.structs.replace(order, id=line.number()), withdraw=line.withdraw
        )
        line.begin(call)
        try:
            call.admission(order.timeout + self._patience, look)
        except BaseException:
            call.cancel()
            raise
        return call

    @overload
    def ask(self, part: Describe, *, timeout: float = ..., look: Look = ...) -> Models: ...
    @overload
    def ask(self, part: Tokenise, *, timeout: float = ..., look: Look = ...) -> Tokens: ...
    @overload
    def ask(
        self, part: Detokenise | AskMetrics, *, timeout: float = ..., look: Look = ...
    ) -> Text: ...
    @overload
    def ask(self, part: ScoreTexts, *, timeout: float = ..., look: Look = ...) -> Scores: ...
    @overload
    def ask(self, part: Embed, *, timeout: float = ..., look: Look = ...) -> Embeddings: ...
    @overload
    def ask(self, part: AskStatus, *, timeout: float = ..., look: Look = ...) -> Status: ...
    def ask(
        self,
        part: Describe | Tokenise | Detokenise | ScoreTexts | Embed | AskStatus | AskMetrics,
        *,
        timeout: float = 30.0,
        look: Look = stay,
    ) -> Models | Tokens | Text | Scores | Embeddings | Status:
        """The answer to a question; raises `RequestError` where it is refused or takes longer.

        `look` is as in `submit`.
        """
        line = self._line()
        call = QuestionCall(Question(id=line.number(), ask=part))
        line.begin(call)
        try:
            return call.answer(timeout, look).body
        except BaseException:
            line.withdraw(call)
            raise

    def tally(
        self,
        route: str,
        method: str,
        status: int,
        seconds: float,
        refusal: TurnedAway | None = None,
    ) -> None:
        """Have an HTTP answer counted: soon, and before the next question is answered.

        `refusal` is given where the engine has not heard of the request.
        """
        self._line().tally((route, method, status, seconds), refusal)

    def close(self) -> None:
        """End what is under way, the connection and the thread; later requests are refused."""
        self._line().close()

    def _line(self) -> "_Line":
        pid = os.getpid()
        line = self._lines.get(pid)
        if line is None:
            # One call of the interpreter: of several threads that come first, all get the same.
            new = _Line(self._path, self._start, self._settings, self._patience)
            line = self._lines.setdefault(pid, new)
            for other in [number for number in list(self._lines) if number != pid]:
                inherited = self._lines.pop(other, None)
                if inherited is not None:
                    inherited.abandon()
        return line


class _Line:
    """One process's share of a link: its connection, its thread and what is under way.

    A call is sent by the thread that begins it if there is a connection, else by the reading thread
    as soon as there is. Whoever takes a call out of `_calls` hands over its end: one thread can.
    """

    def __init__(
        self,
        path: Path,
        start: Callable[[], None] | None,
        settings: str,
        patience: float,
    ) -> None:
        self._path = path
        self._start = start
        self._settings = settings
        self._patience = patience
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._thread: threading.Thread | None = None
        self._dialled: EngineConnection | None = None
        """The socket in use, from before the engine's greeting."""
        self._connection: EngineConnection | None = None
        """The same, from the greeting to the loss."""
        self._engine: int | None = None
        """The number of the process that was connected last."""
        self._hit: set[int] = set()
        """Calls that were under way when it was lost."""
        self._closing = threading.Event()
        self._tally = Tally(answers=[], refusals=[])
        """What is counted and was not sent yet."""
        self._tallied = time.monotonic()

    def number(self) -> int:
        """A number that no other call of this process has."""
        return next(self._numbers)

    def open(self) -> None:
        """Connect, if nothing has yet."""
        with self._lock:
            self._need_thread()

    def begin(self, call: Call) -> None:
        """Send a call, now or once there is a connection; raises `RequestError` if it cannot be."""
        try:
            frame = frames.encode(call.message())
        except FrameError as error:
            raise invalid(str(error)) from error
        with self._lock:
            self._need_thread()
            self._calls[call.id] = call
            connection = self._connection
        if connection is not None:
            self._send(connection, call, frame)

    def withdraw(self, call: Call) -> None:
        """Tell the engine that nobody waits for this any more; texts then end soon."""
        with self._lock:
            connection = self._connection
            if isinstance(call, QuestionCall) or connection is None:
                known = self._calls.pop(call.id, None) is not None
            else:
                known = call.id in self._calls
        if known and connection is not None:
            connection.send(frames.encode(Cancel(id=call.id)))
        elif known:
            call.fail(absent().problem)

    def tally(self, answer: tuple[str, str, int, float], refusal: TurnedAway | None) -> None:
        """Keep an answer for the next tally."""
        with self._lock:
            if len(self._tally.answers) < TALLY_LIMIT:
                self._tally.answers.append(answer)
                if refusal is not None:
                    self._tally.refusals.append(refusal)

    def close(self) -> None:
        """End everything, for good."""
        with self._lock:
            self._closing.set()
            connection, dialled, thread = self._connection, self._dialled, self._thread
        if connection is not None:
            self._send_tallies(connection)
        if dialled is not None:
            dialled.break_off()
        if thread is not None:
            thread.join()

    def abandon(self) -> None:
        """Let go of the socket of the process that this one was forked from.

        No lock is taken: one that another thread held at the fork is held for ever.
        """
        if self._dialled is not None:
            self._dialled.abandon()

    def _need_thread(self) -> None:
        """Start the thread if it does not run, by the owner of the lock."""
        if self._closing.is_set():
            raise closed()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="link", daemon=True)
            self._thread.start()

    def _send(self, connection: EngineConnection, call: Call, frame: bytes) -> None:
        if isinstance(call, QuestionCall):
            self._send_tallies(connection)
        connection.send(frame)
        if call.is_cancelled:
            # The cancellation may have overtaken the order, and been passed over.
            connection.send(frames.encode(Cancel(id=call.id)))

    def _send_tallies(self, connection: EngineConnection) -> None:
        with self._lock:
            tally, self._tally = self._tally, Tally(answers=[], refusals=[])
        if tally.answers:
            connection.send(frames.encode(tally))

    # The thread

    def _run(self) -> None:
        """Connect, read and connect again, until there is no engine or no need of one."""
        problem = failed("The worker lost the engine through a defect of its own.").problem
        try:
            while self._connect():
                self._read()
            problem = (closed() if self._closing.is_set() else absent()).problem
        finally:
            with self._lock:
                self._thread = None
                calls = list(self._calls.values())
                self._calls.clear()
            for call in calls:
                call.fail(problem)

    def _connect(self) -> bool:
        """Dial until an engine answers, and send it what is under way; whether one did."""
        deadline = time.monotonic() + self._patience
        pause = 0.01
        while not self._closing.is_set():
            try:
                if self._start is not None:
                    self._start()
                connection = self._dial(deadline)
                break
            except (OSError, FrameError, CharloomError, RequestError) as error:
                if time.monotonic() + pause > deadline:
                    _log.error("No engine answers on %s: %s", self._path, error)
                    return False
            self._closing.wait(pause)
            pause = min(2 * pause, 0.5)
        else:
            return False
        cut: list[Call] = []
        with self._lock:
            self._connection = connection
            if connection.engine == self._engine:
                cut = [self._calls.pop(number) for number in self._hit & self._calls.keys()]
            self._engine = connection.engine
            calls = list(self._calls.values())
        for call in cut:
            call.fail(cut_off().problem)
        for call in calls:
            self._send(connection, call, frames.encode(call.message()))
        return True

    def _dial(self, deadline: float) -> EngineConnection:
        """Connect and greet; raises `OSError` or `FrameError` where it comes to nothing."""
        connection = EngineConnection(self._path, send_timeout=self._patience)
        with self._lock:
            self._dialled = connection
        if self._closing.is_set():
            connection.break_off()  # `close` may have come before there was one to break off
        try:
            connection.greet(deadline - time.monotonic(), self._settings)
        except BaseException:
            with self._lock:
                self._dialled = None
            connection.close()
            raise
        return connection

    def _read(self) -> None:
        """Hand out what comes until the connection is lost, and end what does not survive that."""
        connection = self._connection
        assert connection is not None, "`_connect` made one"
        lost: list[Call] = []
        try:
            while True:
                for message in connection.receive(TICK):
                    self._hand_out(connection, message)
                if time.monotonic() - self._tallied >= TICK:
                    self._tallied = time.monotonic()
                    self._send_tallies(connection)
        except (OSError, FrameError) as error:
            if not self._closing.is_set():
                _log.warning("The engine is lost, with %d calls: %s", len(self._calls), error)
        finally:
            # In one go with the loss: what is begun from now on has seen no crash.
            with self._lock:
                self._dialled = self._connection = None
                if not self._closing.is_set():
                    lost = [call for call in self._calls.values() if not call.survive()]
                for call in lost:
                    del self._calls[call.id]
                self._hit = set(self._calls)
            connection.close()
            for call in lost:
                call.fail(crashed().problem)

    def _hand_out(self, connection: EngineConnection, message: FromEngine) -> None:
        """Give a message to the call that it is for, if anybody still waits for it."""
        if isinstance(message, Deltas):
            for delta in message.parts:
                call = self._calls.get(delta.id)
                if isinstance(call, CompletionCall):
                    call.advance(delta)
        elif isinstance(message, Accepted):
            call = self._calls.get(message.id)
            problem = call.accept(message) if isinstance(call, CompletionCall) else None
            if call is not None and problem is not None:
                connection.send(frames.encode(Cancel(id=message.id)))
                if self._calls.pop(message.id, None) is not None:
                    call.fail(problem)
        elif isinstance(message, Welcome):
            raise FrameError("the engine greeted twice")
        else:
            call = self._calls.pop(message.id, None)
            if call is None:
                return
            if isinstance(message, Refused):
                call.fail(message.problem)
            elif isinstance(message, Ended):
                assert isinstance(call, CompletionCall), "only completions end"
                call.end(message)
            else:
                assert isinstance(call, QuestionCall), "only questions are answered"
                call.end(message)
