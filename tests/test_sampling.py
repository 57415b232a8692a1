import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.sampling import (
    NUCLEUS_GUESS,
    Floats,
    Rules,
    allow,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    philox,
    sample,
    temper,
    uniforms,
)
from charloom.errors import ModelError
from charloom.params import SEED_LIMIT, SamplingParams

NO = -math.inf
ALMOST_ONE = math.nextafter(1.0, 0.0)


def rows(*values: Sequence[float]) -> Floats:
    """Some logits."""
    return np.array(values, np.float64)


def logs(*probabilities: float) -> list[float]:
    """Logits that measure from the highest, as `temper` leaves them."""
    return [math.log(p / max(probabilities)) if p else NO for p in probabilities]


def kept(scores: Floats) -> list[list[int]]:
    """The tokens that each row can still draw."""
    return [np.flatnonzero(row > NO).tolist() for row in scores]


def draw_one(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    uniform: float,
    seen: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> int:
    """One row through all rules."""
    vocabulary = len(logits)
    seen_V = np.isin(np.arange(vocabulary), seen)
    allowed_V = np.isin(np.arange(vocabulary), range(vocabulary) if allowed is None else allowed)
    tokens = sample(
        np.array([logits], np.float32),
        Rules.stack([params]),
        seen_BV=seen_V[None],
        allowed_BV=allowed_V[None],
        uniform_B=np.array([uniform]),
    )
    return int(tokens[0])


def test_penalty_table() -> None:
    """Seen tokens lose: 3 / 2 = 1.5, -3 x 2 = -6, 0 stays 0; unseen ones stay as they are."""
    logits = rows([3, -3, 0, 3, -3], [3, -3, 0, 3, -3])
    seen = np.array([[True, True, True, False, False]] * 2)
    result = penalise(logits, seen, np.array([2.0, 0.5]))
    assert result.tolist() == [[1.5, -6, 0, 3, -3], [6, -1.5, 0, 3, -3]]


def test_allowed_tokens_table() -> None:
    """What is not allowed cannot be drawn, be its logit what it may."""
    allowed = np.array([[False, True, True], [True, True, False]])
    result = allow(rows([9, 1, 2], [9, 1, math.nan]), allowed)
    assert result.tolist() == [[NO, 1, 2], [9, 1, NO]]


def test_temperature_table() -> None:
    """Logits measure from the highest, over the temperature: (1 - 3) / 0.5 = -4, / 2 = -1."""
    result = temper(rows([1, 3, 2], [1, 3, 2], [1, 3, 2]), np.array([0.5, 1.0, 2.0]))
    assert result.tolist() == [[-4, 0, -2], [-2, 0, -1], [-1, 0, -0.5]]


def test_temperature_zero_takes_the_most_likely_token_of_lowest_id() -> None:
    """At temperature 0 one token is left; a tie goes to the lower token id."""
    result = temper(rows([1, 5, 5, 2], [7, 5, 5, 7]), np.zeros(2))
    assert kept(result) == [[1], [0]]
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert draw(result, np.full(2, uniform)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    """Towards 0 the most likely token alone is left, without a warning or a NaN."""
    result = temper(rows([1, 3, 2, -1e30]), np.array([temperature]))
    assert draw(result, np.array([ALMOST_ONE])).tolist() == [1]
    assert not np.isnan(result).any()


@pytest.mark.parametrize("temperature", [1e30, 1.7e308])
def test_a_huge_temperature_draws_evenly(temperature: float) -> None:
    """Towards infinity all allowed tokens are equally likely, and the others stay impossible."""
    result = temper(rows([1, 30, NO, -20, 2]), np.array([temperature]))
    shares = np.arange(8) / 8
    drawn = [int(draw(result, np.array([share]))[0]) for share in shares]
    assert drawn == [0, 0, 1, 1, 3, 3, 4, 4]


def test_top_k_table() -> None:
    """Each row keeps its own k highest; of equal ones those of lower id."""
    logits = rows([1, 4, 3, 2], [1, 4, 3, 2], [2, 5, 2, 2], [2, 5, 2, 2], [0, 0, 0, 0])
    result = keep_top_k(logits, np.array([1, 3, 2, 3, 99]))
    assert kept(result) == [[1], [1, 2, 3], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert result[result > NO].tolist() == logits[result > NO].tolist()


def test_top_p_table() -> None:
    """The fewest tokens that reach p: 0.5 reaches 0.5, 0.51 needs 0.5 + 0.25, and so on."""
    probabilities = (0.125, 0.5, 0.125, 0.25)
    wanted = [0.1, 0.5, 0.51, 0.75, 0.76, 0.9, 1.0]
    result = keep_top_p(rows(*[logs(*probabilities)] * len(wanted)), np.array(wanted))
    assert kept(result) == [
        [1],
        [1],
        [1, 3],
        [1, 3],
        [0, 1, 3],  # tokens 0 and 2 are equal: the lower id first
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_top_p_counts_what_earlier_rules_left() -> None:
    """After top-k the probabilities are those among the tokens kept."""
    scores = rows(logs(0.4, 0.3, 0.2, 0.1))
    after = keep_top_p(keep_top_k(scores, np.array([2])), np.array([0.57]))
    assert kept(after) == [[0]]  # 0.4 of 0.7 is 0.571
    assert kept(keep_top_p(scores, np.array([0.57]))) == [[0, 1]]


def test_min_p_table() -> None:
    """A token stays when it has at least p times the highest probability."""
    wanted = [0.0, 0.1, 0.25, 0.26, 0.5, 0.51, 1.0]
    result = keep_min_p(rows(*[[0.0, math.log(0.5), math.log(0.25), NO]] * 7), np.array(wanted))
    assert kept(result) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0], [0]]


def test_draw_table() -> None:
    """Shares lie by token id: [0, 1/4) is token 0, [1/4, 3/4) token 2, [3/4, 1) token 3."""
    scores = rows(*[logs(0.25, 0, 0.5, 0.25, 0)] * 7)
    uniform = np.array([0.0, 0.2, 0.25, 0.5, 0.74, 0.75, ALMOST_ONE])
    assert draw(scores, uniform).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_rules_act_in_the_documented_order() -> None:
    """Penalty before mask before temperature before top-k, each on what the one before left."""
    logits = [4.0, 3.0, 2.0, 1.0]
    every = (0.0, 0.3, 0.6, ALMOST_ONE)
    # Penalty 4 brings the seen token 0 to logit 1, so the two highest are tokens 1 and 2.
    params = SamplingParams(repetition_penalty=4.0, top_k=2, temperature=10)
    assert {draw_one(logits, params, uniform=u, seen=[0]) for u in every} == {1, 2}
    # A masked token takes no place among the k.
    assert {draw_one(logits, params, uniform=u, allowed=[0, 2, 3]) for u in every} == {0, 2}
    # The temperature flattens before top-p counts: all four are needed for 0.8.
    flat = SamplingParams(temperature=1000, top_p=0.8)
    assert {draw_one(logits, flat, uniform=u) for u in every} == {0, 1, 2, 3}
    # min-p comes after the temperature: at 0.1 the second is exp(-10) of the first.
    sharp = SamplingParams(temperature=0.1, min_p=0.01)
    assert {draw_one(logits, sharp, uniform=u) for u in every} == {0}


@pytest.mark.parametrize(
    ("logits", "allowed", "shown"),
    [
        ([1.0, 2.0], [], "-inf"),
        ([NO, 2.0], [0], "-inf"),
        ([math.nan, 2.0], [0, 1], "nan"),
        ([math.inf, 2.0], [0, 1], "inf"),
    ],
)
def test_a_row_without_a_token_is_an_error(
    logits: list[float], allowed: list[int], shown: str
) -> None:
    """Masked, damaged and infinite logits are told in a sentence, not drawn from."""
    with pytest.raises(ModelError, match=rf"no token to draw \(row 0\).* is {shown};"):
        draw_one(logits, SamplingParams(), uniform=0.5, allowed=allowed)


def test_damage_outside_the_allowed_tokens_is_no_error() -> None:
    """A logit that is not a number does no harm where it may not be drawn."""
    assert draw_one([math.nan, 2.0], SamplingParams(), uniform=0.5, allowed=[1]) == 1


def brute_force_distribution(logits: NDArray[np.float32], params: SamplingParams) -> list[float]:
    """The same rules, told plainly for one row: sorted lists of Python's own numbers."""
    scores = [float(value) for value in logits]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    temperature = params.temperature
    if temperature == 0:
        return [1.0 if token == order[0] else 0.0 for token in range(len(scores))]
    weights = {token: math.exp((scores[token] - scores[order[0]]) / temperature) for token in order}
    if params.top_k is not None:
        order = order[: params.top_k]
    if params.top_p is not None:
        total = math.fsum(weights[token] for token in order)
        reached = 0.0
        nucleus: list[int] = []
        for token in order:
            if nucleus and reached >= params.top_p * total:
                break
            nucleus.append(token)
            reached += weights[token]
        order = nucleus
    if params.min_p is not None:
        order = [token for token in order if weights[token] >= params.min_p]
    total = math.fsum(weights[token] for token in order)
    return [weights[token] / total if token in order else 0.0 for token in range(len(scores))]


options = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.sampled_from([0.1, 0.37, 0.7, 0.93, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.013, 0.11, 0.37]),
)


@given(
    logits=st.lists(st.integers(-300, 300).map(lambda n: n / 97), min_size=1, max_size=10),
    params=options,
)
def test_distribution_equals_a_plain_second_implementation(
    logits: list[float], params: SamplingParams
) -> None:
    """Sweeping the uniform over [0, 1) draws each token in proportion to its probability."""
    expected = brute_force_distribution(np.array(logits, np.float32), params)
    uniform = (np.arange(512) + 0.5) / 512
    drawn = sample(
        np.array([logits] * 512, np.float32),
        Rules.stack([params] * 512),
        seen_BV=np.zeros((512, len(logits)), np.bool_),
        allowed_BV=np.ones((512, len(logits)), np.bool_),
        uniform_B=uniform,
    )
    shares = np.bincount(drawn, minlength=len(logits)) / 512
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1.01 / 512)


