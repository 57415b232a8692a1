"""The client at the other end of a connection: whether it is there, and whether it is too slow.

WSGI tells neither. gunicorn puts the connection's socket into the environment, and looking at it
costs one or two system calls. Where there is no socket, as in tests, a client never leaves and is
never slow; a write to it still fails when it is gone.

A limit on single reads bounds no request: a byte every few seconds keeps a thread for hours. So a
server should make its sockets of `DeadlineSocket`, whose reads share one deadline.

A client that was told when to ask again, and does not wait, is as bad: hundreds of them that are
refused and ask at once keep a core busy, and slow down what others have begun. Such a server also
lets a `DeadlineSocket` that rests wait with its next request; a client that waits notices nothing.
"""

import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from flask import request

from service.web.deadline import DeadlineSocket

_LEFT = select.POLLERR | select.POLLHUP | getattr(select, "POLLRDHUP", 0)
"""What a connection shows that the client has closed, also behind bytes it sent ahead: these hide
the end from reads. Where the system has no POLLRDHUP, reads are all there is.
"""


class Client:
    """Who sent the current request, as far as its connection shows."""

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    @classmethod
    def current(cls) -> Self:
        """The client of the request that this thread answers."""
        return cls(request.environ.get("gunicorn.socket"))

    def is_gone(self) -> bool:
        """Whether it has closed the connection, or its half; what it sent ahead stays unread."""
        if self._connection is None:
            return False
        try:
            poll = select.poll()  # select.select would refuse high file descriptors
            poll.register(self._connection, select.POLLIN | _LEFT)
            found = poll.poll(0)
            if not found:
                return False
            if found[0][1] & _LEFT:
                return True
            # The class's own method, because that of TLS sockets takes no flags.
            return socket.socket.recv(self._connection, 1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # reset, or closed at this end
            return True

    def rest(self, seconds: float) -> None:
        """Have the client wait so long for the answer to its next request on this connection."""
        if isinstance(self._connection, DeadlineSocket):
            self._connection.rests_until = time.monotonic() + seconds

    @contextmanager
    def receiving(self, seconds: float) -> Iterator[None]:
        """Let the rest of the request arrive in this time; reads past it raise TimeoutError.

        A socket that is no `DeadlineSocket` gives this time to each single read.
        """
        if isinstance(self._connection, DeadlineSocket):
            self._connection.receive_within(seconds)
            try:
                yield
            finally:
                self._connection.receive_whenever()
        elif self._connection is not None:
            before = self._connection.gettimeout()
            self._connection.settimeout(seconds)
            try:
                yield
            finally:
                self._connection.settimeout(before)
        else:
            yield
