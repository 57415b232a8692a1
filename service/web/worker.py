"""The HTTP worker: gunicorn's threads, with bounds on how long a client may keep one.

What differs from `gthread`, and why:

- a connection costs no thread until the head of its request is there, nor once that is answered;
  a head that is not there in `receive_timeout` is answered with 408, one too long with 431
- a client that was told to ask again later, and asks at once, waits for it there (see `client`)
- the rest of a request has what is left of that time, and a client that takes nothing for
  `send_timeout` is cut off (see `arrival`)
- closing never waits in the event loop: gunicorn's own graceful close waits up to two seconds for
  the client, and accepts nobody meanwhile
- the last threads are kept for requests that are answered at once (see `load`)
- what never reaches the application is refused with the service's own error body, and written down
  like all other answers
- told to stop, it closes its door at once, tells the application (see `drain`), and leaves when the
  last answer has been given; Ctrl-C, which reaches all processes of a terminal, is the arbiter's

Held by tests against the real gunicorn, since it overrides what gunicorn promises to nobody.
"""

import errno
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from functools import partial
from heapq import heappop, heappush
from http import HTTPStatus
from typing import Any, ClassVar
from weakref import WeakSet

from flask import Flask
from gunicorn.arbiter import Arbiter
from gunicorn.http import errors
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, ThreadWorker

from charloom.errors import OptionError
from service.errors import Problem, failed
from service.link import Link
from service.settings import Settings
from service.web import context, drain, load
from service.web.arrival import HEAD_LIMIT, ClientConnection, ClientSocket, Head
from service.web.body import dump
from service.web.client import Client
from service.web.exchange import Exchange
from service.web.journal import Journal, make_id
from service.web.wire.errors import envelope

LINGER = 2.0
"""Seconds that a client has to read the end of an answer and close."""

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGQUIT})
"""What the arbiter tells a worker to stop with."""

SPARE_FILES = 64
"""File descriptors that are left to everything but clients."""

RESERVED_THREADS = 16
"""Most threads that only probes are served by."""


def _problem(status: int, code: str, message: str) -> Problem:
    """A request that is refused before any route is known."""
    return Problem(status=status, type="invalid_request_error", code=code, message=message)


_REFUSALS = (
    (
        errors.LimitRequestLine,
        _problem(
            414,
            "request_line_too_long",
            "The request's first line is too long; shorten the path.",
        ),
    ),
    (
        errors.LimitRequestHeaders,
        _problem(
            431,
            "headers_too_large",
            "The headers are too many or too long; send fewer.",
        ),
    ),
    (
        errors.ExpectationFailed,
        _problem(
            417,
            "expectation_failed",
            "The header Expect may say 100-continue alone.",
        ),
    ),
    (
        errors.UnsupportedTransferCoding,
        _problem(
            501,
            "transfer_coding_unsupported",
            "The body may be sent whole or in chunks alone.",
        ),
    ),
    (
        errors.ParseException,
        _problem(
            400,
            "bad_request",
            "The request cannot be read as HTTP/1.1; look at its first lines.",
        ),
    ),
)
"""What is answered to what gunicorn cannot read, by the first that fits.

gunicorn's own words are not repeated, since they quote the request: a header without its colon may
be a key.
"""

