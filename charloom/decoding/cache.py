"""Hidden states after beginnings of texts: a text that begins alike goes on from there.

A prefix is called by a digest of its whole strides of 256 tokens and, as they are, by the tokens
after them. So one pass over a text gives the digests of all its prefixes, and prefixes that share a
digest differ in a tail of at most 255 tokens, of which the cache counts how many it has of each
length. A look-up tries these lengths under each digest, the longest first, and never looks at what
else is kept.

Medians on one core of an AMD EPYC with Python 3.11, in microseconds; a step of a 2 x 512 network
takes some 40, so reading 100,000 tokens takes seconds:

    find among 10,000 prompts of 20 tokens: missed, found                   4, 6
    find among 10,000 prompts of 5 to 40 tokens: missed, found              10, 7
    find among 10,000 prompts of 1 to 255 tokens: missed (worst), found     75, 19
    find for a text of 100,000 tokens                                       1,000
    put, and where an entry must go for it                                  2, 3
    a trail's extension by 8 tokens, by 256                                 0.7, 1.9
    a trail's key                                                           0.4

The price: an entry of a 2 x 512 LSTM takes 17 KiB, and a text that leaves a kept one in mid-stride
reads up to 255 tokens again.
"""

from collections import Counter, OrderedDict
from hashlib import blake2b
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from charloom.cell import State

STRIDE = 256
"""Tokens to a stride: texts are hashed stride by stride, and states kept at the end of each."""

BOOKKEEPING = 1024
"""Bytes that an entry takes beside its state and key: 320 to 850 measured, as tables grow."""

Key = tuple[bytes, bytes]
"""What a prefix is called: a digest of its space and whole strides, and the tokens after them."""

TOKEN_BYTES = np.dtype(np.int32).itemsize


class Trail:
    """The running key of a text: what its prefix of each length is called in the cache.

    `space` says whose text it is. Equal tokens in equal spaces have equal keys, however they were
    cut, and going on costs what the new tokens cost, whatever came before. A trail belongs to one
    thread.
    """

    def __init__(self, space: bytes) -> None:
        self.length = 0
        # The digest of a space has one length, so no space can pass for another's first tokens.
        self._strides = blake2b(blake2b(space).digest(), digest_size=32)
        self._tail = b""

    def extend(self, tokens: NDArray[np.int32]) -> None:
        """Go on by some tokens."""
        self.length += len(tokens)
        text = self._tail + _spell(tokens)
        whole = len(text) - len(text) % (STRIDE * TOKEN_BYTES)
        self._strides.update(text[:whole])
        self._tail = text[whole:]

    def key(self) -> Key:
        """What the text so far is called."""
        return self._strides.digest(), self._tail


class StateCache:
    """The states after prefixes, in at most `limit` bytes; the least recently used goes first.

    `bytes` counts states, keys and bookkeeping; `hits` and `misses` count calls of `find`. All
    three are only to be read. Any number of threads may share a cache.
    """

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._limit = limit
        self._states: OrderedDict[Key, State] = OrderedDict()
        # Digest -> how many entries it has with a tail of so many bytes; no count is 0.
        self._tails: dict[bytes, Counter[int]] = {}
        self._lock = Lock()

    @property
    def entries(self) -> int:
        """How many states are kept."""
        return len(self._states)

    def find(self, space: bytes, tokens: NDArray[np.int32]) -> tuple[int, State] | None:
        """The longest kept prefix that leaves a token to be fed: its length and its state.

        None where there is no such prefix. The state, (L, P, H), is read-only and stays good
        when its entry goes. Being found counts as use.
        """
        trail = Trail(space)
        digests = []
        for start in range(0, len(tokens), STRIDE):
            digests.append((start, trail.key()[0]))
            trail.extend(tokens[start : start + STRIDE])
        with self._lock:
            for start, digest in reversed(digests):
                if digest not in self._tails:
                    continue
                # One token less: the last is to be fed, and a tail is shorter than a stride.
                text = _spell(tokens[start : min(start + STRIDE, len(tokens)) - 1])
                key = self._find_longest(digest, text)
                if key is not None:
                    self.hits += 1
                    self._states.move_to_end(key)
                    return start + len(key[1]) // TOKEN_BYTES, self._states[key]
            self.misses += 1
            return None

    def put(self, key: Key, state_LPH: State) -> None:
        """Keep the state after a prefix, unless it alone is beyond the limit.

        The array itself is kept and made read-only; it must share its memory with no other.
        """
        state_LPH.setflags(write=False)
        cost = _count_bytes(key, state_LPH)
        if cost > self._limit:
            return
        digest, tail = key
        with self._lock:
            if key in self._states:
                self._drop(key)
            while self.bytes + cost > self._limit:
                self._drop(next(iter(self._states)))
            self.bytes += cost
            self._states[key] = state_LPH
            self._tails.setdefault(digest, Counter())[len(tail)] += 1

    def _find_longest(self, digest: bytes, text: bytes) -> Key | None:
        """The kept key of this digest whose tail is the longest beginning of a text."""
        for size in sorted(self._tails[digest], reverse=True):
            if size <= len(text) and (key := (digest, text[:size])) in self._states:
                return key
        return None

    def _drop(self, key: Key) -> None:
        """Forget one state."""
        digest, tail = key
        self.bytes -= _count_bytes(key, self._states.pop(key))
        sizes = self._tails[digest]
        sizes[len(tail)] -= 1
        if sizes[len(tail)] == 0:
            del sizes[len(tail)]
        if not sizes:
            del self._tails[digest]


def _spell(tokens: NDArray[np.int32]) -> bytes:
    """The tokens as bytes, each of one width: otherwise different tokens might spell the same."""
    return np.asarray(tokens, np.int32).tobytes()


def _count_bytes(key: Key, state_LPH: State) -> int:
    """What an entry counts against the limit."""
    return sum(map(len, key)) + state_LPH.nbytes + BOOKKEEPING