@given(
    params=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
            top_k=st.none() | st.integers(1, 500),
            top_p=st.none() | st.sampled_from([0.2, 0.9, 0.999]),
            min_p=st.none() | st.sampled_from([0.01, 0.2]),
            repetition_penalty=st.none() | st.sampled_from([0.7, 1.3]),
        ),
        min_size=1,
        max_size=9,
    ),
    vocabulary=st.sampled_from([3, 67, 401]),
    seed=st.integers(0, 1000),
    fortran=st.booleans(),
)
def test_a_row_is_drawn_the_same_alone_and_in_a_crowd(
    params: list[SamplingParams], vocabulary: int, seed: int, fortran: bool
) -> None:
    """Neighbours, their rules and the memory order of the logits change no draw."""
    rng = np.random.default_rng(seed)
    shape = (len(params), vocabulary)
    logits = (rng.standard_normal(shape) * 3).astype(np.float32).round(1)
    seen = rng.random(shape) < 0.2
    allowed = rng.random(shape) < 0.8
    allowed[:, 0] = True
    uniform = rng.random(len(params))
    together = sample(
        np.asfortranarray(logits) if fortran else logits,
        Rules.stack(params),
        seen_BV=seen,
        allowed_BV=allowed,
        uniform_B=uniform,
    )
    for row in range(len(params)):
        one = slice(row, row + 1)
        alone = sample(
            logits[one],
            Rules.stack(params[one]),
            seen_BV=seen[one],
            allowed_BV=allowed[one],
            uniform_B=uniform[one],
        )
        assert alone.tolist() == together[one].tolist()


