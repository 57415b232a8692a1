import math
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.assessment import SMALL, Assessment, assess
from charloom.decoding.sampling import Rules, weigh
from charloom.params import SamplingParams

NO = -math.inf


def judge(
    logits: list[list[float]],
    tokens: list[int],
    *,
    top: int = 0,
    weights: list[list[float]] | None = None,
) -> Assessment:
    """Judge tokens by plain numbers."""
    return assess(
        np.array(logits, np.float32),
        np.array(tokens),
        top=top,
        weights_NV=None if weights is None else np.array(weights, np.float32),
    )


def bits(assessment: Assessment) -> list[bytes]:
    """Every bit of every part."""
    return [getattr(assessment, item.name).tobytes() for item in fields(assessment)]


def test_log_probabilities_table() -> None:
    """Of weights 1, 2, 5 the shares are 1/8, 1/4 and 5/8, wherever the logits lie."""
    logits = [math.log(1), math.log(2), math.log(5)]
    shifted = [value + 100 for value in logits]
    result = judge([logits, logits, logits, shifted], [0, 1, 2, 2])
    expected = np.log([1 / 8, 1 / 4, 5 / 8, 5 / 8])
    np.testing.assert_allclose(result.logprobs_N, expected, atol=1e-5)
    np.testing.assert_allclose(result.logprobs_N[:3], expected[:3], atol=1e-7)


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=30),
    place=st.integers(0, 29),
)
def test_log_probabilities_equal_a_plain_second_implementation(
    logits: list[float], place: int
) -> None:
    """Log-probability, rank and entropy are those of Python's own numbers, summed exactly."""
    token = place % len(logits)
    result = judge([logits], [token], top=3)
    highest = max(logits)
    norm = highest + math.log(math.fsum(math.exp(value - highest) for value in logits))
    logprobs = [value - norm for value in logits]
    entropy = math.fsum(-math.exp(value) * value for value in logprobs)
    order = sorted(range(len(logits)), key=lambda other: (-logits[other], other))
    assert result.logprobs_N[0] == pytest.approx(logprobs[token], rel=1e-12, abs=1e-12)
    assert result.entropies_N[0] == pytest.approx(entropy, rel=1e-12, abs=1e-12)
    assert result.ranks_N.tolist() == [order.index(token) + 1]
    assert result.top_NT.tolist() == [order[:3]]
    assert result.top_logprobs_NT[0] == pytest.approx([logprobs[t] for t in order[:3]])


def test_ranks_of_equals_count_by_token_id() -> None:
    """The most likely token has rank 1, and of equal ones the lower id comes first."""
    logits = [1.0, 3.0, 1.0, 2.0, 3.0]
    assert judge([logits] * 5, [0, 1, 2, 3, 4]).ranks_N.tolist() == [4, 1, 5, 3, 2]


def test_the_top_is_ordered_as_ranks_are() -> None:
    """The most likely come first, of equal ones those of lower id, with the model's own numbers."""
    result = judge([[1.0, 3.0, 1.0, 2.0, 3.0]], [0], top=4)
    assert result.top_NT.tolist() == [[1, 4, 3, 0]]
    alone = [judge([[1.0, 3.0, 1.0, 2.0, 3.0]], [token]).logprobs_N[0] for token in (1, 4, 3, 0)]
    assert result.top_logprobs_NT.tolist() == [alone]


@given(st.data())
def test_the_top_of_a_large_vocabulary_is_that_of_all_tokens_in_order(data: st.DataObject) -> None:
    """Where only some are sorted the same are found, equals by token id and no numbers last."""
    width = data.draw(st.integers(SMALL, SMALL + 50))
    values = st.sampled_from(
        [-math.inf, -1.0, 0.0, 0.5, 2.0] + [math.nan] * data.draw(st.integers(0, 1))
    )
    seed, top = data.draw(st.integers(0, 99)), data.draw(st.integers(1, width))
    few = data.draw(st.lists(values, min_size=1, max_size=9))
    logits_NV = np.random.default_rng(seed).choice(np.array(few, np.float32), (3, width))
    result = assess(logits_NV, np.zeros(3, np.int64), top=top)
    expected_NV = np.argsort(-logits_NV, axis=1, kind="stable")
    assert result.top_NT.tolist() == expected_NV[:, :top].tolist()


