"""One worker's socket: its frames come in, others go out, and nobody waits for anything.

What the socket does not take stays in a buffer. Neither texts in the making nor answers go there
before the buffer has room: so a slow worker's deltas grow longer instead of more, and how much it
has asked for does not make it look like one that reads no more.
"""

import math
import socket

from service.frames import FrameReader, encode
from service.messages import FRAME_LIMIT, FromEngine, FromWorker

READ_AT_ONCE = 1 << 18
"""Bytes that are read before other workers have their turn."""

ROOM = 1 << 20
"""Bytes in the buffer from which on texts and answers wait outside."""

PATIENCE = 30.0
"""Seconds without taking a byte after which a worker is given up: it asks and does not read."""

BUFFER_LIMIT = 2 * FRAME_LIMIT
"""Bytes in the buffer of a worker that is given up at once; what waits outside never fills it."""


class PeerConnection:
    """A worker's end of the socket, never blocking."""

    def __init__(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._reader: FrameReader[FromWorker] = FrameReader(FromWorker)
        self._out = bytearray()
        # When the socket last took something, or there was nothing to take.
        self._moved_at = math.inf
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
        self.put(encode(message))

    def put(self, frame: bytes) -> None:
        """Put a message into the buffer that has been encoded elsewhere."""
        self._out += frame

    def flush(self, now: float) -> None:
        """Send what the socket takes."""
        before = len(self._out)
        try:
            while self._out:
                del self._out[: self._peer.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # the worker has died
            self._is_broken = True
        if not self._out or len(self._out) < before:
            self._moved_at = now

    @property
    def is_finished(self) -> bool:
        """Whether it is to be closed."""
        return self._is_broken or (self.is_leaving and not self._out)

    @property
    def has_room(self) -> bool:
        """Whether texts and answers may be put into the buffer."""
        return self.is_open and len(self._out) < ROOM

    @property
    def is_stuck(self) -> bool:
        """Whether the socket has not taken everything."""
        return bool(self._out)

    def is_flooded(self, now: float) -> bool:
        """Whether its worker has not read for too long, or far too much is unsent."""
        return now - self._moved_at > PATIENCE or len(self._out) > BUFFER_LIMIT

    def close(self) -> None:
        """End the connection; what was not sent is lost."""
        self._out.clear()
        self.is_open = False
        self._peer.close()
