"""The order of training text: a function of seed and step that reads everything exactly once."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.batches import IGNORED, Batch, Batches, Pieces, permuted, windows
from training.corpus import Split


def plain(count: int) -> Split:
    """A text without documents whose token at place i is i."""
    tokens = np.arange(count, dtype=np.uint32)
    return Split(tokens=tokens, boundaries=None, characters=count, bytes=count)


def documents(lengths: list[int]) -> Split:
    """Documents of these lengths; 0 is the end token, other tokens tell their place."""
    boundaries = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    tokens = np.arange(boundaries[-1] + 1, dtype=np.uint32)
    tokens[boundaries] = 0
    return Split(tokens=tokens, boundaries=boundaries, characters=sum(lengths), bytes=sum(lengths))


def scored(batch: Batch) -> NDArray[np.int64]:
    return batch.targets[batch.targets != IGNORED]


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=3))
def test_a_shuffle_is_a_permutation_whatever_its_key(count: int, key: list[int]) -> None:
    """Every index goes to a place of its own."""
    places = permuted(np.arange(count), count, key=key)

    assert sorted(places.tolist()) == list(range(count))


def test_shuffles_of_different_keys_differ() -> None:
    """Two epochs read the pieces in different orders."""
    orders = [permuted(np.arange(1000), 1000, key=(1, 0, epoch)).tolist() for epoch in range(3)]

    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_shuffle_spreads_evenly() -> None:
    """Over 2,000 keys the first of 10 indices goes to each place about 200 times (chi-square)."""
    counts = np.bincount(
        [int(permuted(np.array([0]), 10, key=(seed, 0))[0]) for seed in range(2000)], minlength=10
    )

    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # 0.001 quantile, 9 degrees of freedom


@given(st.integers(2, 3000), st.integers(1, 300))
def test_pieces_of_a_text_predict_each_token_but_the_first_once(count: int, longest: int) -> None:
    """Without documents only the first token goes unpredicted."""
    pieces = Pieces(plain(count), longest=longest)

    starts, lengths = pieces[np.arange(pieces.count)]

    targets = np.concatenate(
        [
            np.arange(start, start + length) + 1
            for start, length in zip(starts, lengths, strict=True)
        ]
    )
    assert targets.tolist() == list(range(1, count))
    assert lengths.max() <= longest


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 50))
def test_pieces_of_documents_predict_every_token_and_end_once(
    lengths: list[int], longest: int
) -> None:
    """Each document is predicted from its first token to its end token."""
    split = documents(lengths)
    pieces = Pieces(split, longest=longest)

    starts, sizes = pieces[np.arange(pieces.count)]

    targets = np.concatenate(
        [np.arange(start, start + size) + 1 for start, size in zip(starts, sizes, strict=True)]
    )
    assert targets.tolist() == list(range(1, len(split.tokens)))


def test_a_short_document_starts_after_the_end_token() -> None:
    """The first input of every document that fits a piece is the end token."""
    split = documents([5, 9, 2])
    pieces = Pieces(split, longest=20)

    starts, _ = pieces[np.arange(pieces.count)]

    assert split.tokens[starts].tolist() == [0, 0, 0]


def test_windows_carry_on_where_the_last_one_ended() -> None:
    """Lanes are read from start to end, targets one token ahead, short lanes padded."""
    tokens = np.arange(100, dtype=np.uint8)

    first, second = windows(tokens, np.array([10, 50]), np.array([5, 3]), sequence_length=3)

    assert first.inputs.T.tolist() == [[10, 11, 12], [50, 51, 52]]
    assert first.targets.T.tolist() == [[11, 12, 13], [51, 52, 53]]
    assert second.targets.T.tolist() == [[14, 15, IGNORED], [IGNORED] * 3]
    assert (first.fresh, second.fresh) == (True, False)
    assert (first.tokens, second.tokens) == (6, 2)


@pytest.mark.parametrize("split", [plain(5000), documents([3, 40, 7, 200, 11] * 30)])
@given(step=st.integers(0, 300))
def test_any_batch_can_be_reached_directly(split: Split, step: int) -> None:
    """Batch k is the same whether the batches before it were read or skipped."""
    batches = Batches(split, batch_size=4, sequence_length=16, seed=7)

    direct = next(batches.since(step))
    walked = next(islice(batches.since(0), step, None))

    assert direct.inputs.tolist() == walked.inputs.tolist()
    assert direct.targets.tolist() == walked.targets.tolist()
    assert (direct.fresh, direct.tokens) == (walked.fresh, walked.tokens)


@pytest.mark.parametrize("split", [plain(4097), documents([3, 40, 7, 90, 11] * 64)])
def test_an_epoch_reads_every_token_once(split: Split) -> None:
    """Where the pieces fill whole pools, two epochs read every token exactly twice."""
    batches = Batches(split, batch_size=2, sequence_length=8, seed=3)
    seen: list[int] = []
    for batch in batches.since(0):
        seen += scored(batch).tolist()
        if len(seen) >= 2 * (len(split.tokens) - 1):
            break

    assert np.bincount(seen).tolist() == (2 * np.bincount(split.tokens[1:])).tolist()


def test_a_window_has_a_length_that_is_often_met() -> None:
    """The last window is rounded up to eight steps, and never one of padding alone is added."""
    tokens = np.arange(200, dtype=np.uint8)

    sizes = [
        [
            len(batch.inputs)
            for batch in windows(tokens, np.array([0]), np.array([length]), sequence_length=20)
        ]
        for length in (1, 8, 9, 20, 21, 37)
    ]

    assert sizes == [[8], [8], [16], [20], [20, 8], [20, 20]]


def test_seeds_read_in_different_orders() -> None:
    """The seed decides the order."""
    first, second = (
        next(Batches(plain(9000), batch_size=4, sequence_length=16, seed=seed).since(0))
        for seed in (1, 2)
    )

    assert first.inputs.tolist() != second.inputs.tolist()


@pytest.mark.parametrize("count", [2, 3, 17, 64, 65, 200])
def test_tiny_texts_fill_every_lane(count: int) -> None:
    """A text shorter than one batch is read again and again without an index out of range."""
    batches = Batches(plain(count), batch_size=8, sequence_length=32, seed=1)

    for batch in islice(batches.since(0), 40):
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[1] == 8
        assert batch.tokens == len(scored(batch)) > 0


def test_lines_of_mixed_length_waste_little() -> None:
    """Sorting a pool by length keeps padding under 6 % on lines of 20 to 200 characters."""
    lengths = np.random.default_rng(5).integers(20, 200, size=4000).tolist()
    batches = Batches(documents(lengths), batch_size=16, sequence_length=64, seed=1)

    read = list(islice(batches.since(0), 1500))

    places = sum(batch.targets.size for batch in read)
    assert sum(batch.tokens for batch in read) / places > 0.94


def test_the_hidden_state_starts_afresh_where_pieces_start() -> None:
    """A batch is fresh exactly where its lanes jump to the start of a piece."""
    batches = Batches(plain(60_000), batch_size=4, sequence_length=16, seed=1)
    before: Batch | None = None
    for batch in islice(batches.since(0), 200):
        goes_on = before is not None and (batch.inputs[0] == before.inputs[-1] + 1).all()
        assert batch.fresh is not bool(goes_on)
        before = batch
