"""How much may be open at a time, over all models and workers.

Whatever is open keeps a thread of its HTTP worker waiting, and each worker has threads for all
places and some to spare: so there is always one left that answers a health check. And whatever
tells of tokens one by one takes memory until it is sent: here, in the worker, and again where an
answer is asked for once more after a crash.
"""

from service.engine.peer import Ticket
from service.errors import RequestError, unavailable
from service.messages import NUMBERS_LIMIT

OUTSTANDING_LIMIT = 8 * NUMBERS_LIMIT
"""Numbers of all answers that are not sent yet; as Python's objects they take some 200 MB."""


class Places:
    """Counts what is open, and the numbers of its answers."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0
        self._numbers = 0

    def enter(self) -> RequestError | None:
        """Count one more; gives why it is to be turned away, where there are too many."""
        self._open += 1
        if self._open <= self._limit:
            return None
        return unavailable(
            f"{self._limit} requests are under way or waiting, which is all that may; try again "
            "later.",
            code="queue_full",
        )

    def reserve(self, ticket: Ticket, numbers: int) -> RequestError | None:
        """Count an answer's numbers; gives why not, where there are too many beside others'."""
        if self._numbers > 0 and self._numbers + numbers > OUTSTANDING_LIMIT:
            return unavailable(
                "The answers that are being written hold as many numbers as there is memory for; "
                "try again later, or ask for fewer alternatives or shorter texts.",
                code="busy",
            )
        ticket.numbers = numbers
        self._numbers += numbers
        return None

    def leave(self, ticket: Ticket) -> None:
        """Count one less, and its answer's numbers."""
        self._open -= 1
        self._numbers -= ticket.numbers
