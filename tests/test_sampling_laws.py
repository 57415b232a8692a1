"""What holds for all logits: a plain second implementation, chance, crowds, golden draws."""

import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.draws import uniforms
from charloom.decoding.sampling import NONE, SMALL, Lot, Rules, Urn, draw, sample, weigh
from charloom.params import SamplingOptions, SamplingParams

NO = -math.inf
ALMOST_ONE = math.nextafter(1.0, 0.0)
GOLDEN = Path(__file__).parent / "golden" / "draws.json"


# A plain second implementation

CLOSE = 1e-4
"""Decisions nearer to their edge than this may differ between float32 and Python's numbers."""


class Plain:
    """The rules for one row, told plainly: dictionaries and sorted lists of Python's own numbers.

    `shares` holds each token's probability, and `margin` how near any decision was to its edge.
    """

    def __init__(
        self,
        logits: Sequence[float],
        params: SamplingParams,
        *,
        allowed: Sequence[bool],
        bias: Sequence[float],
        counts: Sequence[int],
    ) -> None:
        self.margin = 1.0
        scores = {token: logits[token] + bias[token] for token, may in enumerate(allowed) if may}
        for token, score in scores.items():
            if counts[token] and params.repetition_penalty is not None:
                penalty = params.repetition_penalty
                score = score / penalty if score > 0 else score * penalty
            score -= (params.frequency_penalty or 0.0) * counts[token]
            scores[token] = score - (params.presence_penalty or 0.0) * bool(counts[token])
        ranked = sorted(scores, key=lambda token: (-scores[token], token))
        highest = scores[ranked[0]]
        if params.temperature == 0:
            ranked, temperature = ranked[:1], 1.0
        else:
            temperature = float(np.float32(params.temperature))
        weights = {token: math.exp((scores[token] - highest) / temperature) for token in ranked}
        if params.top_k is not None:
            ranked = ranked[: params.top_k]
        if params.top_p is not None and params.top_p < 1:
            last = self._reach(params.top_p, [weights[token] for token in ranked])
            ranked = [token for token in ranked if weights[token] >= weights[ranked[last]]]
        if params.min_p is not None:
            for token in ranked:
                self._decide(weights[token] - params.min_p)
            ranked = [token for token in ranked if weights[token] >= params.min_p]
        if params.typical_p is not None and params.typical_p < 1:
            ranked = self._typical(params.typical_p, {token: weights[token] for token in ranked})
        total = math.fsum(weights[token] for token in ranked)
        self.shares = [0.0] * len(logits)
        for token in ranked:
            self.shares[token] = weights[token] / total

    def _typical(self, p: float, weights: dict[int, float]) -> list[int]:
        total = math.fsum(weights.values())
        surprise = {token: -math.log(weight / total) for token, weight in weights.items()}
        mean = math.fsum(weight / total * surprise[token] for token, weight in weights.items())
        distance = {token: abs(value - mean) for token, value in surprise.items()}
        nearest = sorted(weights, key=lambda token: (distance[token], token))
        last = self._reach(p, [weights[token] for token in nearest])
        for token in nearest[last + 1 :]:
            if weights[token] != weights[nearest[last]]:
                self._decide(distance[token] - distance[nearest[last]])
        for token in nearest[:last]:
            if weights[token] != weights[nearest[last]]:
                self._decide(distance[token] - distance[nearest[last]])
        return nearest[: last + 1]

    def _reach(self, p: float, weights: list[float]) -> int:
        """The first place at which the running sum reaches p of the total."""
        total = math.fsum(weights)
        reached = [value / total for value in accumulate(weights)]
        for value in reached[:-1]:
            self._decide(value - p)
        return next((place for place, value in enumerate(reached) if value >= p), len(weights) - 1)

    def _decide(self, distance: float) -> None:
        self.margin = min(self.margin, abs(distance))