@pytest.mark.parametrize(("top", "width"), [(0, 0), (1, 1), (3, 3), (99, 3)])
def test_no_more_alternatives_than_there_are_tokens(top: int, width: int) -> None:
    """Asked for more than the vocabulary, it gives the vocabulary."""
    result = judge([[1.0, 2.0, 3.0]] * 2, [0, 0], top=top)
    assert result.top_NT.shape == (2, width)
    assert result.top_logprobs_NT.shape == result.top_sampled_NT.shape == (2, width)


@pytest.mark.parametrize(
    ("logits", "entropy"),
    [
        ([0.0] * 8, math.log(8)),
        ([0.0, NO, 0.0, NO], math.log(2)),
        ([1000.0, 0.0, 0.0], 0.0),
        ([5.0], 0.0),
    ],
)
def test_entropy_table(logits: list[float], entropy: float) -> None:
    """Even odds among n are log n nats, certainty is 0 without a sign, nothing comes of -inf."""
    (found,) = judge([logits], [0]).entropies_N
    assert found == pytest.approx(entropy, abs=1e-12)
    assert math.copysign(1, found) == 1


def test_what_was_read_has_no_sampled_log_probability() -> None:
    """Tokens of a prompt were not drawn, which is told as NaN."""
    result = judge([[1.0, 2.0]], [1], top=2)
    assert np.isnan(result.sampled_N).all()
    assert np.isnan(result.top_sampled_NT).all()
    assert not np.isnan(result.logprobs_N).any()


def test_sampled_log_probabilities_table() -> None:
    """They are shares of what the rules left, and strictly -inf where the rules left nothing."""
    logits = [2.0, 3.0, 1.0, 0.0]
    result = judge([logits] * 3, [0, 1, 2], top=4, weights=[[0.25, 1.0, 0.0, 0.0]] * 3)
    assert result.sampled_N.tolist() == [math.log(0.2), math.log(0.8), NO]
    assert result.top_NT[0].tolist() == [1, 0, 2, 3]
    assert result.top_sampled_NT[0].tolist() == [math.log(0.8), math.log(0.2), NO, NO]
    assert np.isfinite(result.logprobs_N).all()


def test_sampled_log_probabilities_are_those_of_the_rules() -> None:
    """Temperature 0 makes its token certain, and top-k 2 leaves two that add up to 1."""
    logits_BV = np.array([[2.0, 3.0, 1.0, 0.0]] * 3, np.float32)
    rules = Rules.stack(
        [SamplingParams(temperature=0), SamplingParams(top_k=2), SamplingParams(temperature=2)]
    )
    urn = weigh(logits_BV, rules, barrier_BV=np.zeros((1, 4), np.float32))
    weights_BW = urn.weights(np.arange(len(logits_BV)), 4)
    result = assess(logits_BV, np.ones(3, np.int64), top=4, weights_NV=weights_BW)
    assert result.top_sampled_NT[0].tolist() == [0, NO, NO, NO]
    np.testing.assert_allclose(
        np.exp(result.top_sampled_NT[1]), [1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0, 0], 1e-6
    )
    cold = np.exp(np.array([3.0, 2.0, 1.0, 0.0]) / 2)
    np.testing.assert_allclose(np.exp(result.top_sampled_NT[2]), cold / cold.sum(), 1e-6)
    assert result.sampled_N.tolist() == result.top_sampled_NT[:, 0].tolist()


