"""Waiting for the engine on behalf of a client, for as long as it can be answered.

WSGI tells nobody that a client has left: a route that waits would have its texts written to the
end, and a stream notices at its second write. So waiting goes by half seconds, and in between is a
look at the client and at how long this worker stays. Whatever ends the waiting early ends the
writing.
"""

import time
from collections.abc import Callable

from service.errors import Problem, RequestError, unavailable
from service.link import Job
from service.messages import Delta, Ended
from service.web.client import Client
from service.web.drain import Drain

LOOK = 0.5
"""Seconds between two looks."""

FAREWELL = 1.0
"""Seconds before a worker's end in which its last answers leave."""


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


class Waiting:
    """What comes of a job, until it has ended or is given up; `close` must follow."""

    def __init__(
        self,
        job: Job,
        client: Client,
        drain: Drain,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._client = client
        self._drain = drain
        self._clock = clock
        self._next_look = clock() + LOOK
        self.is_over = False
        """Whether the job has ended by itself."""

    def next(self, timeout: float) -> list[Delta] | Ended | None:
        """What has come, waiting for it this long or less; None where nothing has.

        Raises `ClientGone`, and `RequestError` where this worker leaves.
        """
        event = self._job.next(min(timeout, LOOK))
        if isinstance(event, Ended):
            self.is_over = True
            return event
        now = self._clock()
        if now >= self._next_look:
            self._next_look = now + LOOK
            if self._client.is_gone():
                raise ClientGone
            if now >= self._drain.deadline - FAREWELL:
                raise unavailable(
                    "The service is shutting down; ask again in a moment.", code="draining"
                )
        return event

    def close(self) -> None:
        """Have nothing more written."""
        if not self.is_over:
            self._job.cancel()