# Logits, biases and penalties are such that float32 holds their sums and products exactly.
options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, 12) | st.integers(1, 1100),
    top_p=st.none() | st.sampled_from([0.1, 0.37, 0.7, 0.93, 0.999, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.0013, 0.013, 0.11, 0.37]),
    typical_p=st.none() | st.sampled_from([0.1, 0.43, 0.9, 1.0]),
    repetition_penalty=st.none() | st.sampled_from([0.5, 1.0, 2.0]),
    frequency_penalty=st.none() | st.sampled_from([-0.25, 0.5, 2.0]),
    presence_penalty=st.none() | st.sampled_from([-2.0, 0.0, 0.75]),
)


def check_against_plain(
    logits: list[float],
    params: SamplingParams,
    *,
    allowed: list[bool],
    bias: list[float],
    counts: list[int],
) -> None:
    """Weights have the plain shares, and sweeping the uniform draws each token in its share."""
    plain = Plain(logits, params, allowed=allowed, bias=bias, counts=counts)
    assume(plain.margin > CLOSE)
    shares = np.array(plain.shares)
    row = {
        "barrier_BV": np.where(allowed, 0.0, NO).astype(np.float32)[None],
        "bias_BV": np.array([bias], np.float32),
        "counts_BV": np.array([counts], np.int32),
    }
    logits_1V = np.array([logits], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        urn = weigh(logits_1V, Rules.stack([params]), **row)
    weights = urn.weights(np.zeros(1, np.int64), len(logits))[0].astype(np.float64)
    np.testing.assert_allclose(weights / weights.sum(), shares, rtol=CLOSE, atol=1e-20)

    uniform = np.append((np.arange(62) + 0.5) / 62, [0.0, ALMOST_ONE])
    drawn = sample(
        np.repeat(logits_1V, len(uniform), axis=0),
        Rules.stack([params] * len(uniform)),
        barrier_BV=row["barrier_BV"],
        bias_BV=row["bias_BV"],
        counts_BV=np.repeat(row["counts_BV"], len(uniform), axis=0),
        uniform_B=uniform,
    )
    assert (shares[drawn] > 0).all()
    reached = shares.cumsum()
    assert (reached[drawn] - shares[drawn] - CLOSE <= uniform).all()
    assert (uniform <= reached[drawn] + CLOSE).all()


@given(data=st.data(), params=options)
def test_small_vocabularies_equal_a_plain_second_implementation(
    data: st.DataObject, params: SamplingParams
) -> None:
    """All rules together, on logits of every kind with many ties, give the plain shares."""
    size = data.draw(st.integers(1, 10))

    def column(numbers: st.SearchStrategy[Any]) -> list[Any]:
        return data.draw(st.lists(numbers, min_size=size, max_size=size))

    allowed = column(st.sampled_from([True, True, True, False]))
    allowed[data.draw(st.integers(0, size - 1))] = True
    check_against_plain(
        column(st.integers(-48, 48).map(lambda n: n / 16)),
        params,
        allowed=allowed,
        bias=column(st.sampled_from([0.0, 0.0, 0.0, -1.5, 2.25, 8.0])),
        counts=column(st.sampled_from([0, 0, 1, 3])),
    )


@settings(max_examples=60)
@given(
    params=options,
    vocabulary=st.sampled_from([65, 130, SMALL, SMALL + 1, 600, 640, 1000]),
    spread=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
)
def test_large_vocabularies_equal_a_plain_second_implementation(
    params: SamplingParams, vocabulary: int, spread: float, seed: int
) -> None:
    """So do they where only part of a row is sorted and the draw goes by strides."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(vocabulary).clip(-4, 4) * spread * 64) / 64
    allowed = rng.random(vocabulary) < 0.9
    allowed[rng.integers(vocabulary)] = True
    check_against_plain(
        logits.tolist(),
        params,
        allowed=allowed.tolist(),
        bias=rng.choice([0.0, 0.0, 0.0, 0.0, -1.5, 2.25], vocabulary).tolist(),
        counts=rng.choice([0, 0, 0, 0, 1, 3], vocabulary).tolist(),
    )


# Chance

# Upper 1e-4 quantiles of the chi-square distribution. The draws are fixed, so this cannot flicker.
CHI_SQUARE = {4: 23.51, 15: 44.26, 63: 112.0}


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic."""
    return float((((counts - expected) ** 2) / expected).sum())


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of one text pass a chi-square test against the probabilities."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    count = 20_000
    weights = np.tile((probabilities / 0.4).astype(np.float32), (count, 1))
    urn = Urn((Lot(None, weights, None),), np.zeros((count, 1), np.float32))
    counts = np.bincount(draw(urn, uniforms(7, 0, np.arange(count))), minlength=5)
    assert chi_square(counts, probabilities * count) < CHI_SQUARE[4]


def test_draws_from_a_large_vocabulary_follow_the_distribution() -> None:
    """Among 1,000 tokens, strides and places within strides are drawn by their probabilities."""
    logits = (np.random.default_rng(0).standard_normal(1000) * 1.5).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    counts = np.zeros(1000, np.int64)
    block = 1000
    for start in range(0, 20 * block, block):
        drawn = sample(
            np.tile(logits, (block, 1)),
            Rules.stack([SamplingParams()] * block),
            barrier_BV=np.zeros((1, 1000), np.float32),
            uniform_B=uniforms(8, 0, start + np.arange(block)),
        )
        counts += np.bincount(drawn, minlength=1000)
    for group, freedom in ((np.arange(1000) // 64, 15), (np.arange(1000) % 64, 63)):
        found = np.bincount(group, counts).astype(np.int64)
        expected = np.bincount(group, probabilities) * counts.sum()
        assert chi_square(found, expected) < CHI_SQUARE[freedom]


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.8}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        ({"min_p": 0.25}, [8 / 19, 6 / 19, 3 / 19, 2 / 19, 0]),
        ({"temperature": 0.5}, [64 / 114, 36 / 114, 9 / 114, 4 / 114, 1 / 114]),
    ],
)
@pytest.mark.parametrize("vocabulary", [5, 600])
def test_draws_follow_what_the_rules_leave(
    options: SamplingOptions, probabilities: list[float], vocabulary: int
) -> None:
    """Of 0.4, 0.3, 0.15, 0.1 and 0.05 each rule leaves shares known by hand, and so it is drawn."""
    count = 4000
    logits = np.full((1, vocabulary), NO, np.float32)
    places = np.linspace(0, vocabulary - 1, 5).astype(np.int64)
    logits[:, places] = np.log([0.4, 0.3, 0.15, 0.1, 0.05])
    drawn = sample(
        np.repeat(logits, count, axis=0),
        Rules.stack([SamplingParams(**options)] * count),
        barrier_BV=np.zeros((1, vocabulary), np.float32),
        uniform_B=uniforms(3, 1, np.arange(count)),
    )
    counts = np.bincount(drawn, minlength=vocabulary)[places]
    assert counts.sum() == count
    left = np.array(probabilities) > 0
    assert not counts[~left].any()
    expected = np.array(probabilities)[left] * count
    assert chi_square(counts[left], expected) < CHI_SQUARE[4]


