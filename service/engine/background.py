"""Work that would hold up the loop: it is done in threads, and its results come back to the loop.

Opening an engine, encoding megabytes and asking Redis take from milliseconds to seconds; meanwhile
every text in the making would stand still.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")

THREADS = 4


class Background:
    """Threads that come with the first work; `wake` is called in them when a result is there."""

    def __init__(self, wake: Callable[[], None], *, threads: int = THREADS) -> None:
        self._wake = wake
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._done: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.pending = 0
        """How many results are still to be delivered."""

    def run(self, work: Callable[[], Result], then: Callable[[Result | Exception], None]) -> None:
        """Do something in a thread; `deliver` will pass what it returns or raises to `then`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="background")
        self.pending += 1
        self._pool.submit(self._work, work, then)

    def deliver(self) -> None:
        """Pass on the results that have come, in the calling thread."""
        while self.pending:
            try:
                tell = self._done.get_nowait()
            except Empty:
                return
            self.pending -= 1
            tell()

    def close(self) -> None:
        """Wait for the threads to end; what they have not begun is left undone."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _work(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        try:
            result = work()
        except Exception as error:  # whose it is, `then` knows
            result = error
        except BaseException as error:  # a library's panic: whoever waits is told all the same
            result = RuntimeError(f"the work ended with {type(error).__name__}: {error}")
            result.__cause__ = error
        self._done.put(partial(then, result))
        self._wake()
