import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.cell import State
from charloom.decoding.cache import BOOKKEEPING, STRIDE, Key, StateCache, Trail

SPACE = b"a model, float32"
PLENTY = 1 << 30
DIGEST = 32

Tokens = NDArray[np.int32]


def text(length: int, first: int = 0) -> Tokens:
    """Tokens that count up, so that texts with one first token are beginnings of each other."""
    return np.arange(first, first + length, dtype=np.int32)


def key_of(tokens: Tokens, space: bytes = SPACE) -> Key:
    """What some tokens are called, read in one go."""
    trail = Trail(space)
    trail.extend(tokens)
    return trail.key()


def make_state(value: float = 0.0, hidden: int = 8) -> State:
    """A state, (L, P, H), that can be told from others by its value."""
    return np.full((1, 2, hidden), value, np.float32)


def cost_of(length: int, hidden: int = 8) -> int:
    """What the state after so many tokens counts: itself, its key and the bookkeeping."""
    return 2 * hidden * 4 + DIGEST + length % STRIDE * 4 + BOOKKEEPING


def kept(*lengths: int, limit: int = PLENTY) -> StateCache:
    """A cache into which the states after these lengths of one text were put, in this order."""
    cache = StateCache(limit)
    for length in lengths:
        cache.put(key_of(text(length)), make_state(length))
    return cache


def found(cache: StateCache, tokens: Tokens, space: bytes = SPACE) -> int | None:
    """The length of the prefix that is found."""
    result = cache.find(space, tokens)
    return None if result is None else result[0]


# What is found


def test_the_longest_kept_prefix_is_found_with_its_state() -> None:
    """Of several prefixes that are kept, the longest is found, and it brings its own state."""
    result = kept(3, 9, 6).find(SPACE, text(12))
    assert result is not None
    length, state_LPH = result
    assert length == 9
    np.testing.assert_array_equal(state_LPH, make_state(9))


@pytest.mark.parametrize("length", [1, 2, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE])
def test_a_token_is_left_to_be_fed(length: int) -> None:
    """A prefix is found in a text that is one token longer, never in a text that it is."""
    cache = kept(length)
    assert found(cache, text(length)) is None
    assert found(cache, text(length + 1)) == length


def test_a_text_of_no_tokens_finds_nothing() -> None:
    """Not even the state before the first token is a prefix shorter than nothing."""
    cache = kept(0)
    assert found(cache, text(0)) is None
    assert found(cache, text(1)) == 0


def test_a_tail_that_differs_is_not_found() -> None:
    """Tokens after the last whole stride count, each of them."""
    cache = kept(STRIDE + 5)
    for place in range(STRIDE, STRIDE + 5):
        other = text(STRIDE + 9)
        other[place] += 1
        assert found(cache, other) is None


def test_a_stride_that_differs_is_not_found() -> None:
    """Tokens of whole strides count, each of them."""
    cache = kept(2 * STRIDE)
    for place in (0, STRIDE - 1, STRIDE, 2 * STRIDE - 1):
        other = text(2 * STRIDE + 1)
        other[place] += 1
        assert found(cache, other) is None


def test_a_stride_is_found_where_no_tail_is() -> None:
    """A text that leaves a kept one between two strides goes on from the stride before."""
    cache = kept(STRIDE, 2 * STRIDE, 2 * STRIDE + 7)
    other = text(3 * STRIDE)
    other[2 * STRIDE + 3] += 1
    assert found(cache, other) == 2 * STRIDE


def test_a_longer_tail_does_not_hide_a_shorter_one() -> None:
    """A tail of another text, longer than what is left of this one, is passed over."""
    cache = kept(4, 200)
    assert found(cache, text(10)) == 4


def test_a_stride_is_found_though_those_before_it_are_gone() -> None:
    """No prefix needs a shorter one to be kept."""
    assert found(kept(5 * STRIDE), text(100_000)) == 5 * STRIDE


def test_spaces_never_meet() -> None:
    """A state is found in its own space alone."""
    cache = kept(5)
    assert found(cache, text(9), b"a model, int8") is None
    assert found(cache, text(9)) == 5


def test_the_end_of_a_space_is_no_token() -> None:
    """A space that ends in what another has as its first stride is still another space."""
    cache = kept(STRIDE + 4)
    stride, rest = np.split(text(STRIDE + 9), [STRIDE])
    assert found(cache, rest, SPACE + stride.tobytes()) is None


def test_hits_and_misses_are_counted() -> None:
    """Each look-up is one hit or one miss."""
    cache = kept(5)
    for length in (3, 5, 6, 7, 8):
        found(cache, text(length))
    assert (cache.hits, cache.misses) == (3, 2)