def test_a_token_that_the_network_rules_out() -> None:
    """A logit of -inf is a log-probability of -inf, and no NaN comes of it."""
    result = judge([[NO, 1.0, NO]], [0], top=3, weights=[[0.0, 1.0, 0.0]])
    assert (result.logprobs_N.tolist(), result.sampled_N.tolist()) == ([NO], [NO])
    assert result.ranks_N.tolist() == [2]
    assert result.top_NT.tolist() == [[1, 0, 2]]
    assert result.top_logprobs_NT.tolist() == [[0.0, NO, NO]]
    assert result.entropies_N.tolist() == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, NO])
def test_logits_that_are_no_numbers_are_judged_in_silence(value: float) -> None:
    """A damaged network is the engine's to tell: here no number comes of it, and no warning."""
    result = judge([[value] * 3, [1.0, 2.0, 3.0]], [0, 2], top=1)
    assert np.isnan(result.logprobs_N[0])
    assert result.logprobs_N[1:].tolist() == judge([[1.0, 2.0, 3.0]], [2]).logprobs_N.tolist()


@given(
    rows=st.integers(1, 20),
    vocabulary=st.sampled_from([1, 2, 65, 130, 513, 700]),
    seed=st.integers(0, 1000),
    memory=st.sampled_from(["C", "F", "strided"]),
)
def test_a_row_has_the_same_bits_alone_and_among_others(
    rows: int, vocabulary: int, seed: int, memory: str
) -> None:
    """Neighbours and memory order change no bit of what is told of a token."""
    rng = np.random.default_rng(seed)
    logits_NV = (rng.standard_normal((rows, vocabulary)) * 8).astype(np.float32).round(1)
    weights_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True))
    weights_NV *= weights_NV < rng.random((rows, 1)) * 100
    tokens_N = rng.integers(0, vocabulary, rows)

    def order(array: NDArray[np.float32]) -> NDArray[np.float32]:
        if memory == "strided":  # as one row's part of what a batch did
            return np.stack([array, -array], axis=1)[:, 0]
        return np.array(array, order="F" if memory == "F" else "C")

    together = assess(order(logits_NV), tokens_N, top=5, weights_NV=order(weights_NV))
    for row in range(rows):
        one = slice(row, row + 1)
        alone = assess(logits_NV[one], tokens_N[one], top=5, weights_NV=weights_NV[one])
        assert bits(alone) == bits(together[one])


def test_the_logits_stay_as_they_are() -> None:
    """What is judged belongs to others."""
    logits_NV = np.array([[1, 2, 3]], np.float32)
    weights_NV = np.array([[0, 0.5, 1]], np.float32)
    assess(logits_NV, np.array([1]), top=2, weights_NV=weights_NV)
    assert logits_NV.tolist() == [[1, 2, 3]]
    assert weights_NV.tolist() == [[0, 0.5, 1]]


@given(count=st.integers(1, 8), cuts=st.lists(st.integers(0, 8), max_size=3))
def test_assessments_are_cut_and_joined_without_loss(count: int, cuts: list[int]) -> None:
    """Parts put together again are the whole, in every part of it."""
    rng = np.random.default_rng(count)
    logits_NV = rng.standard_normal((count, 5)).astype(np.float32)
    weights_NV = np.exp(logits_NV)
    whole = assess(logits_NV, rng.integers(0, 5, count), top=2, weights_NV=weights_NV)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    parts = [whole[start:end] for start, end in pairwise(edges)]
    assert sum(map(len, parts)) == len(whole) == count
    assert bits(Assessment.join(parts)) == bits(whole)


def test_nothing_can_be_judged() -> None:
    """No tokens give an assessment of none, as wide as was asked for."""
    empty = assess(
        np.empty((0, 5), np.float32),
        np.empty(0, np.int64),
        top=2,
        weights_NV=np.empty((0, 5), np.float32),
    )
    assert len(empty) == 0
    assert empty.top_NT.shape == (0, 2)
