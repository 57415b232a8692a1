"""Stop strings: the text ends before the first of them, and no part of it is ever shown.

Held back is what may still become a stop string, and nothing else.
"""

from collections.abc import Iterable


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed in it.

    The stop whose last character comes first wins, and of several completed by one character the
    longest, so the result does not depend on how the text is cut into pieces. Held back is the
    longest end of the text that begins some stop string.

    That end is also the state of the automaton of Aho & Corasick 1975 (Communications of the ACM
    18:333), so each character costs one look-up; moves are worked out when first made.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self.matched: str | None = None
        self._held = ""
        # Every prefix of a stop -> the longest stop that it ends with.
        self._ended: dict[str, str | None] = {"": None}
        by_length = sorted(set(stops), key=len, reverse=True)
        for stop in by_length:
            for length in range(1, len(stop) + 1):
                prefix = stop[:length]
                self._ended[prefix] = next((end for end in by_length if prefix.endswith(end)), None)
        self._moves: dict[tuple[str, str], str] = {}

    @property
    def is_idle(self) -> bool:
        """Whether there is no stop string to look for."""
        return len(self._ended) == 1

    def push(self, text: str) -> str:
        """Take more text and give what can no longer belong to a stop string; "" after a match."""
        if self.matched is not None:
            return ""
        if self.is_idle:
            return text
        released = []
        for character in text:
            grown = self._held + character
            self._held = self._move(self._held, character)
            released.append(grown[: len(grown) - len(self._held)])
            self.matched = self._ended[self._held]
            if self.matched is not None:
                released.append(self._held.removesuffix(self.matched))
                self._held = ""
                break
        return "".join(released)

    def flush(self) -> str:
        """Give what is still held back, since the text has ended."""
        held, self._held = self._held, ""
        return held

    def _move(self, held: str, character: str) -> str:
        """The longest end of `held` + `character` that begins some stop."""
        move = self._moves.get((held, character))
        if move is None:
            move = held + character
            while move not in self._ended:
                move = move[1:]
            self._moves[held, character] = move
        return move
