"""What is written down of each exchange: one log line and one count, and the id to find it by.

    answered method=POST route=/v1/completions status=200 seconds=0.0123 id=... owner=... model=...

The line comes when the answer's last byte has been handed over, so a stream's tells its whole
length and what became of it. It names the route, not the path that a client made up, and no text of
a prompt unless the settings ask for it. What the server answers by itself, since the request is no
HTTP or came too slowly, is written down in the same form.
"""

import re
import secrets
import time
from collections.abc import Callable
from http import HTTPMethod

import structlog
from flask import Response, g, request

from service.errors import Problem
from service.link import Link
from service.settings import Settings
from service.web.access import owner
from service.web.exchange import Exchange, exchange
from service.web.load import PROBES

PROMPT_LIMIT = 200
"""Characters of a prompt, or of an unknown path, that are written down."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset(HTTPMethod)
_UNKNOWN = "unknown"
"""The route of a request that no rule fits."""


class Journal:
    """Opens and closes the exchanges of an application."""

    def __init__(
        self, settings: Settings, link: Link, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._tells_prompts = settings.log_prompts
        self._tally = link.tally
        self._clock = clock
        self._log = structlog.get_logger("service.http").bind()

    def open(self) -> None:
        """Begin the current request's exchange; runs before everything else."""
        given = request.environ.get("HTTP_X_REQUEST_ID", "")
        g.exchange = Exchange(id=given if _ID.fullmatch(given) else make_id(), began=self._clock())

    def follow(self, response: Response) -> Response:
        """Name the exchange in its answer, and write it down when the answer has been sent."""
        this = exchange()
        response.headers["x-request-id"] = this.id
        rule = request.url_rule
        sender = owner()
        method = _known(request.method)
        route = _UNKNOWN if rule is None else rule.rule
        path = request.path if rule is None else None
        status = response.status_code  # not the answer itself: it holds `close`, and all would stay
        # Machines ask these every few seconds.
        log = self._log.debug if route in PROBES else self._log.info

        def close() -> None:
            seconds = self._clock() - this.began
            fields = {
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                "id": this.id,
                "owner": sender,
                "path": None if path is None else path[:PROMPT_LIMIT],
                "model": this.model,
                "prompt_tokens": this.prompt_tokens,
                "completion_tokens": this.completion_tokens,
                "outcome": this.outcome,
            }
            if self._tells_prompts and this.prompt is not None:
                fields["prompt"] = this.prompt[:PROMPT_LIMIT]
            log("answered", **{name: value for name, value in fields.items() if value is not None})
            self._tally(route, method, status, seconds, this.refusal)

        response.call_on_close(close)
        return response

    def note(self, this: Exchange, method: str, problem: Problem) -> None:
        """Write down an answer that the application knows nothing of: the server gave it."""
        method = _known(method)
        seconds = self._clock() - this.began
        self._log.info(
            "answered",
            method=method,
            route=_UNKNOWN,
            status=problem.status,
            seconds=round(seconds, 6),
            id=this.id,
            code=problem.code,
        )
        self._tally(_UNKNOWN, method, problem.status, seconds)


def make_id() -> str:
    """An id for an exchange whose client gave none."""
    return f"req_{secrets.token_hex(12)}"


def _known(method: str) -> str:
    """The method, or one name for all that clients make up."""
    return method if method in _METHODS else "OTHER"
