"""A client's connection, as gunicorn's threads and event loop see it.

gunicorn gives a thread to whoever connects and lets it wait for ever: for the end of the request's
head, for its body, for the client to take the answer. A few hundred idle clients then hold every
thread. Here the event loop gathers the head, which costs no thread, a thread waits for the body
until a deadline and for the client to take something only so long; and no close waits at all.

gunicorn also says in an answer's head that the connection stays, and then closes it where the
application has left more of the body than it cares to read. Here that is known beforehand, and the
little that is left is passed over by the event loop too, before it gathers the next head.
"""

import errno
import math
import socket
import struct
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any

from gunicorn import util
from gunicorn.http import Request as ParsedRequest
from gunicorn.http import RequestParser
from gunicorn.http.body import LengthReader
from gunicorn.workers.gthread import TConn

from service.web.deadline import DeadlineSocket
from service.web.drain import Drain

HEAD_LIMIT = 32 << 10
"""Bytes of a request's head, as large as nginx lets it become by default."""

UNSENT = 32 << 10
"""Bytes that the system takes ahead of what the network carries, so that a send soon waits for a
client that has stopped reading, whatever the size of the system's buffers.
"""

UNREAD = 64 << 10
"""Bytes of a body that are read for nothing but to keep its connection."""

_END = b"\r\n\r\n"


class Head(Enum):
    """What is there of a request's head."""

    NONE = "none"
    """Nothing; but the last body, which it follows, is over."""
    PARTIAL = "partial"
    COMPLETE = "complete"
    TOO_LONG = "too long"
    LOST = "lost"


class ClientSocket(DeadlineSocket):
    """A socket that gathers a request's head without waiting, and sends with patience.

    `recv` gives first what was gathered. `sendall` raises BrokenPipeError, which gunicorn and the
    application take for a client that left, where for `patience` seconds nothing could be sent; it
    then resets the connection, so that the system forgets what it still holds.
    """

    __slots__ = ("_gathered", "_owed", "_patience", "began")

    began: float
    """When the request that it is at began, by `time.perf_counter`."""

    def __init__(self, accepted: socket.socket, patience: float) -> None:
        """Take over the connection of a socket, which is closed by that."""
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self._gathered = bytearray()
        self._owed = 0
        self._patience = patience
        # The kernel counts, so that a write costs no system call beside itself.
        timeval = struct.pack("@ll", *divmod(math.ceil(patience * 1e6), 10**6))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        if self.family != socket.AF_UNIX:
            self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # events leave at once
            for name, value in (
                ("TCP_NOTSENT_LOWAT", UNSENT),
                # For a client whose machine is gone: nothing it was sent is acknowledged.
                ("TCP_USER_TIMEOUT", math.ceil(patience * 1000)),
            ):
                if hasattr(socket, name):
                    self.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def has_begun(self) -> bool:
        """Whether something of a request has been gathered."""
        return len(self._gathered) > 0

    @property
    def has_more(self) -> bool:
        """Whether the last request's body goes on, or something of the next has been gathered."""
        return self._owed > 0 or self.has_begun

    @property
    def has_to_rest(self) -> bool:
        """Whether the request that was gathered is to wait; one that only looks need not."""
        return self._gathered.startswith(b"POST ") and time.monotonic() < self.rests_until

    def put_back(self, data: bytes, owed: int) -> None:
        """Let these bytes come before those that are still to arrive; the first `owed` of them all
        are the end of a body that nobody reads.
        """
        self._gathered[:0] = data
        self._owed = max(0, owed - len(self._gathered))
        del self._gathered[:owed]

    def gather(self) -> Head:
        """Take what has arrived of a request's head, and not a byte of what follows it; where the
        last body goes on, pass over that alone.

        The socket must not be blocking.
        """
        if _END in self._gathered:
            return Head.COMPLETE  # it was put back
        size, flags = (self._owed, 0) if self._owed else (HEAD_LIMIT, socket.MSG_PEEK)
        try:
            data = socket.socket.recv(self, size, flags)
        except BlockingIOError:
            return Head.PARTIAL
        except OSError:
            return Head.LOST
        if not data:
            return Head.LOST
        if self._owed:
            self._owed -= len(data)
            return Head.PARTIAL if self._owed else Head.NONE
        begun = len(self._gathered)
        self._gathered += data
        end = self._gathered.find(_END, max(0, begun - len(_END) + 1))
        if end >= 0:
            del self._gathered[end + len(_END) :]
        socket.socket.recv(self, len(self._gathered) - begun)
        if end >= 0:
            return Head.COMPLETE
        return Head.PARTIAL if len(self._gathered) < HEAD_LIMIT else Head.TOO_LONG

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As `socket.recv`; raises TimeoutError past the deadline."""
        if self._gathered and not flags:
            data = bytes(self._gathered[:size])
            del self._gathered[:size]
            return data
        return super().recv(size, flags)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """As `socket.sendall`; each part of the data that the client takes renews its time."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.send(rest, flags) :]
        except (BlockingIOError, TimeoutError):
            # SO_SNDTIMEO, or a timeout that the application has set.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.shutdown(socket.SHUT_RDWR)
            raise BrokenPipeError(
                errno.EPIPE, f"the client took nothing for {self._patience:g} seconds"
            ) from None


class Request(ParsedRequest):  # type: ignore[misc] # gunicorn carries no types
    """A request that tells truly, from the head of its answer on, whether its connection stays."""

    def __init__(self, way_out: Drain, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._way_out = way_out

    def should_close(self) -> bool:
        """Whether nothing can follow on its connection; asked when the head is written."""
        if not self.must_close and (self._way_out.is_on or self.owed > UNREAD):
            self.force_close()  # as the head says, even if more of the body should be read yet
        return bool(super().should_close())

    @property
    def owed(self) -> float:
        """Bytes of its body before the next request; infinitely many where nobody knows."""
        reader = self.body.reader
        if self.body.failed:
            return math.inf
        if isinstance(reader, LengthReader):
            return int(reader.length)
        return math.inf if reader.parser else 0  # that of chunks, whose sum is known at their end


class ClientConnection(TConn):  # type: ignore[misc] # gunicorn carries no types
    """One client's connection; `linger` closes it once the client has, without making it wait."""

    sock: ClientSocket
    timeout: float
    """When the event loop ends its wait for this client, by `time.monotonic`."""

    def __init__(
        self,
        cfg: Any,
        sock: ClientSocket,
        peer: Any,
        server: Any,
        linger: Callable[["ClientConnection"], None],
        way_out: Drain,
    ) -> None:
        super().__init__(cfg, sock, peer, server)
        self._linger = linger
        self.parser = RequestParser(cfg, sock, peer)
        self.parser.mesg_class = partial(Request, way_out)
        self.data_ready = True  # a thread that gets it never has to wait for its first byte

    def expect_within(self, seconds: float) -> None:
        """Let the request that begins now arrive in this time, head and body."""
        self.timeout = time.monotonic() + seconds
        self.sock.began = time.perf_counter()
        self.sock.receive_whenever()
        self.sock.receive_within(seconds)

    def rewind(self) -> bool:
        """Give back what was read ahead of the request that was answered; whether its body goes on,
        or the next request has begun.
        """
        request, self.parser.mesg = self.parser.mesg, None  # or a thread would wait for its body
        self.sock.put_back(self.parser.unreader.take_buffered(), int(request.owed))
        return self.sock.has_more

    def close(self, graceful: bool = False) -> None:
        """Close at once, or when the client has: gunicorn's own way holds up the event loop."""
        if graceful:
            self._linger(self)
        else:
            util.close(self.sock)