def test_scores_have_the_same_bits_alone_and_in_a_crowd() -> None:
    """Not only draws but every bit of what the rules leave is independent of other rows."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 67)) * 3
    temperature = rng.choice([0.0, 0.5, 1.0, 2.0], 64)
    top_p = rng.choice([0.5, 0.9, 1.0], 64)
    together = keep_top_p(temper(logits, temperature), top_p)
    for row in range(64):
        one = slice(row, row + 1)
        alone = keep_top_p(temper(logits[one].copy(), temperature[one]), top_p[one])
        assert alone.tobytes() == together[one].tobytes()


def test_memory_order_moves_no_nucleus() -> None:
    """Fortran order, in which NumPy rounds sums otherwise, draws the same on the edge of top-p."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((64, 67)) * 2).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    # p is where the first three tokens just about reach it: the last bit of a sum decides.
    top_three = -np.sort(-weights, axis=1)[:, :3].cumsum(axis=1)[:, 2]
    shares = (top_three / weights.sum(axis=1)).tolist()
    rules = Rules.stack([SamplingParams(top_p=share) for share in shares])
    nothing, everything = np.zeros((64, 67), np.bool_), np.ones((64, 67), np.bool_)
    uniform = np.full(64, ALMOST_ONE)
    drawn = [
        sample(
            np.array(logits, order=order),
            rules,
            seen_BV=np.array(nothing, order=order),
            allowed_BV=np.array(everything, order=order),
            uniform_B=uniform,
        ).tolist()
        for order in ("C", "F")
    ]
    assert drawn[0] == drawn[1]


