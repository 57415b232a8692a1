"""How much each owner may ask for in a minute: requests, and tokens read and written.

Counting slides: what an owner took in the minute that is nearly over still counts for the share of
it that lies within the last sixty seconds. So nobody gets twice a minute's worth around its turn,
as with fixed minutes, and an owner costs two numbers, not an entry for each token.

One engine serves all HTTP workers, so its own memory counts right; several hosts share a Redis,
through the `limits` library. Its storage in memory is not used: each charge there may start a
thread that goes through all the owners (2 milliseconds for 20,000 of them), beside the one thread
that writes everybody's texts.

What a charge is refused with:

    429   the minute's budget is used up: wait
    400   the request alone is beyond a minute's budget: ask for less
    503   Redis does not answer, and what cannot be counted is not admitted

A service that admits nobody must say so, though none comes to find it out, and nobody comes while
it does. So a Redis that has said nothing for a while is looked at, in the background.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from charloom.errors import OptionError
from service.errors import RequestError, invalid, over_budget, unavailable

MINUTE = 60

MEMORY = "memory://"

REDIS_TIMEOUT = 2.0
"""Seconds that Redis gets to answer."""

REST = 1.0
"""Seconds for which Redis is not asked after it has failed: each request would wait as long for the
same refusal.
"""

LOOK_INTERVAL = 10.0
"""Seconds after which Redis is looked at if no request has asked it; while it is away, `REST`."""

_log = logging.getLogger("charloom.engine")

Result = TypeVar("Result")

Answer = Callable[[RequestError | None], None]
"""Is told None where the budget allowed it, else why not."""

RunInThread = Callable[
    [Callable[[], RequestError | None], Callable[[RequestError | Exception | None], None]], None
]
"""Does work in another thread, and brings what it returns or raises to a function on this one."""


class Windows(Protocol):
    """Counters of two neighbouring minutes, as the storages of `limits` keep them."""

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Count an amount, unless that went beyond the limit."""

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """The last window's count and the seconds that it still counts; this window's, and the
        seconds for which it will.
        """


