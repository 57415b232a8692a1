import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.lone import FEW, LoneRow
from charloom.decoding.sampling import NEUTRAL, RECORD, SMALL, Rules, draw, record, weigh
from charloom.params import SamplingParams

NO = -math.inf
ALMOST_ONE = math.nextafter(1.0, 0.0)

# Any float32, many equal ones, and what a damaged network gives.
LOGITS = (
    st.floats(-12, 12, width=32)
    | st.integers(-3, 3).map(float)
    | st.floats(width=32, allow_nan=False)
    | st.just(NO)
)
UNIFORMS = st.floats(0.0, ALMOST_ONE) | st.sampled_from([0.0, 5e-324, 0.5, ALMOST_ONE])
SHARES = st.none() | st.floats(1e-9, 1.0) | st.sampled_from([0.5, 0.95, ALMOST_ONE, 1.0])

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-60, 1e-3, 0.8, 1.0, 1.3, 1e39])
    | st.floats(0.0, 1e308, allow_subnormal=True),
    top_p=SHARES,
    min_p=st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.0, 1e-50, 0.05, 1.0]),
)


def draw_alone(
    logits_V: NDArray[np.float32],
    options: SamplingParams,
    barrier_V: NDArray[np.float32],
    uniform: float,
) -> tuple[int | None, float]:
    """The token, where there is one, and the peak; by lists."""
    with np.errstate(over="ignore", invalid="ignore"):  # as `draw` asks
        token, peak = LoneRow(record(options), barrier_V).draw(logits_V, uniform)
    return (token if math.isfinite(peak) else None), float(peak)


def draw_among(
    logits_BV: NDArray[np.float32],
    options: list[SamplingParams],
    barrier_V: NDArray[np.float32],
    uniform_B: NDArray[np.float64],
) -> list[tuple[int | None, float]]:
    """The same for every row of a batch; by arrays."""
    with np.errstate(over="ignore", invalid="ignore"):
        urn = weigh(logits_BV, Rules.stack(options), barrier_BV=barrier_V[None])
        tokens = draw(urn, uniform_B).tolist()
    return [
        (token if math.isfinite(peak) else None, peak)
        for token, peak in zip(tokens, urn.peak_B1[:, 0].tolist(), strict=True)
    ]


def same(one: tuple[int | None, float], other: tuple[int | None, float]) -> bool:
    """Whether token and peak are the same; two peaks that are no numbers are."""
    return one[0] == other[0] and np.array_equal([one[1]], [other[1]], equal_nan=True)


@given(
    data=st.data(),
    vocabulary=st.integers(1, 12) | st.sampled_from([15, 16, 17, 65, FEW - 1, FEW]),
    options=st.lists(params, min_size=1, max_size=9),
)
def test_lists_draw_what_arrays_draw(
    data: st.DataObject, vocabulary: int, options: list[SamplingParams]
) -> None:
    """Whatever the logits, the rules and the company, token and peak are the sampler's."""
    rows = len(options)
    if vocabulary <= 12:
        numbers = st.lists(LOGITS, min_size=vocabulary, max_size=vocabulary)
        logits_BV = np.array([data.draw(numbers) for _ in options], np.float32)
        if data.draw(st.integers(0, 3), "broken") == 3:
            logits_BV[data.draw(st.integers(0, rows - 1)), -1] = np.nan
    else:
        rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
        spread = data.draw(st.sampled_from([0.1, 3.0, 30.0]))
        logits_BV = (rng.standard_normal((rows, vocabulary)) * spread).astype(np.float32)
        if data.draw(st.booleans(), "with ties"):
            logits_BV = logits_BV.round(1)
    forbidden = data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=3))
    barrier_V = np.zeros(vocabulary, np.float32)
    barrier_V[list(forbidden)] = NO
    uniform_B = np.array([data.draw(UNIFORMS) for _ in options])
    crowd = draw_among(logits_BV, options, barrier_V, uniform_B)
    for row in range(rows):
        alone = draw_alone(logits_BV[row], options[row], barrier_V, float(uniform_B[row]))
        assert same(alone, crowd[row])


