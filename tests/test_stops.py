import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charloom.decoding.stops import StopMatcher, StopTable, stop_table


def cut_by_brute_force(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop completed first, and that stop: look at every beginning in turn."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def held_by_brute_force(text: str, stops: list[str]) -> str:
    """The longest end of the text that begins a stop."""
    ends = (text[start:] for start in range(len(text) + 1))
    return next(end for end in ends if any(stop.startswith(end) for stop in stops) or not end)


def end_by_brute_force(
    pieces: list[str], least: int, stops: list[str]
) -> tuple[str, str | None, int | None]:
    """The text before the first stop completed from piece number `least` on, that stop, and where
    in the whole text it ends.
    """
    text = "".join(pieces)
    first = sum(map(len, pieces[: max(least - 1, 0)])) + 1
    for end in range(first, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest, end
    return text, None, None


few_letters = st.text("ab", max_size=12) | st.text("abc", max_size=30)
some_stops = st.lists(st.text("ab", min_size=1, max_size=4) | st.just("abcab"), max_size=4)


@given(pieces=st.lists(few_letters, max_size=8), stops=some_stops)
def test_stops_are_found_as_by_brute_force(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what leaves is the text before the first stop completed."""
    matcher = StopMatcher(tuple(stops))
    released = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    assert (released, matcher.matched) == cut_by_brute_force("".join(pieces), stops)


@given(text=few_letters, stops=some_stops)
def test_only_what_may_still_match_is_held_back(text: str, stops: list[str]) -> None:
    """After every character all is released but the longest end that begins a stop."""
    matcher = StopMatcher(tuple(stops))
    released = ""
    for end, character in enumerate(text, start=1):
        released += matcher.push(character)
        if matcher.matched is not None:
            break
        held = held_by_brute_force(text[:end], stops)
        assert released + held == text[:end]


@given(pieces=st.lists(few_letters, max_size=8), stops=some_stops, least=st.integers(0, 9))
def test_a_stop_completed_too_early_is_text(
    pieces: list[str], stops: list[str], least: int
) -> None:
    """Only from some piece on may a stop end the text, though it may have begun before."""
    before, stop, end = end_by_brute_force(pieces, least, stops)
    for is_shown in (False, True):
        matcher = StopMatcher(tuple(stops), is_shown=is_shown)
        released = "".join(
            matcher.push(piece, may_end=number >= least)
            for number, piece in enumerate(pieces, start=1)
        )
        released += matcher.flush()
        assert released == ("".join(pieces)[:end] if is_shown else before)
        assert matcher.matched == stop


@given(text=few_letters, stops=some_stops)
def test_only_what_may_match_later_is_held_back(text: str, stops: list[str]) -> None:
    """Where no stop may end the text yet, the longest end that some stop goes on from is held."""
    matcher = StopMatcher(tuple(stops))
    released = ""
    for end, character in enumerate(text, start=1):
        released += matcher.push(character, may_end=False)
        held = next(
            text[start:end]
            for start in range(end + 1)
            if start == end
            or any(stop.startswith(text[start:end]) and len(stop) > end - start for stop in stops)
        )
        assert released + held == text[:end]


@given(text=few_letters, stops=some_stops)
def test_a_stop_that_is_shown_holds_nothing_back(text: str, stops: list[str]) -> None:
    """Each character leaves at once, up to the last one of the stop."""
    matcher = StopMatcher(tuple(stops), is_shown=True)
    for character in text:
        assert matcher.push(character) == character
        if matcher.matched is not None:
            break
    assert matcher.flush() == ""
    assert (matcher.matched or "") in text


@pytest.mark.parametrize(
    ("stops", "pieces", "released", "matched"),
    [
        ([], ["any", "thing"], ["any", "thing", ""], None),
        (["END"], ["onE", "N", "D more"], ["on", "", "", ""], "END"),
        (["END"], ["EE", "NN"], ["E", "ENN", ""], None),
        (["END"], ["the EN"], ["the ", "EN"], None),
        (["abcd", "bc"], ["abc"], ["a", ""], "bc"),  # completed first
        (["bc", "abc"], ["xabc"], ["x", ""], "abc"),  # completed together: the longest
        (["aab"], ["aaab"], ["a", ""], "aab"),
        (["\r\n"], ["a\r", "\r", "\n"], ["a", "\r", "", ""], "\r\n"),
        (["a"], ["a", "b", "a"], ["", "", "", ""], "a"),
    ],
)
def test_stop_matcher_table(
    stops: list[str], pieces: list[str], released: list[str], matched: str | None
) -> None:
    """Cases worked out by hand: split, false start, cut off, overlapping, self-overlapping."""
    matcher = StopMatcher(tuple(stops))
    assert [*map(matcher.push, pieces), matcher.flush()] == released
    assert matcher.matched == matched


def test_a_long_stop_costs_no_more_than_a_look_up_for_each_character() -> None:
    """A text made to go back at each character ends with as many moves as states, not squared."""
    stop = "a" * 400 + "b"
    matcher = StopMatcher((stop,))
    text = "a" * 10_000
    assert matcher.push(text) == "a" * 9_600
    assert matcher.push("b") == ""
    assert matcher.matched == stop


def count_lines(work: Callable[[], object]) -> int:
    """How many lines of Python are run: what the work costs, on any machine."""
    lines = 0

    def note(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def test_a_table_costs_what_its_stops_have_characters() -> None:
    """Stops that fall back as far as they can cost a few lines a character, however many."""
    for count, length in ((2, 400), (64, 60), (64, 120)):
        stops = tuple("a" * (length - number % 50) + chr(200 + number) for number in range(count))
        characters = sum(map(len, stops))
        assert count_lines(partial(StopTable, stops)) < 40 * characters


def test_a_table_is_built_once_for_all_texts() -> None:
    """Texts that look for the same stops, such as a prompt's choices, share what was built."""
    before = stop_table.cache_info().misses
    for _ in range(128):
        matcher = StopMatcher(("no other test", "looks for these"))
        assert matcher.push("that no other test") == "that "
    assert stop_table.cache_info().misses == before + 1


@given(pieces=st.lists(few_letters, max_size=6))
def test_without_stop_strings_all_text_passes(pieces: list[str]) -> None:
    """An idle matcher holds nothing back and never matches."""
    matcher = StopMatcher(())
    assert matcher.is_idle
    assert [*map(matcher.push, pieces), matcher.flush()] == [*pieces, ""]
    assert matcher.matched is None
    assert not StopMatcher(("a",)).is_idle


def test_nothing_leaves_after_a_match() -> None:
    """What follows a stop string is dropped, and what stood before it was given already."""
    matcher = StopMatcher(("ab",))
    assert [matcher.push("xa"), matcher.push("bab"), matcher.push("y"), matcher.flush()] == [
        "x",
        "",
        "",
        "",
    ]
    assert matcher.matched == "ab"
