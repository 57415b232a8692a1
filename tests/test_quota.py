import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.errors import OptionError
from service.engine.quota import MINUTE, REST, MemoryWindows, Quota
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


def test_a_storage_that_failed_is_left_in_peace_for_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither who comes then nor who waits in line by then has to wait for the same refusal."""
    now = [0.0]
    works: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
    answers: list[RequestError | None] = []

    def do_all() -> None:
        for work, then in works:
            try:
                then(work())
            except ConnectionError as error:
                then(error)
        works.clear()

    windows = Silent()
    quota = Quota(
        "redis://nowhere",
        1,
        0,
        lambda work, then: works.append((work, then)),
        windows=windows,
        clock=lambda: now[0],
    )
    quota.charge("a", 1, answers.append)
    quota.charge("b", 1, answers.append)
    do_all()
    quota.charge("c", 1, answers.append)
    assert not works
    assert windows.asked == 1
    codes = [None if answer is None else answer.problem.code for answer in answers]
    assert codes == ["limits_unavailable"] * 3
    assert caplog.text.count("does not answer") == 1
    now[0] += REST
    quota.charge("d", 1, answers.append)
    do_all()
    assert windows.asked == 2


class Silent(MemoryWindows):
    """Counters elsewhere, from where nothing comes back."""

    asked = 0

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        """Give up waiting."""
        self.asked += 1
        raise ConnectionError(f"{key} within {expiry} seconds")


@pytest.mark.parametrize("uri", ["nowhere://:secret@host", "no address secret"])
def test_a_storage_that_there_is_not_is_named(uri: str) -> None:
    """The sentence names the setting and what it may be, and keeps its password to itself."""
    with pytest.raises(
        OptionError, match=r"CHARLOOM_LIMITS_STORAGE names .*give memory://"
    ) as caught:
        Quota(uri, 1, 0, never)
    assert "secret" not in str(caught.value)
