"""Which text each training step sees.

The training split is cut into *pieces*: contiguous segments of many sequence lengths, or documents
(cut likewise where they are longer). Pieces are shuffled by the seed, dealt to lanes in groups of
similar length, and read in windows of one sequence length with the hidden state carried from window
to window; it starts at zero where a group starts, as it does in generation.

Batch k is a function of (seed, k) alone, so a resumed run needs no data cursor: `Batches.since(k)`
walks to it by arithmetic on lengths. The shuffle is a keyed permutation evaluated where it is
needed, never a list, so a corpus of any size costs no memory. The trade-off: the short end of a
group is padding, kept small by sorting a pool of pieces by length: 5 % on lines of 20 to 200
characters, none for a text without documents but at its very last segment. About half of it comes
from windows having a multiple of eight steps; without that, oneDNN built and kept kernels for every
length it met, and the memory of a run on lines doubled.

Shapes: T steps, B lanes; tokens are time-major (T, B) as the fused recurrent kernels want them.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from charloom.errors import CorpusError
from training.corpus import Split

STEPS_GRAIN = 8
"""A window has a multiple of so many steps, or the sequence length."""

IGNORED = -100
"""Target of a padded position: cross-entropy leaves it out."""

SEGMENT_SEQUENCES = 32
"""Longest piece in sequence lengths: long enough that carrying the state is the rule."""

POOL_GROUPS = 32
"""Groups of lanes that are sorted by length together, where the text has as many pieces."""

_ROUNDS = 4
_BLOCK = 1 << 16


class _Shuffle(IntEnum):
    """What is shuffled; part of the key."""

    PIECES = 0
    GROUPS = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One window of every lane.

    `inputs` and `targets` have shape (T, B), int64; padded targets are `IGNORED`. `fresh` tells
    that the hidden state starts at zero here. `tokens` counts the targets that are not padding.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    fresh: bool
    tokens: int


class Pieces:
    """The pieces of a split, by index: where each starts and how many targets it has.

    A piece (start, length) reads tokens[start : start+length] and predicts the token after each;
    every token of the split but the first is predicted exactly once.
    """

    def __init__(self, split: Split, *, longest: int) -> None:
        self._longest = longest
        self._targets = max(len(split.tokens) - 1, 0)
        self._table = None if split.boundaries is None else _cut(split.boundaries, longest)
        self.count = -(-self._targets // longest) if self._table is None else len(self._table)

    def __getitem__(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Starts and lengths of the pieces with these indices."""
        if self._table is None:
            starts = index * self._longest
            return starts, np.minimum(self._targets - starts, self._longest)
        rows = np.asarray(self._table[index])
        return rows[:, 0], rows[:, 1]


