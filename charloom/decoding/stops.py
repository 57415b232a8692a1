"""Stop strings: the text ends before the first of them, and no part of it is ever shown.

Held back is what may still become a stop string, and nothing else. Where the stop string itself is
asked for, the text ends with it and nothing has to be held back.
"""

from functools import lru_cache


class StopTable:
    """What there is to know of some stop strings: the automaton of Aho & Corasick 1975.

    (Communications of the ACM 18:333.) Its states are the prefixes of the stops, each a number that
    is greater than those of all shorter ones; 0 is the empty one. Building it takes time and room
    in proportion to the stops' characters, and nothing changes it afterwards, so all the texts that
    look for the same stops share one.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.lengths = [0]
        # The longest stop that a prefix ends with.
        self.stops: list[str | None] = [None]
        self._moves: dict[tuple[int, str], int] = {}
        # The longest other end of a prefix that is a prefix too.
        self._ends = [0]
        growing = [(stop, 0) for stop in stops]
        while growing:
            growing = [
                (stop, self._grow(prefix, stop))
                for stop, prefix in growing
                if self.lengths[prefix] < len(stop)
            ]
        # The longest end of a prefix from which some stop goes on.
        self.open_ends = [0]
        has_moves = {prefix for prefix, _ in self._moves}
        for prefix in range(1, len(self.lengths)):
            end = prefix if prefix in has_moves else self.open_ends[self._ends[prefix]]
            self.open_ends.append(end)

    def move(self, state: int, character: str) -> int:
        """The longest end of a prefix and a character after it that is a prefix."""
        while (longer := self._moves.get((state, character))) is None:
            if state == 0:
                return 0
            state = self._ends[state]
        return longer

    def _grow(self, prefix: int, stop: str) -> int:
        """The prefix of a stop that is longer by a character than this one."""
        length = self.lengths[prefix] + 1
        character = stop[length - 1]
        longer = self._moves.get((prefix, character))
        if longer is None:
            end = self.move(self._ends[prefix], character) if prefix else 0
            longer = self._moves[prefix, character] = len(self.lengths)
            self.lengths.append(length)
            self._ends.append(end)
            self.stops.append(self.stops[end])
        if length == len(stop):
            self.stops[longer] = stop
        return longer


@lru_cache(maxsize=16)
def stop_table(stops: tuple[str, ...]) -> StopTable:
    """The table of these stops; at up to 220 bytes a character only a few are kept."""
    return StopTable(stops)


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed in it.

    The stop whose last character comes first wins, and of several completed by one character the
    longest, so the result does not depend on how the text is cut into pieces. Held back is the
    longest end of the text that begins some stop string: the state of the automaton, at the cost of
    about one look-up for each character.

    `is_shown` says whether the text ends with the stop string instead of before it.
    """

    def __init__(self, stops: tuple[str, ...], *, is_shown: bool = False) -> None:
        self.matched: str | None = None
        self.is_idle = not stops
        """Whether there is no stop string to look for."""
        self._is_shown = is_shown
        self._table = stop_table(stops)
        self._state = 0
        self._held = ""

    def push(self, text: str, *, may_end: bool = True) -> str:
        """Take more text and give what can no longer belong to a stop string; "" after a match.

        A stop string that is completed while the text may not end is text like any other.
        """
        if self.matched is not None:
            return ""
        if self.is_idle:
            return text
        table, state = self._table, self._state
        before = len(self._held)
        grown = self._held + text
        for end, character in enumerate(text, start=before + 1):
            state = table.move(state, character)
            stop = table.stops[state]
            if stop is None:
                continue
            if may_end:
                self.matched, self._held = stop, ""
                return grown[before:end] if self._is_shown else grown[: end - len(stop)]
            state = table.open_ends[state]
        self._state = state
        certain = len(grown) - table.lengths[state]
        self._held = grown[certain:]
        return text if self._is_shown else grown[:certain]

    def flush(self) -> str:
        """Give what is still held back, since the text has ended."""
        held, self._held, self._state = self._held, "", 0
        return "" if self._is_shown else held
