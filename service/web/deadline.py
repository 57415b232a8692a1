"""A socket whose reads share one deadline, and which remembers when its client may ask again."""

import math
import socket
import time


class DeadlineSocket(socket.socket):
    """A socket that receives until a deadline, and may have to rest."""

    __slots__ = ("_deadline", "rests_until")

    def __init__(
        self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None
    ) -> None:
        super().__init__(family, kind, proto, fileno)
        self._deadline = math.inf
        self.rests_until = -math.inf
        """When its next request is looked at, by `time.monotonic`; probes are at once."""

    def receive_within(self, seconds: float) -> None:
        """Let all that is received from now on arrive in this time; a nearer deadline stays."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def receive_whenever(self) -> None:
        """Lift the deadline: a request has arrived."""
        self._deadline = math.inf

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """As `socket.recv`; raises TimeoutError past the deadline."""
        if self._deadline == math.inf:
            return super().recv(size, flags)
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        before = self.gettimeout()
        self.settimeout(left)
        try:
            return super().recv(size, flags)
        finally:
            self.settimeout(before)