def test_states_are_handed_out_read_only() -> None:
    """Nobody can change a state that is kept, neither who found it nor who put it there."""
    cache = StateCache(PLENTY)
    given_LPH = make_state(1)
    cache.put(key_of(text(5)), given_LPH)
    result = cache.find(SPACE, text(6))
    assert result is not None
    for state_LPH in (given_LPH, result[1]):
        with pytest.raises(ValueError, match="read-only"):
            state_LPH[0, 0, 0] = 2


# What is kept


def test_the_least_recently_put_goes_first() -> None:
    """Where there is no room for one more, the oldest entry makes it."""
    cache = kept(1, 2, 3, limit=cost_of(2) + cost_of(3))
    assert cache.entries == 2
    assert found(cache, text(2)) is None
    assert found(cache, text(3)) == 2


def test_to_be_found_counts_as_use() -> None:
    """An entry that was found outlives one that was put after it."""
    cache = kept(1, 2, limit=cost_of(1) + cost_of(3))
    assert found(cache, text(2)) == 1
    cache.put(key_of(text(3)), make_state())
    assert found(cache, text(3)) == 1
    assert found(cache, text(4)) == 3


def test_to_be_put_again_counts_as_use() -> None:
    """An entry that was replaced outlives one that was put in between."""
    cache = kept(1, 2, 1, 3, limit=cost_of(1) + cost_of(3))
    assert found(cache, text(3)) == 1


