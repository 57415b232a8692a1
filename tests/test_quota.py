import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import OptionError
from service.engine.quota import LOOK_INTERVAL, MINUTE, REST, MemoryWindows, Quota
from service.errors import Problem, RequestError


class Budget:
    """A quota whose minutes pass when they are told to, and what its charges came to."""

    def __init__(self, requests: int = 0, tokens: int = 0, now: float = 1000.0) -> None:
        self.now = now
        self.windows = MemoryWindows(lambda: self.now)
        self._quota = Quota("memory://", requests, tokens, never, windows=self.windows)

    def charge(self, owner: str = "a", tokens: int = 1) -> Problem | None:
        """Why a charge was refused, None where it was not."""
        answers: list[RequestError | None] = []
        self._quota.charge(owner, tokens, answers.append)
        (answer,) = answers
        return None if answer is None else answer.problem


def never(work: Callable[[], Any], then: Callable[[Any], None]) -> None:
    """No other thread has to be asked about counters that are at hand."""
    raise AssertionError(f"{work} for {then}")


def test_without_limits_nothing_is_refused() -> None:
    """0 stands for no limit."""
    budget = Budget()
    assert [budget.charge(tokens=10**9) for _ in range(100)] == [None] * 100


def test_the_process_s_own_counters_go_by_the_same_clock() -> None:
    """A minute passes for them when it passes for the quota."""
    now = 0.0
    answers: list[RequestError | None] = []
    quota = Quota("memory://", 1, 0, never, clock=lambda: now)
    for later in (0.0, 1.0, 10.0 * MINUTE):
        now += later
        quota.charge("a", 1, answers.append)
    first, second, third = answers
    assert (first, third) == (None, None)
    assert second is not None


def test_requests_are_counted_by_owner() -> None:
    """What one owner used up is still there for another."""
    budget = Budget(requests=2)
    assert budget.charge("a") is None
    assert budget.charge("a") is None
    problem = budget.charge("a")
    assert problem is not None
    assert (problem.status, problem.code) == (429, "rate_limit_exceeded")
    assert "2 requests" in problem.message
    assert budget.charge("b") is None


def test_tokens_are_counted_by_cost() -> None:
    """A charge may take what is left to the last token, and no more."""
    budget = Budget(tokens=100)
    assert budget.charge(tokens=60) is None
    problem = budget.charge(tokens=41)
    assert problem is not None
    assert "100 tokens" in problem.message
    assert budget.charge(tokens=40) is None
    assert budget.charge(tokens=1) is not None


def test_a_request_beyond_a_whole_minute_is_told_that_waiting_does_not_help() -> None:
    """It is refused for good, and charged nothing."""
    budget = Budget(tokens=100)
    problem = budget.charge(tokens=101)
    assert problem is not None
    assert (problem.status, problem.retry_after) == (400, None)
    assert "101 tokens" in problem.message
    assert budget.charge(tokens=100) is None


def test_a_refused_charge_takes_nothing_from_either_budget() -> None:
    """Refused for its tokens, a request is not counted as one either, and the other way round."""
    budget = Budget(requests=2, tokens=100)
    assert budget.charge(tokens=90) is None
    assert budget.charge(tokens=20) is not None
    assert budget.charge(tokens=1) is None
    assert budget.charge(tokens=1) is not None
    budget.now += 2 * MINUTE
    assert budget.charge(tokens=100) is None


def test_a_budget_comes_back_little_by_little() -> None:
    """Half a minute after the minute in which all was taken, half is there again."""
    budget = Budget(tokens=100, now=1200.0)
    assert budget.charge(tokens=100) is None
    budget.now += 1.5 * MINUTE
    assert budget.charge(tokens=51) is not None
    assert budget.charge(tokens=50) is None


@given(charges=st.lists(st.tuples(st.floats(0, 50), st.integers(1, 100)), min_size=1, max_size=30))
def test_the_wait_that_is_named_is_the_shortest(charges: list[tuple[float, int]]) -> None:
    """Whoever waits as long as told is admitted, and a moment earlier is not."""
    budget = Budget(tokens=100)
    for pause, tokens in charges:
        budget.now += pause
        problem = budget.charge(tokens=tokens)
        if problem is None:
            continue
        assert problem.retry_after is not None
        assert 0 < problem.retry_after <= 2 * MINUTE
        assert str(math.ceil(problem.retry_after)) in problem.message
        budget.now += problem.retry_after - 1e-3
        if problem.retry_after > 2e-3:
            assert budget.charge(tokens=tokens) is not None
        budget.now += 2e-3
        assert budget.charge(tokens=tokens) is None