_STAYS: Future[bool] = Future()
"""What a thread returns whose connection is to be kept."""
_STAYS.set_result(True)

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Worker(ThreadWorker):  # type: ignore[misc] # gunicorn carries no types
    """One HTTP worker process; `settings` are bound by a subclass, as gunicorn makes workers."""

    settings: ClassVar[Settings]

    alive: bool
    sockets: list[Any]
    worker_connections: int
    wsgi: Application

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """End with a sentence where gunicorn is asked for what is not done here."""
        super().check_config(cfg, log)
        if cfg.is_ssl or cfg.protocol != "http":
            sys.exit("This worker speaks plain HTTP alone; let nginx take TLS (deploy/nginx.conf).")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.drain = drain.Drain()
        self._load = load.Load(self.cfg.threads - min(RESERVED_THREADS, self.cfg.threads // 2))
        self._link: Link | None = None
        self._journal: Journal | None = None
        self._lingering: deque[ClientConnection] = deque()
        self._connections: WeakSet[ClientConnection] = WeakSet()
        self._resting: list[tuple[float, int, ClientConnection]] = []
        """A heap, by the moment at which the request goes on."""

    # Start and stop

    def init_process(self) -> None:
        """Take as many clients as there may be open files."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.worker_connections + SPARE_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            self.worker_connections = min(self.worker_connections, soft - SPARE_FILES)
        super().init_process()

    def init_signals(self) -> None:
        """Leave Ctrl-C to the arbiter, which then says how to stop."""
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # an arbiter may hold them back

    def load_wsgi(self) -> None:
        """Load the application, connect it to its engine, which ends where no worker is, and let
        each request know whether this worker stays.
        """
        try:
            super().load_wsgi()
        except OptionError as error:
            self.log.error("%s", error)
            sys.exit(Arbiter.APP_LOAD_ERROR)  # the arbiter does not try again
        application = self.wsgi
        if isinstance(application, Flask) and context.NAME in application.extensions:
            self._link = application.extensions[context.NAME].link
            self._link.open()
            self._journal = Journal(self.settings, self._link)

        def informed(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            environ[drain.KEY] = self.drain
            environ[load.KEY] = self._load
            return application(environ, start_response)

        self.wsgi = informed

    def run(self) -> None:
        """Serve until told to stop and done."""
        super().run()
        if self._link is not None:
            self._link.close()

    def is_parent_alive(self) -> bool:
        """Whether the arbiter is there; without it this worker drains as if told to."""
        is_alive: bool = super().is_parent_alive()
        self.alive = self.alive and is_alive
        return is_alive

    def set_accept_enabled(self, enabled: bool) -> None:
        """Accept or not; a worker that stops closes its door, so that clients go elsewhere."""
        super().set_accept_enabled(enabled)
        if not self.alive:
            self.drain.deadline = time.monotonic() + self.settings.drain
            for listener in self.sockets:
                listener.close()
            self.sockets = []

    def _cap_keepalive(self, deadline: float) -> None:
        """Let no client without a request hold up the stop."""
        super()._cap_keepalive(deadline)
        for connection in self.pending_conns:
            connection.timeout = min(connection.timeout, deadline)

    # The event loop

    def accept(self, listener: Any) -> None:
        """Take a client in, if one is still there."""
        try:
            accepted, peer = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        client = ClientSocket(accepted, self.settings.send_timeout)
        conn = ClientConnection(
            self.cfg, client, peer, listener.getsockname(), self.linger, self.drain
        )
        self._connections.add(conn)
        self.enqueue_req(conn)

    def enqueue_req(self, conn: ClientConnection) -> None:
        """Give a connection with a whole head to a thread; let another wait for it."""
        conn.expect_within(self.settings.receive_timeout)
        if not self._gather(conn):
            if not self.alive:
                conn.timeout = time.monotonic() + STOP_KEEPALIVE_LINGER
            self.pending_conns.append(conn)
            self.poller.register(
                conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn)
            )

    def finish_request(self, conn: ClientConnection, fs: Future[bool]) -> None:
        """Pass over the rest of a body, or go on with the next request, before all waits."""
        if fs.exception() is None and fs.result() and conn.rewind():
            conn.sock.setblocking(False)
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)

    def on_pending_socket_readable(self, conn: ClientConnection, client: ClientSocket) -> None:
        """Go on with a connection whose head was not all there."""
        self.poller.unregister(client)
        if self._gather(conn):
            self.pending_conns.remove(conn)
        else:
            self.poller.register(
                client, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn)
            )

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Wait for what happens, and not beyond the next end of a rest."""
        if self._resting:
            left = 0.0 if self.drain.is_on else self._resting[0][0] - time.monotonic()
            timeout = min(timeout, max(left, 0.0))
        super().wait_for_and_dispatch_events(timeout)

    def murder_pending(self) -> None:
        """End the waits that have lasted long enough."""
        now = time.monotonic()
        if now > self.drain.deadline:
            self._cut()
        while self._resting and (self._resting[0][0] <= now or self.drain.is_on):
            _, _, conn = heappop(self._resting)
            if Client(conn.sock).is_gone():  # which nobody looked at meanwhile
                self._drop(conn)
            else:
                conn.expect_within(self.settings.receive_timeout)
                super().enqueue_req(conn)
        while self.pending_conns and self.pending_conns[0].timeout <= now:
            conn = self.pending_conns.popleft()
            self.poller.unregister(conn.sock)
            if conn.sock.has_begun:
                seconds = self.settings.receive_timeout
                self._refuse(
                    conn,
                    408,
                    "request_timeout",
                    f"The request did not arrive within {seconds:g} seconds; send it faster.",
                )
            else:
                self._drop(conn)
        while self._lingering and self._lingering[0].timeout <= now:
            conn = self._lingering.popleft()
            self.poller.unregister(conn.sock)
            self._drop(conn)

    def _cut(self) -> None:
        """Break off what has not ended in time: a thread that waits for its client would outlast
        the arbiter's patience, which kills.
        """
        for conn in list(self._connections):
            with suppress(OSError):  # closed meanwhile
                conn.sock.shutdown(socket.SHUT_RDWR)

    def linger(self, conn: ClientConnection) -> None:
        """Close a connection once its client has, or time is up.

        Closed at once, the system would answer what the client still sends with a reset, and that
        may overtake the end of the answer.
        """
        self.nr_conns += 1
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
        except OSError:
            self._drop(conn)  # the client has gone, or was cut off
            return
        if not self._is_spent(conn):
            conn.timeout = time.monotonic() + LINGER
            self._lingering.append(conn)
            self.poller.register(
                conn.sock, selectors.EVENT_READ, partial(self._on_last_words, conn)
            )
        else:
            self._drop(conn)

    def _on_last_words(self, conn: ClientConnection, client: ClientSocket) -> None:
        if self._is_spent(conn):
            self.poller.unregister(client)
            self._lingering.remove(conn)
            self._drop(conn)

    def _is_spent(self, conn: ClientConnection) -> bool:
        """Whether the client has closed; what it sent is thrown away."""
        try:
            return not socket.socket.recv(conn.sock, 1 << 16)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _gather(self, conn: ClientConnection) -> bool:
        """Read on in a connection; whether its wait is over."""
        match conn.sock.gather():
            case Head.NONE:
                super().finish_request(conn, _STAYS)
            case Head.PARTIAL:
                return False
            case Head.COMPLETE if conn.sock.has_to_rest and not self.drain.is_on:
                heappush(self._resting, (conn.sock.rests_until, id(conn), conn))
            case Head.COMPLETE:
                super().enqueue_req(conn)
            case Head.TOO_LONG:
                self._refuse(
                    conn,
                    431,
                    "headers_too_large",
                    f"The request's head has more than {HEAD_LIMIT} bytes; send fewer headers.",
                )
            case Head.LOST:
                self._drop(conn)
        return True

    def _refuse(self, conn: ClientConnection, status: int, code: str, message: str) -> None:
        """Answer a request that gets no thread."""
        this, problem = _exchange(conn.sock), _problem(status, code, message)
        try:
            conn.sock.send(_answer(problem, this.id))
        except OSError:
            self._drop(conn)
        else:
            self.nr_conns -= 1
            conn.close(graceful=True)
        self._note(this, "", problem)

    def _drop(self, conn: ClientConnection) -> None:
        self.nr_conns -= 1
        conn.close()

    # The threads

    def handle_request(self, req: Any, conn: ClientConnection) -> bool:
        """Answer a request, which counts until its last byte has gone if it may last."""
        with nullcontext() if req.path in load.PROBES else self._load.one():
            return bool(super().handle_request(req, conn))

    def _keepalive_after(self, _conn: ClientConnection, keepalive: bool) -> bool:
        """Leave what is left of a body to the event loop (see `finish_request`)."""
        return keepalive

    def handle_error(self, req: Any, client: ClientSocket, _addr: Any, exc: Exception) -> None:
        """Answer what never reached the application, or made it fail, with the one error body."""
        this = _exchange(client)
        is_ours = isinstance(exc, errors.InvalidResponseHeader | errors.InvalidResponseHeaderName)
        problem = next((problem for kind, problem in _REFUSALS if isinstance(exc, kind)), None)
        if problem is None or is_ours:
            self.log.error("Unforeseen error of the server, id=%s", this.id, exc_info=exc)
            problem = failed(
                f"The server failed at this request; its log tells why, under the id {this.id}."
            ).problem
        else:
            self.log.debug("Not HTTP: %s, id=%s", type(exc).__name__, this.id)
        try:
            client.sendall(_answer(problem, this.id))
        except OSError as error:
            self.log.debug("An error was not sent: %s", error)
        self._note(this, "" if req is None else req.method, problem)

    def _note(self, this: Exchange, method: str, problem: Problem) -> None:
        """Have an answer written down that the application knows nothing of."""
        if self._journal is not None:
            self._journal.note(this, method, problem)


def _exchange(client: ClientSocket) -> Exchange:
    """What goes on with a client whose request does not reach the application."""
    return Exchange(id=make_id(), began=client.began)


def _answer(problem: Problem, name: str) -> bytes:
    """A whole HTTP answer to the exchange of this id, after which the connection closes."""
    status = HTTPStatus(problem.status)
    body = dump(envelope(problem))
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"x-request-id: {name}",
        "X-Content-Type-Options: nosniff",
        *(("x-should-retry: false",) if problem.recurs else ()),
    )
    return "".join(f"{line}\r\n" for line in (*head, "")).encode("latin-1") + body
