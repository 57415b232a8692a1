"""Texts over server-sent events, as they are written.

    data: {... "choices":[{"index":0,"text":"T",...}]}

    : still here

    data: {"error":{...}}

    data: [DONE]

Each event has what is new of one choice; choices that come together leave in one write. When and
how much is the engine's decision. A stream that fails says so in an event, since one that merely
breaks off looks finished to OpenAI's clients, and [DONE] ends every one. There is never an `id:`
or `retry:`, after which clients take a comment for an event.

A chunk's constant part is encoded once for each stream: an event costs 3 microseconds here, of 10
in all, with gunicorn and the system.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from flask import Response

from service.errors import Problem, RequestError, failed
from service.messages import Delta, Ended
from service.web.body import dump
from service.web.exchange import Exchange
from service.web.waiting import ClientGone, Waiting
from service.web.wire.errors import envelope
from service.web.wire.writing import Reply

HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",  # nginx would collect the events
}

HEARTBEAT = b": still here\n\n"

DONE = b"data: [DONE]\n\n"

_log = logging.getLogger(__name__)


def respond(
    waiting: Waiting,
    reply: Reply,
    exchange: Exchange,
    *,
    heartbeat: float,
    clock: Callable[[], float] = time.monotonic,
) -> Response:
    """The answer that streams what comes, a comment after each `heartbeat` seconds of silence."""
    response = Response(_stream(waiting, reply, exchange, heartbeat, clock), headers=HEADERS)

    def close() -> None:
        # Also where the server never asked for the first event, when the generator has no finally.
        if not waiting.is_over and exchange.outcome is None:
            exchange.outcome = "cancelled"
        waiting.close()

    response.call_on_close(close)
    return response


def _stream(
    waiting: Waiting,
    reply: Reply,
    exchange: Exchange,
    heartbeat: float,
    clock: Callable[[], float],
) -> Iterator[bytes]:
    """The events; everything that can go wrong becomes one."""
    try:
        chunks = _Chunks(reply)
        sent = clock()
        while not isinstance(event := waiting.next(heartbeat), Ended):
            if event is not None:
                yield chunks.encode(event)
                sent = clock()
            elif clock() - sent >= heartbeat:
                yield HEARTBEAT
                sent = clock()
        exchange.completion_tokens = event.completion_tokens
        if event.problem is not None:
            raise RequestError(event.problem)
        last = reply.last(event)
        if last is not None:
            yield b"data: %b\n\n" % dump(last)
    except ClientGone:
        return
    except RequestError as error:
        exchange.outcome = "failed"
        yield _tell(error.problem)
    except Exception:
        exchange.outcome = "failed"
        _log.exception("A stream failed, request %s", exchange.id)
        yield _tell(
            failed(
                f"The service failed at this; its log tells why, under the id {exchange.id}."
            ).problem
        )
    yield DONE


class _Chunks:
    """Writes chunks around one constant part."""

    def __init__(self, reply: Reply) -> None:
        # Inside a string of JSON the quotes would be escaped, so this stands there only once.
        head, middle, tail = dump(reply.frame()).partition(b'"choices":[')
        self._choice = reply.choice
        self._before = b"data: " + head + middle
        self._after = tail + b"\n\n"

    def encode(self, deltas: Sequence[Delta]) -> bytes:
        """An event for each delta."""
        return b"".join(
            [self._before + dump(self._choice(delta)) + self._after for delta in deltas]
        )


def _tell(problem: Problem) -> bytes:
    """A problem as an event."""
    return b"data: %b\n\n" % dump(envelope(problem))
