"""Stop strings: the text ends before the first of them, and no part of it is ever shown.

Held back is what may still become a stop string, and nothing else. Where the stop string itself is
asked for, the text ends with it and nothing has to be held back.
"""

from collections.abc import Iterable


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed in it.

    The stop whose last character comes first wins, and of several completed by one character the
    longest, so the result does not depend on how the text is cut into pieces. Held back is the
    longest end of the text that begins some stop string.

    That end is also the state of the automaton of Aho & Corasick 1975 (Communications of the ACM
    18:333), so each character costs one look-up; moves are worked out when first made.

    `is_shown` says whether the text ends with the stop string instead of before it.
    """

    def __init__(self, stops: Iterable[str], *, is_shown: bool = False) -> None:
        self.matched: str | None = None
        self._is_shown = is_shown
        self._state = ""
        # Every prefix of a stop -> the longest stop that it ends with.
        self._ended: dict[str, str | None] = {"": None}
        self._stops = by_length = sorted(set(stops), key=len, reverse=True)
        for stop in by_length:
            for length in range(1, len(stop) + 1):
                prefix = stop[:length]
                self._ended[prefix] = next((end for end in by_length if prefix.endswith(end)), None)
        self._moves: dict[tuple[str, str], str] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is no stop string to look for."""
        return len(self._ended) == 1

    def push(self, text: str, *, may_end: bool = True) -> str:
        """Take more text and give what can no longer belong to a stop string; "" after a match.

        A stop string that is completed while the text may not end is text like any other.
        """
        if self.matched is not None:
            return ""
        if self.is_idle:
            return text
        released = []
        for character in text:
            grown = self._state + character
            self._state = self._move(self._state, character)
            stop = self._ended[self._state]
            if stop is not None and not may_end:
                stop, self._state = None, self._pass(self._state)
            released.append(character if self._is_shown else grown[: len(grown) - len(self._state)])
            if stop is not None:
                if not self._is_shown:
                    released.append(self._state.removesuffix(stop))
                self.matched, self._state = stop, ""
                break
        return "".join(released)

    def flush(self) -> str:
        """Give what is still held back, since the text has ended."""
        held, self._state = self._state, ""
        return "" if self._is_shown else held

    def _move(self, state: str, character: str) -> str:
        """The longest end of `state` + `character` that begins some stop."""
        move = self._moves.get((state, character))
        if move is None:
            move = state + character
            while move not in self._ended:
                move = move[1:]
            self._moves[state, character] = move
        return move

    def _pass(self, state: str) -> str:
        """The longest end of `state` that may still grow into a stop."""
        while state and not any(
            stop.startswith(state) for stop in self._stops if len(stop) > len(state)
        ):
            state = state[1:]
        return state
