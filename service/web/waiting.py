"""Waiting for the engine on behalf of a client, for as long as it can be answered.

WSGI tells nobody that a client has left: a route that waits would have its texts written to the
end, and a stream notices at its second write. So all waiting, for an admission, for an answer, for
texts, goes by half seconds, and in between is a `Watch`'s look at the client and at how long this
worker stays. Whatever ends the waiting early ends the writing.
"""

import math
import time
from collections.abc import Callable
from typing import Self

from service.call import LOOK, CompletionCall
from service.errors import Problem, RequestError, unavailable
from service.messages import Delta, Ended
from service.web import drain
from service.web.client import Client

FAREWELL = 1.0
"""Seconds before a worker's end in which its last answers leave."""

MARGIN = 15.0
"""Seconds beyond a request's deadline in which the engine tells that it has passed."""


class ClientGone(RequestError):
    """The client has closed its connection; nobody reads this, but logs and counters."""

    def __init__(self) -> None:
        super().__init__(
            Problem(
                status=499,  # nginx's number for it
                type="invalid_request_error",
                code="client_gone",
                message="The client closed the connection before it had its answer.",
            )
        )


class Watch:
    """A look at whether an answer still reaches its client: raises `ClientGone` where nobody is
    there, and `RequestError` where this worker leaves.
    """

    def __init__(
        self, client: Client, way_out: drain.Drain, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._way_out = way_out
        self.clock = clock

    @classmethod
    def current(cls) -> Self:
        """That of the current request."""
        return cls(Client.current(), drain.current())

    def __call__(self) -> None:
        """Look."""
        if self._client.is_gone():
            raise ClientGone
        if self.clock() >= self._way_out.deadline - FAREWELL:
            raise unavailable(
                "The service is shutting down; ask again in a moment.", code="draining"
            )


class Waiting:
    """What comes of a call, until it has ended or is given up; `close` must follow.

    The engine ends each call at its deadline. Where it does not, though `timeout` seconds and a
    margin have passed, it is stuck.
    """

    def __init__(self, call: CompletionCall, watch: Watch, *, timeout: float = math.inf) -> None:
        self._call = call
        self._watch = watch
        now = watch.clock()
        self._next_look = now + LOOK
        self._deadline = now + timeout + MARGIN
        self.is_over = False
        """Whether the call has ended by itself."""

    def next(self, timeout: float) -> list[Delta] | Ended | None:
        """What has come, waiting for it this long or less; None where nothing has.

        Raises what `Watch` does, and `RequestError` where the engine is stuck.
        """
        event = self._call.next(min(timeout, LOOK))
        if isinstance(event, Ended):
            self.is_over = True
            return event
        now = self._watch.clock()
        if now >= self._next_look:
            self._next_look = now + LOOK
            self._watch()
        if event is None and now >= self._deadline:
            raise unavailable(
                "The engine does not answer any more; ask again in a moment.",
                code="engine_unavailable",
            )
        return event

    def close(self) -> None:
        """Have nothing more written."""
        if not self.is_over:
            self._call.cancel()
