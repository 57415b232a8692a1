"""One worker's socket: its frames come in, others go out, and nobody waits for anything.

What the socket does not take stays in a buffer. Texts in the making do not go there: jobs keep them
until the buffer has room again, so that a slow worker's deltas grow longer instead of more, and one
large answer does not look like a worker that reads no more.
"""

import socket

from service.frames import FrameReader, encode
from service.messages import FromEngine, FromWorker

READ_AT_ONCE = 1 << 18
"""Bytes that are read before other workers have their turn."""

ROOM = 1 << 20
"""Bytes in the buffer from which on texts wait outside."""

BUFFER_LIMIT = 64 << 20
"""Bytes in the buffer of a worker that is given up: it asks and does not read."""


class Connection:
    """A worker's end of the socket, never blocking."""

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._out = bytearray()
        self._is_broken = False
        self.is_open = True
        self.is_leaving = False
        """Whether it is over as soon as all has been sent."""

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self._peer.fileno()

    def receive(self) -> list[FromWorker] | None:
        """The messages that have come; None at the end of the connection.

        Raises `FrameError` for what is none.
        """
        try:
            data = self._peer.recv(READ_AT_ONCE)
        except BlockingIOError:
            return []
        except OSError:  # reset: the worker has died
            return None
        return self._reader.push(data) if data else None

    def send(self, message: FromEngine) -> None:
        """Put a message into the buffer; raises `FrameError` where it is too long."""
        self._out += encode(message)

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._out:
                del self._out[: self._peer.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # the worker has died
            self._is_broken = True

    @property
    def is_finished(self) -> bool:
        """Whether it is to be closed."""
        return self._is_broken or (self.is_leaving and not self._out)

    @property
    def has_room(self) -> bool:
        """Whether texts may be put into the buffer."""
        return self.is_open and len(self._out) < ROOM

    @property
    def is_stuck(self) -> bool:
        """Whether the socket has not taken everything."""
        return bool(self._out)

    @property
    def is_flooded(self) -> bool:
        """Whether too much is unsent."""
        return len(self._out) > BUFFER_LIMIT

    def close(self) -> None:
        """End the connection; what was not sent is lost."""
        self._out.clear()
        self.is_open = False
        self._peer.close()