class MemoryWindows:
    """The counters of one process; what no longer counts is forgotten once a window."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # The numbers of a key's latest window, and of that and the window before the counts.
        self._counts: dict[str, tuple[int, int, int]] = {}
        self._swept = 0

    def __len__(self) -> int:
        return len(self._counts)

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        """Count an amount, unless that went beyond the limit."""
        before, counts_for, count, _ = self.get_sliding_window(key, expiry)
        if before * counts_for / expiry + count + amount > limit:
            return False
        window = int(self._clock() // expiry)
        self._sweep(window)
        self._counts[key] = (window, before, count + amount)
        return True

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """The last window's count and the seconds that it still counts; this window's, and the
        seconds for which it will.
        """
        now = self._clock()
        window = int(now // expiry)
        left = (window + 1) * expiry - now
        latest, before, count = self._counts.get(key, (window, 0, 0))
        if latest == window - 1:
            before, count = count, 0
        elif latest < window - 1:
            before, count = 0, 0
        return before, left, count, left + expiry

    def _sweep(self, window: int) -> None:
        """Forget whoever took nothing in this window and the one before it."""
        if self._swept != window:
            self._swept = window
            self._counts = {
                key: counts for key, counts in self._counts.items() if counts[0] >= window - 1
            }


class Quota:
    """The budgets of all owners; 0 stands for no limit."""

    def __init__(
        self,
        storage_uri: str,
        requests_per_minute: int,
        tokens_per_minute: int,
        run_in_thread: RunInThread,
        *,
        windows: Windows | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`windows` takes the place of what the URI names.

        Raises `OptionError` for a URI that names no storage.
        """
        self._tokens = tokens_per_minute
        self._limits = [
            (unit, limit, RateLimitItemPerMinute(limit, namespace=f"CHARLOOM/{unit}"))
            for unit, limit in (("requests", requests_per_minute), ("tokens", tokens_per_minute))
            if limit
        ]
        self._run_in_thread = run_in_thread
        self._clock = clock
        self.is_away = False
        """Whether the counters did not answer when they were asked last: nobody is admitted."""
        self._rests_until = -math.inf
        self._next_look = -math.inf
        self._is_looking = False
        self._is_local = storage_uri == MEMORY
        self._windows: Windows
        if windows is not None:
            self._windows = windows
        else:
            self._windows = MemoryWindows(clock) if self._is_local else _open(storage_uri)

    def charge(self, owner: str, tokens: int, then: Answer) -> None:
        """Take a request and its tokens from the owner's budget, both or neither.

        `then` is called at once where the counters are at hand, else later.
        """
        if not self._limits:
            then(None)
        elif self._tokens and tokens > self._tokens:
            then(
                invalid(
                    f"The request may cost {tokens} tokens, read and written, which is more than "
                    f"the {self._tokens} that may be asked for in a minute; ask for fewer or "
                    "shorter texts.",
                    code="tokens_beyond_budget",
                )
            )
        elif self._is_local:
            then(self._take(owner, tokens))
        elif self._clock() < self._rests_until:
            then(_silent())
        else:
            self._run_in_thread(
                lambda: self._ask(owner, tokens), lambda answer: then(_explain(answer))
            )

    def poll(self) -> None:
        """Look at counters elsewhere of which nothing was heard for a while."""
        if not self._limits or self._is_local or self._is_looking:
            return
        if self._clock() >= self._next_look:
            self._is_looking = True
            self._run_in_thread(self._look, self._looked)

    def _look(self) -> None:
        """Ask for what no request counts."""
        self._hear(lambda: self._windows.get_sliding_window("CHARLOOM/look", MINUTE))

    def _looked(self, _: object) -> None:
        self._is_looking = False  # what came of it `_hear` has noted

    def _ask(self, owner: str, tokens: int) -> RequestError | None:
        """The same as `_take` where that may fail; whoever is next in line need not wait again."""
        if self._clock() < self._rests_until:
            return _silent()
        return self._hear(lambda: self._take(owner, tokens))

    def _hear(self, ask: Callable[[], Result]) -> Result:
        """What the counters say, with a note of whether they do; in any thread."""
        try:
            answer = ask()
        except Exception as error:  # whatever the storage's client library raises
            self._rests_until = self._next_look = self._clock() + REST
            if not self.is_away:
                _log.error("The storage of budgets does not answer.", exc_info=error)
            self.is_away = True
            raise
        self._next_look = self._clock() + LOOK_INTERVAL
        if self.is_away:
            _log.warning("The storage of budgets answers again.")
        self.is_away = False
        return answer

    def _take(self, owner: str, tokens: int) -> RequestError | None:
        """Look at all limits before anything is counted, so that a refusal costs nothing."""
        charges = [
            (unit, limit, item.key_for(owner), tokens if unit == "tokens" else 1)
            for unit, limit, item in self._limits
        ]
        for unit, limit, key, amount in charges:
            wait = _wait(*self._windows.get_sliding_window(key, MINUTE), limit, amount)
            if wait > 0:
                return _refuse(unit, limit, wait)
        for unit, limit, key, amount in charges:
            if not self._windows.acquire_sliding_window_entry(key, limit, MINUTE, amount):
                return _refuse(unit, limit, 1.0)  # another host was quicker
        return None


def _wait(
    before: int, counts_for: float, count: int, until: float, limit: int, amount: int
) -> float:
    """Seconds until an amount fits, if nothing else is taken meanwhile; 0 where it does now."""
    room = limit - amount
    if before * counts_for / MINUTE + count <= room:
        return 0.0
    if count <= room:
        return counts_for - (room - count) * MINUTE / before
    # In the next window this one's count fades from the whole down to nothing.
    return until - MINUTE + MINUTE * (1 - room / count)


def _explain(answer: RequestError | Exception | None) -> RequestError | None:
    """The answer of a storage that may have failed, with whatever its client library raises."""
    return answer if answer is None or isinstance(answer, RequestError) else _silent()


def _silent() -> RequestError:
    return unavailable(
        "The service cannot count requests at the moment, so it admits none; try again later.",
        code="limits_unavailable",
    )


def _refuse(unit: str, limit: int, wait: float) -> RequestError:
    return over_budget(
        f"The {limit} {unit} that may be asked for in a minute are used up; try again in "
        f"{math.ceil(wait)} seconds.",
        retry_after=wait,
    )


def _open(uri: str) -> Windows:
    """The storage that a URI names, not asked for anything yet; the URI may hold a password."""
    timeouts = {"socket_timeout": REDIS_TIMEOUT, "socket_connect_timeout": REDIS_TIMEOUT}
    try:
        storage = storage_from_string(uri, **timeouts)
    except (ConfigurationError, ValueError) as error:
        raise OptionError(
            [
                "CHARLOOM_LIMITS_STORAGE names no storage that there is; give memory://, or "
                "redis://HOST:PORT, which needs the redis package."
            ]
        ) from error
    if not hasattr(storage, "acquire_sliding_window_entry"):
        raise OptionError(
            [
                "CHARLOOM_LIMITS_STORAGE names a storage that cannot slide its counts; give "
                "memory://, or redis://HOST:PORT."
            ]
        )
    return cast(Windows, storage)