# Crowds

some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.0, 1.7]),
    top_k=st.sampled_from([None, None, 1, 5, 40, 500]),
    top_p=st.sampled_from([None, None, 0.2, 0.9, 0.999, ALMOST_ONE]),
    min_p=st.sampled_from([None, None, 0.01, 0.2]),
    typical_p=st.sampled_from([None, None, 0.2, 0.9]),
    repetition_penalty=st.sampled_from([None, None, 0.7, 1.3]),
    frequency_penalty=st.sampled_from([None, None, -0.3, 0.7]),
    presence_penalty=st.sampled_from([None, None, 0.4]),
)


@pytest.mark.parametrize("equals", [2, 8, 64, 128, 256])
@pytest.mark.parametrize("vocabulary", [300, 600, 1000])
def test_near_ties_of_typical_p_are_the_same_beside_rows_of_more_tokens(
    equals: int, vocabulary: int
) -> None:
    """One token against many equal ones, equally near the mean surprise: no neighbour decides."""
    rng = np.random.default_rng(equals)
    tied_V = np.full(vocabulary, -60.0, np.float32)
    tied_V[rng.permutation(vocabulary)[: equals + 1]] = -math.log(equals)
    tied_V[rng.integers(vocabulary)] = 0.0
    params = [SamplingParams(top_p=0.999, typical_p=0.3)] * 2
    barrier_1V = np.zeros((1, vocabulary), np.float32)

    def weights(others: int) -> bytes:
        other_V = np.full(vocabulary, -60.0, np.float32)
        other_V[:others] = 0.0
        logits_BV = np.stack([tied_V, other_V][: 1 + (others > 0)])
        with np.errstate(over="ignore", invalid="ignore"):
            urn = weigh(logits_BV, Rules.stack(params[: len(logits_BV)]), barrier_BV=barrier_1V)
        return urn.weights(np.zeros(1, np.int64), vocabulary).tobytes()

    alone = weights(0)
    assert {weights(others) for others in range(1, vocabulary, 7)} == {alone}


