"""Who waits, and whose turn it is: owners take turns, and each owner's requests keep their order.

So a thousand requests of one owner delay another's first one by a single request.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WaitingLine(Generic[Item]):
    """A queue that takes turns among the owners of its items."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        """All items, owner by owner."""
        for line in self._lines.values():
            yield from line

    def push(self, owner: str, item: Item) -> None:
        """Let an item wait behind its owner's others."""
        self._lines.setdefault(owner, deque()).append(item)
        self._length += 1

    def push_back(self, owner: str, item: Item) -> None:
        """Put an item that had its turn before its owner's others."""
        self._lines.setdefault(owner, deque()).appendleft(item)
        self._length += 1

    def pop(self) -> Item:
        """The next owner's first item; the owner's next turn comes after all the others'."""
        owner, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._length -= 1
        if line:
            self._lines.move_to_end(owner)
        else:
            del self._lines[owner]
        return item

    def take(self, is_wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove all items of some kind, in whatever place."""
        taken: list[Item] = []
        for owner, line in list(self._lines.items()):
            kept: deque[Item] = deque()
            for item in line:  # asked once, since the answer may change meanwhile
                (taken if is_wanted(item) else kept).append(item)
            self._length -= len(line) - len(kept)
            if kept:
                self._lines[owner] = kept
            else:
                del self._lines[owner]
        return taken