def test_top_p_of_a_large_vocabulary_needs_no_full_sort_and_is_exact() -> None:
    """A nucleus within and one beyond the first guess hold exactly the tokens of a full sort."""
    rng = np.random.default_rng(0)
    logits = temper(rng.standard_normal((4, 3000)).round(2), np.array([0.1, 1.0, 1.0, 3.0]))
    p = np.array([0.5, 0.1, 0.9, 0.999])
    for row, tokens in enumerate(kept(keep_top_p(logits, p))):
        weights = np.exp(logits[row])
        order = np.argsort(-weights, kind="stable")
        size = int((weights[order].cumsum() < p[row] * weights.sum()).sum()) + 1
        assert tokens == sorted(order[:size].tolist())
    assert len(kept(keep_top_p(logits, p))[3]) > NUCLEUS_GUESS


@given(
    weights=st.lists(
        st.floats(0, 1e-3) | st.just(0.0) | st.floats(1, 1e6), min_size=1, max_size=60
    ),
    uniform=st.just(0.0) | st.just(ALMOST_ONE) | st.floats(0, ALMOST_ONE),
)
def test_an_impossible_token_is_never_drawn(weights: list[float], uniform: float) -> None:
    """Whatever the uniform in [0, 1), the token drawn has a probability above 0."""
    if not any(weights):
        weights.append(1.0)
    with np.errstate(divide="ignore"):
        scores = temper(np.log(np.array([weights])), np.ones(1))
    (token,) = draw(scores, np.array([uniform]))
    assert np.exp(scores[0, token]) > 0


# Upper 1e-4 quantiles of the chi-square distribution. The draws are fixed, so this cannot flicker.
CHI_SQUARE = {4: 23.51, 63: 112.0}


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic."""
    return float((((counts - expected) ** 2) / expected).sum())


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of one text pass a chi-square test against the probabilities."""
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    count = 20_000
    scores = np.tile(np.array(logs(*probabilities)), (count, 1))
    drawn = draw(scores, uniforms(7, 0, np.arange(count)))
    counts = np.bincount(drawn, minlength=5)
    assert chi_square(counts, probabilities * count) < CHI_SQUARE[4]


@pytest.mark.parametrize("along", ["position", "seed", "choice"])
def test_uniforms_are_uniform_along_every_axis(along: str) -> None:
    """Neighbouring positions, seeds and choices each give numbers that pass a chi-square test."""
    count = 6400
    if along == "position":
        numbers = uniforms(123, 4, np.arange(count))
    elif along == "seed":
        numbers = np.concatenate([uniforms(seed, 0, np.arange(1)) for seed in range(count)])
    else:
        numbers = np.concatenate([uniforms(5, choice, np.arange(1)) for choice in range(count)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = np.bincount((numbers * 64).astype(np.int64), minlength=64)
    assert chi_square(counts, np.full(64, count / 64)) < CHI_SQUARE[63]
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            [0x00000000, 0x00000000, 0x00000000, 0x00000000],
            [0x00000000, 0x00000000],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
            [0xFFFFFFFF, 0xFFFFFFFF],
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    """Philox4x32-10 agrees with the known answers that come with Random123."""
    result = philox(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert result.tolist() == words


def test_uniforms_are_the_counter_they_say() -> None:
    """The first two words of Philox at (position, choice) under the seed make 53 bits."""
    seed, choice, position = SEED_LIMIT - 2, 2**32 - 1, 2**40 + 3
    words = philox(
        np.array([position % 2**32, position // 2**32, choice, 0], np.uint32),
        np.array([seed % 2**32, seed // 2**32], np.uint32),
    ).tolist()
    expected = ((words[0] << 21) | (words[1] >> 11)) / 2**53
    assert uniforms(seed, choice, np.array([position])).tolist() == [expected]


def test_a_uniform_depends_on_its_position_alone() -> None:
    """Made one by one, in any order or in a block, the numbers are the same."""
    block = uniforms(9, 2, np.arange(300))
    assert [float(uniforms(9, 2, np.array([p]))[0]) for p in (299, 0, 17)] == block[
        [299, 0, 17]
    ].tolist()
    assert len({*block.tolist(), *uniforms(9, 3, np.arange(300)).tolist()}) == 600


def test_rules_stack_what_was_not_given_as_neutral() -> None:
    """Options that are None change no bit of a row that stands beside one that has them."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 50)).astype(np.float32)
    rules = Rules.stack(
        [
            SamplingParams(),
            SamplingParams(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2, temperature=0.5),
        ]
    )
    assert rules.top_k_B.tolist() == [np.iinfo(np.int64).max, 3]
    for uniform in rng.random(20):
        both = sample(
            logits,
            rules,
            seen_BV=np.ones((2, 50), np.bool_),
            allowed_BV=np.ones((2, 50), np.bool_),
            uniform_B=np.array([uniform, uniform]),
        )
        plain = draw(logits[:1].astype(np.float64) - logits[:1].max(), np.array([uniform]))
        assert both[0] == plain[0]
