"""How much of a worker is taken by requests that may last: of its threads, and of its memory.

A request holds its thread until its last byte has gone, and a client may begin as many as it likes.
So a worker counts those under way and puts their number into the environment of each; beyond a
limit they are refused at once, and the threads that are left answer the probes, which ask whether
the service is well and never wait for long. A server that puts none, such as a test's client, is
never full.

What a body became, texts and lists, lives as long as its request, so its bytes count as long.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flask import request

KEY = "charloom.load"
"""Its name in a WSGI environment."""

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that are answered whatever else is under way."""


class Load:
    """Counts what is under way in one worker, of which `limit` may be."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._count = 0
        self._bytes: dict[int, int] = {}
        """Of the bodies that are counted, by the number of the thread that answers."""
        self._lock = threading.Lock()

    @property
    def is_beyond(self) -> bool:
        """Whether more is under way than may be, the current request included."""
        return self._count > self._limit

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count the request that this thread answers in the meantime, with what it holds."""
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                self._bytes.pop(threading.get_ident(), None)

    def hold(self, size: int, *, limit: int) -> bool:
        """Count these bytes for the request that this thread answers, instead of those before; not
        so, and False, where all would be more than `limit`.
        """
        me = threading.get_ident()
        with self._lock:
            others = sum(self._bytes.values()) - self._bytes.get(me, 0)
            fits = others + size <= limit
            if fits:
                self._bytes[me] = size
        return fits


def current() -> Load:
    """That of the worker which answers this request."""
    load = request.environ.get(KEY)
    return load if isinstance(load, Load) else Load(math.inf)
