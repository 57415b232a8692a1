"""One connection from an HTTP worker to the engine, from its first message to its loss.

Any thread sends, one receives. Sending never raises: a connection that takes nothing for
`send_timeout` seconds or is gone is broken off, which its receiving thread then finds; there alone
is decided what follows.
"""

import logging
import os
import select
import socket
import threading
import time
from pathlib import Path

from service import frames
from service.frames import FrameReader
from service.messages import VERSION, FromEngine, Hello, Welcome
from service.settings import variable

READ = 1 << 16
"""Bytes of one read; the memory of a larger one would be mapped and unmapped each time."""

_log = logging.getLogger(__name__)


class EngineConnection:
    """A socket on which messages go to and fro; raises `OSError` where nobody listens."""

    def __init__(self, path: Path, *, send_timeout: float) -> None:
        self._sending = threading.Lock()
        self._reader: FrameReader[FromEngine] = FrameReader(FromEngine)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(send_timeout)
            self._socket.connect(os.fspath(path))
        except BaseException:
            self._socket.close()
            raise
        self.engine: int | None = None
        """The number of its process, once it has greeted."""
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    def greet(self, timeout: float, settings: str) -> None:
        """Exchange versions and digests of settings, so that the engine is known to be there.

        The socket may be its supervisor's, who holds it while the engine restarts. Raises `OSError`
        where nobody answers in time, or one of another version or of other settings.
        """
        deadline = time.monotonic() + timeout
        self.send(frames.encode(Hello(version=VERSION, pid=os.getpid(), settings=settings)))
        messages: list[FromEngine] = []
        while not messages:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(f"the engine did not answer within {timeout:g} seconds")
            messages = self.receive(remaining)
        first = messages[0]
        if not isinstance(first, Welcome):
            raise ConnectionError(f"the engine began with {type(first).__name__}")
        self.engine = first.pid
        if first.version != VERSION:
            raise ConnectionError(
                f"the engine speaks version {first.version} of the protocol, this worker "
                f"{VERSION}; stop the service's older processes"
            )
        if first.settings != settings:
            raise ConnectionError(
                "the engine there is another service's, of other settings, models or version; set "
                f"{variable('socket')} to a path of this service's own, or stop that one"
            )

    def send(self, frame: bytes) -> None:
        """Send one frame; where that is not possible, break off."""
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError as error:  # TimeoutError among them
            _log.debug("A frame of %d bytes was not sent: %s", len(frame), error)
            self.break_off()

    def receive(self, timeout: float) -> list[FromEngine]:
        """The messages of one read; none where nothing comes in time.

        Raises `OSError` where the connection is lost, `FrameError` where it carries no messages.
        """
        if not self._readable.poll(timeout * 1000):
            return []
        data = self._socket.recv(READ)
        if not data:
            raise ConnectionResetError("the engine closed the connection")
        return self._reader.push(data)

    def break_off(self) -> None:
        """End it for both sides; whoever sends or receives now finds it lost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("The connection was gone before it was broken off: %s", error)

    def close(self) -> None:
        """Give the socket back, by the receiving thread; a sender is waited for, not cut."""
        self.break_off()
        with self._sending:
            self._socket.close()

    def abandon(self) -> None:
        """Give back a socket inherited by a fork: its parent goes on using the connection."""
        self._socket.close()