class Crowd:
    """Rows of logits with all that belongs to them; some are damaged, some may draw nothing."""

    def __init__(self, params: list[SamplingParams], vocabulary: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (len(params), vocabulary)
        self.params = params
        # Rounded, so that there are ties.
        self.logits_BV = (rng.standard_normal(shape) * 4).astype(np.float32).round(1)
        self.logits_BV[rng.random(len(params)) < 0.05] = np.nan
        is_allowed_BV = rng.random(shape) < 0.8
        is_allowed_BV[:, 0] = rng.random(len(params)) < 0.95
        self.barrier_BV = np.where(is_allowed_BV, 0.0, NO).astype(np.float32)
        self.bias_BV = rng.choice([0.0, 0.0, 0.0, -1.1, 3.3], shape).astype(np.float32)
        self.counts_BV = rng.choice([0, 0, 0, 1, 5], shape).astype(np.int32)
        self.uniform_B = rng.random(len(params))

    def take(self, rows: slice, order: Any = "C") -> tuple[list[bytes], list[int]]:
        """Each row's weights to the last bit, and its token."""
        given_BV = (self.logits_BV, self.barrier_BV, self.bias_BV, self.counts_BV)
        logits_BV, barrier_BV, bias_BV, counts_BV = (
            np.array(array_BV[rows], order=order) for array_BV in given_BV
        )
        rules = Rules.stack(self.params[rows])
        with np.errstate(over="ignore", invalid="ignore"):
            urn = weigh(
                logits_BV, rules, barrier_BV=barrier_BV, bias_BV=bias_BV, counts_BV=counts_BV
            )
        weights_BW = urn.weights(np.arange(len(logits_BV)), logits_BV.shape[1])
        tokens = sample(
            logits_BV,
            rules,
            barrier_BV=barrier_BV,
            bias_BV=bias_BV,
            counts_BV=counts_BV,
            uniform_B=self.uniform_B[rows],
        ).tolist()
        assert (np.isfinite(urn.peak_B1[:, 0]) == (np.array(tokens) != NONE)).all()
        # The weights of a row without a token mean nothing.
        bits = [
            b"" if token == NONE else row.tobytes()
            for row, token in zip(weights_BW, tokens, strict=True)
        ]
        return bits, tokens

    def check(self, order: Any) -> None:
        """Hold each row alone against itself in the crowd."""
        bits, tokens = self.take(slice(None), order)
        for row in range(len(self.params)):
            assert self.take(slice(row, row + 1)) == ([bits[row]], [tokens[row]])


@given(
    pool=st.lists(some_params, min_size=1, max_size=6),
    picks=st.lists(st.integers(0, 5), min_size=1, max_size=64),
    vocabulary=st.integers(2, 700) | st.sampled_from([64, 65, 128, SMALL, SMALL + 1, 640]),
    seed=st.integers(0, 1000),
    order=st.sampled_from(["C", "F"]),
)
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(
    pool: list[SamplingParams], picks: list[int], vocabulary: int, seed: int, order: str
) -> None:
    """Neighbours, their rules, their damage and the memory order change no weight and no draw."""
    Crowd([pool[pick % len(pool)] for pick in picks], vocabulary, seed).check(order)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("vocabulary", [67, 600, 5000, 9000])
def test_sixty_four_mixed_rows_have_the_same_bits_alone(vocabulary: int, order: str) -> None:
    """So it is where each row has other rules, up to vocabularies that NumPy sums up in parts."""
    values: dict[str, list[Any]] = {
        "temperature": [1.0, 0.0, 0.7],
        "top_k": [None, None, 40, 1],
        "top_p": [None, 0.9, None, 0.5, 0.95],
        "min_p": [None, None, None, None, None, 0.05],
        "typical_p": [None] * 6 + [0.8],
        "frequency_penalty": [None] * 7 + [0.5],
    }
    params = [
        SamplingParams(**{name: given[row % len(given)] for name, given in values.items()})
        for row in range(64)
    ]
    Crowd(params, vocabulary, 0).check(order)


@pytest.mark.parametrize("vocabulary", [67, 600])
def test_memory_order_moves_no_nucleus(vocabulary: int) -> None:
    """Fortran order, in which NumPy rounds sums otherwise, draws the same on the edge of top-p."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((64, vocabulary)) * 2).astype(np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    # p is where the first three tokens just about reach it: the last bit of a sum decides.
    top_three = -np.sort(-weights, axis=1)[:, :3].cumsum(axis=1)[:, 2]
    shares = (top_three / weights.sum(axis=1)).tolist()
    for name in ("top_p", "typical_p"):
        rules = Rules.stack([SamplingParams(**{name: share}) for share in shares])
        results = [
            weigh(
                np.array(logits, order=order),
                rules,
                barrier_BV=np.zeros(logits.shape, np.float32, order=order),
            ).weights(np.arange(64), vocabulary)
            for order in ("C", "F")
        ]
        assert results[0].tobytes() == results[1].tobytes()


def test_one_barrier_and_bias_serve_all_rows() -> None:
    """One row of them, for all, is the same as a copy for each."""
    rng = np.random.default_rng(1)
    for vocabulary in (65, 600):
        logits_BV = rng.standard_normal((9, vocabulary)).astype(np.float32)
        barrier_1V = np.where(rng.random((1, vocabulary)) < 0.7, 0.0, NO).astype(np.float32)
        bias_1V = rng.standard_normal((1, vocabulary)).astype(np.float32)
        rules = Rules.stack([SamplingParams(top_p=0.8)] * 9)
        one = weigh(logits_BV, rules, barrier_BV=barrier_1V, bias_BV=bias_1V)
        each = weigh(
            logits_BV,
            rules,
            barrier_BV=np.repeat(barrier_1V, 9, axis=0),
            bias_BV=np.repeat(bias_1V, 9, axis=0),
        )
        rows_B = np.arange(9)
        alone, shared = one.weights(rows_B, vocabulary), each.weights(rows_B, vocabulary)
        assert alone.tobytes() == shared.tobytes()


# Golden draws


def draw_case(case: dict[str, Any]) -> list[int]:
    """The tokens of sixteen positions: their logits are fractions of 16 that a formula gives."""
    position_K1, token_V = np.arange(16)[:, None], np.arange(case["vocabulary"])
    logits_KV = ((token_V * 37 + position_K1 * 29 + 11) % 101 - 50) / 16
    tokens: list[int] = sample(
        logits_KV.astype(np.float32),
        Rules.stack([SamplingParams(**case["options"])] * 16),
        barrier_BV=np.where(token_V % 10 == 9, NO, 0.0).astype(np.float32)[None],
        counts_BV=((token_V + position_K1) % 7 == 0).astype(np.int32) * 2,
        bias_BV=((token_V % 13 == 0) * 0.5).astype(np.float32)[None],
        uniform_B=uniforms(case["seed"], case["choice"], np.arange(16)),
    ).tolist()
    return tokens


@pytest.mark.parametrize(
    "case",
    json.loads(GOLDEN.read_text(encoding="utf-8")),
    ids=lambda case: f"{case['vocabulary']}-{'+'.join(case['options']) or 'none'}",
)
def test_golden_draws(case: dict[str, Any]) -> None:
    """For logits written down, seeds draw for ever the tokens that they drew in the beginning."""
    assert draw_case(case) == case["tokens"]