def test_one_large_entry_takes_the_room_of_many_small_ones() -> None:
    """As many entries go as the new one needs room, and no more."""
    cache = kept(1, 2, 3, 4, limit=4 * cost_of(4))
    cache.put(key_of(text(5)), make_state(hidden=8 + BOOKKEEPING // 8))
    assert cache.entries == 3
    assert found(cache, text(4)) == 3


def test_a_replaced_entry_counts_once() -> None:
    """Another state under the same key takes the place of the first, and its bytes."""
    cache = kept(5)
    cache.put(key_of(text(5)), make_state(2, hidden=16))
    assert (cache.entries, cache.bytes) == (1, cost_of(5, hidden=16))
    result = cache.find(SPACE, text(6))
    assert result is not None
    np.testing.assert_array_equal(result[1], make_state(2, hidden=16))


def test_an_entry_may_fill_the_limit_to_the_byte() -> None:
    """What costs the limit is kept; what costs a byte more is not, and drives nothing out."""
    exact = kept(5, limit=cost_of(5))
    assert (exact.entries, exact.bytes) == (1, cost_of(5))
    assert kept(5, limit=cost_of(5) - 1).entries == 0
    exact.put(key_of(text(6)), make_state())
    assert found(exact, text(7)) == 5


def test_a_limit_of_zero_keeps_nothing() -> None:
    """Without room there are no entries and only misses."""
    cache = kept(0, 1, STRIDE, limit=0)
    assert (cache.entries, cache.bytes) == (0, 0)
    assert found(cache, text(2 * STRIDE)) is None


@pytest.fixture
def traced() -> Iterator[None]:
    """Count the memory that is taken from here on."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("length", [20, STRIDE, 2 * STRIDE - 1])
def test_the_bytes_counted_cover_the_memory_taken(length: int) -> None:
    """What many entries really take, hash tables included, is no more than is counted."""
    cache = StateCache(PLENTY)
    for first in range(1500):
        cache.put(key_of(text(length, first)), make_state())
    assert tracemalloc.get_traced_memory()[0] <= cache.bytes


@pytest.mark.usefixtures("traced")
def test_what_goes_leaves_nothing_behind() -> None:
    """Memory stays within the limit however many entries came and went."""
    limit = 100 * cost_of(STRIDE + 5)
    cache = StateCache(limit)
    for first in range(1000):
        cache.put(key_of(text(STRIDE + 5, first)), make_state())
    assert tracemalloc.get_traced_memory()[0] <= limit


class ModelCache:
    """What a cache promises, the plain way: a list of all entries, least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: list[tuple[bytes, list[int], State]] = []

    def count_bytes(self) -> int:
        """What all entries count."""
        return sum(cost_of(len(tokens), state.shape[2]) for _, tokens, state in self.entries)

    def put(self, space: bytes, tokens: list[int], state_LPH: State) -> None:
        """Append an entry in place of its namesake, then drop the first ones beyond the limit."""
        if cost_of(len(tokens), state_LPH.shape[2]) > self.limit:
            return
        self.entries = [entry for entry in self.entries if entry[:2] != (space, tokens)]
        self.entries.append((space, tokens, state_LPH))
        while self.count_bytes() > self.limit:
            del self.entries[0]

    def find(self, space: bytes, tokens: list[int]) -> tuple[int, State] | None:
        """Look through all entries for the longest proper prefix, and move it to the end."""
        matches = [
            entry
            for entry in self.entries
            if entry[0] == space
            and len(entry[1]) < len(tokens)
            and entry[1] == tokens[: len(entry[1])]
        ]
        if not matches:
            return None
        best = max(matches, key=lambda entry: len(entry[1]))
        self.entries = [entry for entry in self.entries if entry is not best] + [best]
        return len(best[1]), best[2]


def branch(place: int | None) -> Tokens:
    """A text of three strides that leaves the common one at a place, if at any."""
    tokens = text(3 * STRIDE)
    if place is not None:
        tokens[place:] += 1
    return tokens


near_strides = [0, 1, 2, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE, 2 * STRIDE + 1, 3 * STRIDE]
lengths = st.sampled_from(near_strides) | st.integers(0, 3 * STRIDE)
texts = st.builds(
    lambda place, length: branch(place)[:length],
    st.sampled_from([None, 1, STRIDE - 1, STRIDE, STRIDE + 2, 2 * STRIDE]),
    lengths,
)
spaces = st.sampled_from([SPACE, b""])
puts = st.tuples(st.just("put"), spaces, texts, st.sampled_from([1, 8, 200]))
finds = st.tuples(st.just("find"), spaces, texts, st.none())


@given(st.integers(0, 8 * cost_of(100)), st.lists(puts | finds, max_size=40))
def test_a_cache_is_a_list_in_order_of_use(
    limit: int, calls: list[tuple[str, bytes, Tokens, int | None]]
) -> None:
    """Whatever is put and found, the very states of a plain list are there, within the limit."""
    cache, model = StateCache(limit), ModelCache(limit)
    for name, space, tokens, hidden in calls:
        if name == "put" and hidden is not None:
            state_LPH = make_state(hidden=hidden)
            cache.put(key_of(tokens, space), state_LPH)
            model.put(space, tokens.tolist(), state_LPH)
        else:
            result, expected = cache.find(space, tokens), model.find(space, tokens.tolist())
            if result is None or expected is None:
                assert result is expected
            else:
                assert result[0] == expected[0]
                assert result[1] is expected[1]
        assert cache.bytes == model.count_bytes() <= limit
        assert cache.entries == len(model.entries)


# Trails


@given(st.lists(st.integers(0, 2 * STRIDE + 3) | st.integers(0, 3), max_size=8))
def test_a_trail_is_the_same_however_the_text_is_cut(sizes: list[int]) -> None:
    """After each piece, key and length are those of the text so far read at once."""
    whole = text(sum(sizes))
    trail = Trail(SPACE)
    for size in sizes:
        trail.extend(whole[trail.length : trail.length + size])
        assert trail.key() == key_of(whole[: trail.length])
    assert trail.length == len(whole)


def test_every_prefix_has_a_key_of_its_own() -> None:
    """No two lengths of a text share a key, nor do two spaces."""
    keys = {key_of(text(length), space) for length in range(600) for space in (SPACE, b"")}
    assert len(keys) == 1200


def test_to_ask_for_a_key_changes_nothing() -> None:
    """A key may be asked for twice, and the text goes on as if it had not been."""
    trail = Trail(SPACE)
    trail.extend(text(300))
    assert trail.key() == trail.key()
    trail.extend(text(300, first=300))
    assert trail.key() == key_of(text(600))


def test_a_token_is_called_alike_whatever_the_array() -> None:
    """The key depends on the tokens, not on how wide or how far apart they lie in memory."""
    expected = key_of(text(300))
    assert key_of(np.repeat(text(300), 2)[::2]) == expected
    assert key_of(text(300).astype(np.int64)) == expected


# Threads


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Make the interpreter change threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("busy_threads")
def test_many_threads_share_a_cache() -> None:
    """Each thread only ever finds the state of its own prefix, and every byte stays counted."""
    threads, rounds = 8, 2000
    cache = StateCache(6 * cost_of(3))
    prefixes = [(first, length) for first in range(5) for length in (1, 2, 3, STRIDE)]
    keys = {(first, length): key_of(text(length, first)) for first, length in prefixes}
    start = Barrier(threads)

    def work(seed: int) -> int:
        random = Random(seed)
        finds = 0
        start.wait(60)
        for _ in range(rounds):
            first, length = random.choice(prefixes)
            if random.random() < 0.5:
                cache.put(keys[first, length], make_state(1000 * first + length))
            else:
                finds += 1
                result = cache.find(SPACE, text(length + 1, first))
                if result is not None:
                    assert result[1].max() == 1000 * first + result[0]
        return finds

    with ThreadPoolExecutor(threads) as pool:
        finds = sum(pool.map(work, range(threads)))
    assert cache.hits + cache.misses == finds

    left = [length for first, length in prefixes if found(cache, text(length + 1, first)) == length]
    assert cache.entries == len(left)
    assert cache.bytes == sum(map(cost_of, left))