@given(charges=st.lists(st.tuples(st.floats(0, 90), st.integers(1, 60)), min_size=1, max_size=60))
def test_no_minute_takes_more_than_its_sliding_share(charges: list[tuple[float, int]]) -> None:
    """What counts of the window before and what was taken in this one never exceed the limit."""
    budget = Budget(tokens=100)
    taken: list[tuple[int, int]] = []
    for pause, tokens in charges:
        budget.now += pause
        if budget.charge(tokens=tokens) is None:
            taken.append((int(budget.now // MINUTE), tokens))
        window, share = int(budget.now // MINUTE), 1 - budget.now % MINUTE / MINUTE
        this = sum(amount for when, amount in taken if when == window)
        before = sum(amount for when, amount in taken if when == window - 1)
        assert this + share * before <= 100 + 1e-6


def test_owners_who_stay_away_are_forgotten() -> None:
    """Memory is taken by the owners of the last two minutes alone."""
    budget = Budget(requests=10)
    for number in range(1000):
        budget.charge(f"addr:{number}")
    assert len(budget.windows) == 1000
    budget.now += 2 * MINUTE
    budget.charge("addr:new")
    assert len(budget.windows) == 1


def test_a_storage_elsewhere_is_asked_in_another_thread() -> None:
    """The answer comes when the work is done, and not before."""
    works: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    answers: list[RequestError | None] = []
    quota = Quota(
        "redis://nowhere",
        1,
        0,
        lambda work, then: works.append((work, then)),
        windows=MemoryWindows(),
    )
    quota.charge("a", 1, answers.append)
    quota.charge("a", 1, answers.append)
    assert answers == []
    for work, then in works:
        then(work())
    assert answers[0] is None
    assert answers[1] is not None
    assert answers[1].problem.status == 429


def test_a_storage_that_does_not_answer_admits_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be counted is put off, and the log says why."""
    answers: list[RequestError | None] = []

    def run(work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        try:
            then(work())
        except Exception as error:
            then(error)

    quota = Quota("redis://127.0.0.1:1", 1, 0, run)  # nobody listens there
    quota.charge("a", 1, answers.append)
    (answer,) = answers
    assert answer is not None
    assert (answer.problem.status, answer.problem.code) == (503, "limits_unavailable")
    assert "127.0.0.1" not in answer.problem.message
    assert "does not answer" in caplog.text


class Remote(MemoryWindows):
    """Counters elsewhere, which may be out of reach."""

    is_reached = True
    asked = 0

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Answer, or give up."""
        self.asked += 1
        if not self.is_reached:
            raise ConnectionError(f"{key} within {expiry} seconds")
        return super().get_sliding_window(key, expiry)


class Distance:
    """A quota with such counters, whose other thread works when it is told to."""

    def __init__(self, *, is_reached: bool = True) -> None:
        self.now = 0.0
        self.windows = Remote(lambda: self.now)
        self.windows.is_reached = is_reached
        self.works: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self.quota = Quota(
            "redis://nowhere",
            100,
            0,
            lambda work, then: self.works.append((work, then)),
            windows=self.windows,
            clock=lambda: self.now,
        )
        self.codes: list[str | None] = []
        """What the charges came to."""

    def charge(self, owner: str = "a") -> None:
        """Ask for a request's worth."""
        self.quota.charge(
            owner,
            1,
            lambda answer: self.codes.append(None if answer is None else answer.problem.code),
        )

    def work(self) -> None:
        """Let the other thread do what there is to do."""
        for work, then in self.works:
            try:
                then(work())
            except ConnectionError as error:
                then(error)
        self.works.clear()


def test_a_storage_that_failed_is_left_in_peace_for_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither who comes then nor who waits in line by then has to wait for the same refusal."""
    distance = Distance(is_reached=False)
    distance.charge("a")
    distance.charge("b")
    distance.work()
    distance.charge("c")
    assert not distance.works
    assert distance.windows.asked == 1
    assert distance.codes == ["limits_unavailable"] * 3
    assert caplog.text.count("does not answer") == 1
    distance.now += REST
    distance.charge("d")
    distance.work()
    assert distance.windows.asked == 2


def test_a_storage_is_away_or_not_as_the_last_request_found() -> None:
    """Nothing is asked for the sake of telling it."""
    distance = Distance()
    for is_reached in (True, False, True):
        distance.now += REST
        distance.windows.is_reached = is_reached
        distance.charge()
        distance.work()
        assert distance.quota.is_away is not is_reached
    assert distance.codes == [None, "limits_unavailable", None]


def test_a_storage_that_is_back_is_found_without_requests(caplog: pytest.LogCaptureFixture) -> None:
    """While it is away it is looked at, once a second and one look at a time, and the log tells of
    its going and coming alone.
    """
    caplog.set_level(logging.INFO, "charloom.engine")
    distance = Distance(is_reached=False)
    distance.charge()
    distance.work()
    for _ in range(3):
        distance.quota.poll()
        assert not distance.works, "it rests"
        distance.now += REST
        distance.quota.poll()
        distance.now += REST
        distance.quota.poll()
        assert len(distance.works) == 1
        distance.work()
    assert distance.quota.is_away
    distance.now += REST
    distance.windows.is_reached = True
    distance.quota.poll()
    distance.work()
    assert not distance.quota.is_away
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


def test_a_storage_of_which_nothing_was_heard_is_looked_at() -> None:
    """At the start and after a while of silence, so that its loss is known before a request comes;
    what requests find is as good.
    """
    distance = Distance()
    distance.quota.poll()
    distance.work()
    assert distance.windows.asked == 1
    distance.now += LOOK_INTERVAL - 1
    distance.charge()
    distance.work()
    asked = distance.windows.asked
    distance.now += LOOK_INTERVAL - 1
    distance.quota.poll()
    assert not distance.works
    distance.now += 1
    distance.windows.is_reached = False
    distance.quota.poll()
    distance.work()
    assert distance.windows.asked == asked + 1
    assert distance.quota.is_away


@pytest.mark.parametrize(("uri", "requests"), [("memory://", 1), ("redis://nowhere", 0)])
def test_a_storage_that_is_not_needed_is_not_looked_at(uri: str, requests: int) -> None:
    """Neither the process's own counters nor some that nothing is counted by."""
    quota = Quota(uri, requests, 0, never, windows=Remote())
    quota.poll()
    assert not quota.is_away


@pytest.mark.parametrize("uri", ["nowhere://:secret@host", "no address secret"])
def test_a_storage_that_there_is_not_is_named(uri: str) -> None:
    """The sentence names the setting and what it may be, and keeps its password to itself."""
    with pytest.raises(
        OptionError, match=r"CHARLOOM_LIMITS_STORAGE names .*give memory://"
    ) as caught:
        Quota(uri, 1, 0, never)
    assert "secret" not in str(caught.value)