def find_edges(weights_V: NDArray[np.float32]) -> list[float]:
    """Numbers below 1 at which another share of the weights is reached, and their neighbours."""
    reached_V = np.add.accumulate(weights_V, dtype=np.float64)
    shares = (reached_V / reached_V[-1]).tolist()
    near = {math.nextafter(share, side) for share in shares for side in (0.0, share, 1.0)}
    return sorted(share for share in near if share < 1.0)


@pytest.mark.parametrize("vocabulary", [2, 3, 17, 65, FEW])
@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0, 1.7])
def test_not_the_last_bit_differs(vocabulary: int, temperature: float) -> None:
    """At the very edges of what top-p keeps and of every token's share both decide alike."""
    rng = np.random.default_rng(vocabulary)
    logits_V = (rng.standard_normal(vocabulary) * 3).astype(np.float32)
    barrier_V = np.zeros(vocabulary, np.float32)

    def leave(options: SamplingParams) -> NDArray[np.float32]:
        urn = weigh(logits_V[None], Rules.stack([options]), barrier_BV=barrier_V[None])
        return urn.weights(np.zeros(1, np.int64), vocabulary)[0]

    ranked_V = np.sort(leave(SamplingParams(temperature=temperature)))[::-1]
    edges = find_edges(ranked_V)
    for p in (*rng.choice(edges, min(len(edges), 40), replace=False).tolist(), 1.0):
        options = SamplingParams(temperature=temperature, top_p=p)
        uniforms = find_edges(leave(options)) or [0.5]
        rows = len(uniforms)
        crowd = draw_among(
            np.repeat(logits_V[None], rows, axis=0), [options] * rows, barrier_V, np.array(uniforms)
        )
        lone = LoneRow(record(options), barrier_V)
        assert [lone.draw(logits_V, uniform) for uniform in uniforms] == crowd


@pytest.mark.parametrize("broken", [math.nan, math.inf, NO])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_peak_that_is_not_finite_tells_that_there_is_no_token(
    broken: float, temperature: float
) -> None:
    """Logits that are no numbers, or all -inf, raise nothing and show in the peak."""
    logits_V = np.full(5, NO, np.float32)
    logits_V[3] = broken
    options = SamplingParams(temperature=temperature, top_p=0.9)
    token, peak = draw_alone(logits_V, options, np.zeros(5, np.float32), 0.5)
    assert token is None
    assert not math.isfinite(peak)


def test_the_logits_stay_as_they_are() -> None:
    """What the network said belongs to the decoder."""
    logits_V = np.arange(5, dtype=np.float32)
    draw_alone(logits_V, SamplingParams(temperature=0.5), np.zeros(5, np.float32), 0.5)
    assert logits_V.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "is_able"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.8, "top_p": 0.95, "min_p": 0.1}, True),
        ({"top_k": 10**30, "typical_p": 1.0, "repetition_penalty": 1.0}, True),
        ({"top_k": 3}, False),
        ({"typical_p": 0.9}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
    ],
)
def test_lists_know_temperature_top_p_and_min_p(options: dict[str, Any], is_able: bool) -> None:
    """For every other rule that is not neutral, and for wide rows, there is the sampler."""
    row = record(SamplingParams(**options))
    assert LoneRow.can_draw(row, FEW) == is_able
    assert not LoneRow.can_draw(row, FEW + 1)


def test_no_rule_is_forgotten() -> None:
    """A rule that the sampler will learn is one that lists do not know."""
    for name in set(RECORD.names or ()) - {"temperature", "top_p", "min_p"}:
        row = NEUTRAL.copy()
        row[name] = 0.5 if row.dtype[name].kind == "f" else 2
        assert not LoneRow.can_draw(row, 2)


def test_lists_serve_only_rows_that_arrays_add_up_one_by_one() -> None:
    """In a larger vocabulary the sampler adds up by strides, which are other sums."""
    assert FEW <= SMALL