def _cut(boundaries: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Table (pieces, 2) of start and length: documents, cut where longer than `longest`.

    The table lies in an unnamed temporary file, since fifty million lines take 800 MB. Raises
    `CorpusError` when there is no room for it.
    """
    try:
        return _cut_into_file(boundaries, longest)
    except OSError as error:
        raise CorpusError(
            f"The list of {len(boundaries) - 1:,} documents cannot be written to the folder for "
            f"temporary files, {tempfile.gettempdir()}: {error.strerror}. Make room there, or name "
            "another folder in the environment variable TMPDIR."
        ) from error


def _cut_into_file(boundaries: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    with tempfile.TemporaryFile() as file:
        for first in range(0, len(boundaries) - 1, _BLOCK):
            edges = np.asarray(boundaries[first : first + _BLOCK + 1])
            lengths = np.diff(edges)
            parts = -(-lengths // longest)
            nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
            starts = np.repeat(edges[:-1], parts) + nth * longest
            rests = np.repeat(lengths, parts) - nth * longest
            np.stack([starts, np.minimum(rests, longest)], axis=1).astype(np.int64).tofile(file)
        size = file.tell()
        if size == 0:
            return np.empty((0, 2), np.int64)
        return np.memmap(file, np.int64, "r", shape=(size // 16, 2))


def permuted(index: NDArray[np.int64], count: int, *, key: Sequence[int]) -> NDArray[np.int64]:
    """Where each index of range(count) goes in the shuffle that `key` names.

    A Feistel network over the smallest even number of bits that holds `count`, walked along its
    cycles until the value is in range (Black and Rogaway, 2002): a bijection, computed per index.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = index.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + np.uint64(round_key)) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def windows(
    tokens: NDArray[np.unsignedinteger],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    sequence_length: int,
    skip: int = 0,
) -> Iterator[Batch]:
    """Read one group of pieces, a lane each, in windows, from window `skip` on."""
    longest = int(lengths.max())
    for offset in range(skip * sequence_length, longest, sequence_length):
        # Kernels are built, and kept, for each number of steps they meet: let them meet few.
        count = min(-(-(longest - offset) // STEPS_GRAIN) * STEPS_GRAIN, sequence_length)
        steps = np.arange(offset, offset + count)[:, None]
        inside = steps < lengths
        at = starts + np.minimum(steps, lengths - 1)
        inputs = tokens[at].astype(np.int64)
        targets = np.where(inside, tokens[at + 1].astype(np.int64), IGNORED)
        yield Batch(inputs, targets, offset == 0, int(inside.sum()))


class Batches:
    """The endless sequence of training batches of one (split, seed)."""

    def __init__(self, split: Split, *, batch_size: int, sequence_length: int, seed: int) -> None:
        self._tokens = split.tokens
        self._batch_size = batch_size
        self._sequence_length = sequence_length
        self._seed = seed
        sequences = max(len(split.tokens) - 1, 1) // (4 * batch_size * sequence_length)
        longest = sequence_length * min(max(sequences, 1), SEGMENT_SEQUENCES)
        self._pieces = Pieces(split, longest=longest)
        # A pool holds about one epoch at most, or copies of a piece would be sorted into one batch.
        self._groups = min(POOL_GROUPS, -(-self._pieces.count // batch_size))
        tokens, steps, longest = 0, 0, 0
        for _, lengths in self._pool(0):
            tokens += int(lengths.sum())
            steps += -(-int(lengths.max()) // sequence_length)
            longest = max(longest, int(lengths.max()))
        self.largest = batch_size * min(longest, sequence_length)
        """Positions (lanes x steps) of the largest batch in the first pool, padding included."""
        self.tokens_per_step = tokens / steps
        """Targets in an average batch, measured on the first pool; padding is not counted."""
        self.steps_per_epoch = max(len(split.tokens) - 1, 1) / self.tokens_per_step

    def since(self, step: int) -> Iterator[Batch]:
        """Batches step, step + 1, and so on, for ever."""
        pool = 0
        while True:
            for starts, lengths in self._pool(pool):
                count = -(-int(lengths.max()) // self._sequence_length)
                if step < count:
                    yield from windows(
                        self._tokens,
                        starts,
                        lengths,
                        sequence_length=self._sequence_length,
                        skip=step,
                    )
                step = max(step - count, 0)
            pool += 1

    def _pool(self, pool: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The groups of one pool: shuffled pieces, sorted by length, dealt and shuffled again."""
        size = self._groups * self._batch_size
        places = np.arange(pool * size, (pool + 1) * size)
        epochs, within = np.divmod(places, self._pieces.count)
        index = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = (self._seed, _Shuffle.PIECES, int(epoch))
            index[here] = permuted(within[here], self._pieces.count, key=key)
        starts, lengths = self._pieces[index]
        by_length = np.argsort(lengths, kind="stable").reshape(self._groups, self._batch_size)
        key = (self._seed, _Shuffle.GROUPS, pool)
        order = permuted(np.arange(self._groups), self._groups, key=key)
        return [(starts[lanes], lengths[lanes]) for lanes in by_length[order]]
