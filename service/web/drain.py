"""Whether the process that answers a request is on its way out, and when it has to be gone.

A worker that is told to stop closes its door at once; what it is answering may go on for the time
of the setting `drain`. It puts a `Drain` into the environment of each request, so that a route can
turn new work away and a stream can end in good order while it runs. A server that puts none, such
as a test's client, never drains.
"""

import math
from dataclasses import dataclass

from flask import request

KEY = "charloom.drain"
"""Its name in a WSGI environment."""


@dataclass(kw_only=True, slots=True)
class Drain:
    """One worker's way out."""

    deadline: float = math.inf
    """When every answer must have ended, by `time.monotonic`; infinite while the worker stays."""

    @property
    def is_on(self) -> bool:
        """Whether the worker takes no new work."""
        return self.deadline != math.inf


def current() -> Drain:
    """That of the worker which answers this request."""
    drain = request.environ.get(KEY)
    return drain if isinstance(drain, Drain) else Drain()
