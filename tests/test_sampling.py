import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.decoding.sampling import (
    COLDEST,
    NEUTRAL,
    NONE,
    SMALL,
    STRIDE,
    Lot,
    Rules,
    Urn,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    penalise_presence,
    penalise_repetition,
    record,
    sample,
    temper,
    weigh,
)
from charloom.params import SamplingParams

NO = -math.inf
ALMOST_ONE = math.nextafter(1.0, 0.0)
LARGE = SMALL + 2 * STRIDE


def rows(*values: Sequence[float]) -> NDArray[np.float32]:
    """Some rows of plain numbers."""
    return np.array(values, np.float32)


def column(*values: float) -> NDArray[np.float32]:
    """A parameter of each row."""
    return np.array(values, np.float32)[:, None]


def kept(weights: NDArray[np.float32]) -> list[list[int]]:
    """The tokens that each row can still draw."""
    return [np.flatnonzero(row > 0).tolist() for row in weights]


def spread(
    weights: NDArray[np.float32], width: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The same tokens in a vocabulary of some width, where all others weigh nothing; their ids."""
    count = weights.shape[1]
    places = np.arange(count) if width == 0 else np.linspace(0, width - 1, count).astype(np.int64)
    wide = np.zeros((len(weights), width or count), np.float32)
    wide[:, places] = weights
    return wide, places


def urn_of(weights: NDArray[np.float32]) -> Urn:
    """An urn that holds a weight for every token."""
    return Urn((Lot(None, weights, None),), np.zeros((len(weights), 1), np.float32))


def weigh_rows(
    logits: NDArray[np.float32],
    params: Sequence[SamplingParams],
    *,
    counts: Sequence[int] | None = None,
    bias: Sequence[float] | None = None,
    allowed: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """What the rules leave of each row; counts, bias and allowed tokens are the same for all."""
    vocabulary = logits.shape[1]
    barrier_V = np.zeros(vocabulary, np.float32)
    if allowed is not None:
        barrier_V[:] = NO
        barrier_V[list(allowed)] = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # as `weigh` asks
        urn = weigh(
            logits,
            Rules.stack(params),
            barrier_BV=barrier_V[None],
            bias_BV=None if bias is None else rows(bias),
            counts_BV=np.array([counts or [0] * vocabulary] * len(logits), np.int32),
        )
    return urn.weights(np.arange(len(logits)), vocabulary)


def weigh_one(logits: Sequence[float], **options: Any) -> list[float]:
    """One row through all rules but the draw; the options may hold counts, bias and allowed."""
    outer = {name: options.pop(name, None) for name in ("counts", "bias", "allowed")}
    (weights_V,) = weigh_rows(rows(logits), [SamplingParams(**options)], **outer)
    result: list[float] = weights_V.tolist()
    return result


def draw_rows(
    logits: NDArray[np.float32],
    params: SamplingParams,
    uniform: float,
    *,
    barrier: NDArray[np.float32] | None = None,
) -> list[int]:
    """One token per row by all rules."""
    tokens: list[int] = sample(
        logits,
        Rules.stack([params] * len(logits)),
        barrier_BV=np.zeros((1, logits.shape[1]), np.float32) if barrier is None else barrier,
        uniform_B=np.full(len(logits), uniform),
        counts_BV=np.zeros(logits.shape, np.int32),
    ).tolist()
    return tokens


# The rules, one by one


def test_bias_table() -> None:
    """A bias is added to its token's logit: log 2 doubles a weight, -100 all but forbids."""
    weights = weigh_one([1, 1, 1, 0], bias=[math.log(2), 0, -100, 1])
    assert weights == pytest.approx([1, 0.5, 0, 0.5], abs=1e-7)


def test_repetition_penalty_table() -> None:
    """Seen tokens lose: 3 / 2 = 1.5, -3 x 2 = -6, 0 stays 0; unseen ones stay as they are."""
    scores = rows([3, -3, 0, 3, -3, NO], [3, -3, 0, 3, -3, NO])
    penalise_repetition(scores, column(2, 0.5), np.array([[1, 7, 1, 0, 0, 1]] * 2))
    assert scores.tolist() == [[1.5, -6, 0, 3, -3, NO], [6, -1.5, 0, 3, -3, NO]]


def test_frequency_penalty_table() -> None:
    """Each occurrence costs the penalty: 3 - 2 x 0.5 = 2; a negative one makes repeating likely."""
    scores = rows([3, 3, 3, NO], [3, 3, 3, NO], [3, 3, 3, NO])
    counts = np.array([[0, 1, 2, 3]] * 3, np.int32)
    penalise_presence(scores, column(0.5, -0.5, 0), None, counts)
    assert scores.tolist() == [[3, 2.5, 2, NO], [3, 3.5, 4, NO], [3, 3, 3, NO]]


def test_presence_penalty_table() -> None:
    """What the text holds costs the penalty once, however often it occurs."""
    scores = rows([3, 3, 3, NO], [3, 3, 3, NO], [3, 3, 3, NO])
    counts = np.array([[0, 1, 2, 3]] * 3, np.int32)
    penalise_presence(scores, None, column(0.5, -0.5, 0), counts)
    assert scores.tolist() == [[3, 2.5, 2.5, NO], [3, 3.5, 3.5, NO], [3, 3, 3, NO]]


def test_frequency_and_presence_penalties_add_up() -> None:
    """A token that occurs three times costs three times the one and once the other."""
    scores = rows([3, 3, 3])
    penalise_presence(scores, column(0.25), column(1), np.array([[0, 1, 3]], np.int32))
    assert scores.tolist() == [[3, 1.75, 1.25]]


def test_barrier_table() -> None:
    """What is not allowed cannot be drawn, be its logit or its bias what it may."""
    assert weigh_one([9, 1, 1], allowed=[1, 2]) == [0, 1, 1]
    assert weigh_one([9, 1, 1], allowed=[1, 2], bias=[100, 0, 0]) == [0, 1, 1]
    assert weigh_one([9, 1, 1], allowed=[1], top_k=3, repetition_penalty=2, counts=[1, 0, 9]) == [
        0,
        1,
        0,
    ]


def test_temperature_table() -> None:
    """Scores measure from the highest, over the temperature: -2 / 0.5 = -4, -2 / 2 = -1."""
    scores = rows(*[[-2, 0, -1]] * 3)
    temper(scores, Rules.stack([SamplingParams(temperature=value) for value in (0.5, 1.0, 2.0)]))
    assert scores.tolist() == [[-4, 0, -2], [-2, 0, -1], [-1, 0, -0.5]]


@pytest.mark.parametrize("width", [0, SMALL, LARGE])
def test_top_k_table(width: int) -> None:
    """Each row keeps its own k highest; of equal ones those of lower id."""
    plain = rows(
        [0.1, 1, 0.5, 0.2],
        [0.1, 1, 0.5, 0.2],
        [0.2, 1, 0.2, 0.2],
        [0.2, 1, 0.2, 0.2],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [0, 1, 0, 0],
    )
    weights, places = spread(plain, width)
    before = weights.copy()
    keep_top_k(weights, np.array([1, 3, 2, 3, 2, 999, 3])[:, None])
    wanted = [[1], [1, 2, 3], [0, 1], [0, 1, 2], [0, 1], [0, 1, 2, 3], [1]]
    assert kept(weights) == [places[row].tolist() for row in wanted]
    assert weights[weights > 0].tolist() == before[weights > 0].tolist()


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 130, 511, 512, 513, 600, 1024])
@pytest.mark.parametrize("k", [1, 2, 5, 8, 9, 16, 64, 700])
def test_top_k_keeps_k_of_any_vocabulary(vocabulary: int, k: int) -> None:
    """Whatever its size, and however many are equal, k tokens are left, or all there are."""
    logits = (np.arange(vocabulary) * 37 % 101 // 4).astype(np.float32)[None]
    weights = weigh_rows(logits, [SamplingParams(top_k=k)])
    order = np.lexsort((np.arange(vocabulary), -logits[0]))
    assert kept(weights) == [sorted(order[:k].tolist())]


@pytest.mark.parametrize("width", [0, SMALL, LARGE])
def test_top_p_table(width: int) -> None:
    """The fewest tokens that reach p: 0.5 reaches 0.5, 0.51 needs 0.5 + 0.25, and so on."""
    wanted = [5e-324, 0.1, 0.5, 0.51, 0.75, 0.76, 0.9, ALMOST_ONE, 1.0]
    weights, places = spread(rows(*[[0.25, 1, 0.25, 0.5]] * len(wanted)), width)
    idle = np.flatnonzero(np.array(wanted) == 1.0)
    keep_top_p(weights, np.array(wanted)[:, None], idle)
    assert kept(weights) == [
        places[row].tolist()
        for row in (
            [1],
            [1],
            [1],
            [1, 3],
            [1, 3],
            [0, 1, 2, 3],  # tokens 0 and 2 are equal and stay together
            [0, 1, 2, 3],
            [0, 1, 2, 3],
            [0, 1, 2, 3],
        )
    ]


@pytest.mark.parametrize("vocabulary", [5, 65, SMALL, SMALL + 1, 1000])
def test_top_p_keeps_all_of_equal_tokens(vocabulary: int) -> None:
    """Among tokens of one probability there is no reason to leave any out."""
    weights = weigh_rows(np.ones((1, vocabulary), np.float32), [SamplingParams(top_p=0.01)])
    assert weights.tolist() == [[1.0] * vocabulary]


@pytest.mark.parametrize(("p", "count"), [(0.005, 6), (0.0625, 64), (0.5, 512), (0.95, 973)])
def test_top_p_counts_nearly_equal_tokens(p: float, count: int) -> None:
    """Of 1,024 tokens that hardly differ it takes p times as many: none is left out too early."""
    logits = -np.linspace(0, 2.0**-9, 1024, dtype=np.float32)[None]
    (tokens,) = kept(weigh_rows(logits, [SamplingParams(top_p=p)]))
    assert tokens == list(range(len(tokens)))
    assert len(tokens) == pytest.approx(count, abs=1)


@pytest.mark.parametrize("seed", range(20))
def test_top_p_just_below_1_keeps_nearly_all(seed: int) -> None:
    """Rounding of sums never makes the nucleus collapse: it misses p by no more than rounding."""
    logits = np.random.default_rng(seed).standard_normal((1, 1000)).astype(np.float32) * 5
    every = weigh_rows(logits, [SamplingParams()]).astype(np.float64)
    for p in (ALMOST_ONE, 1 - 1e-15, 1 - 1e-12, 1 - 1e-6):
        (weights,) = weigh_rows(logits, [SamplingParams(top_p=p)])
        assert weights.sum(dtype=np.float64) / every.sum() > p - 1e-14


def test_min_p_table() -> None:
    """A token stays when it has at least p times the highest probability."""
    wanted = [0.0, 0.1, 0.25, 0.26, 0.5, 0.51, 1.0]
    weights = rows(*[[1.0, 0.5, 0.25, 0.0]] * 7)
    keep_min_p(weights, column(*wanted))
    assert kept(weights) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1], [0, 1], [0], [0]]


@pytest.mark.parametrize("width", [0, LARGE])
def test_typical_p_table(width: int) -> None:
    """Of 1/2, 1/4, 1/8, 1/8 the mean surprise is 1.75 bits: nearest is 1/4, then 1/2, then 1/8."""
    wanted = [5e-324, 0.25, 0.26, 0.75, 0.76, 0.875, 0.88, 1.0]
    weights, places = spread(rows(*[[0.25, 1, 0.25, 0.5]] * len(wanted)), width)
    keep_typical_p(weights, np.array(wanted)[:, None])
    assert kept(weights) == [
        places[row].tolist()
        for row in (
            [3],
            [3],
            [1, 3],
            [1, 3],
            [0, 1, 3],  # tokens 0 and 2 are equal: the lower id first
            [0, 1, 3],
            [0, 1, 2, 3],
            [0, 1, 2, 3],
        )
    ]


def test_draw_table() -> None:
    """Shares lie by token id: [0, 1/4) is token 0, [1/4, 3/4) token 2, [3/4, 1) token 3."""
    weights = rows(*[[0.5, 0, 1, 0.5, 0]] * 7)
    uniform = np.array([0.0, 0.2, 0.25, 0.5, 0.74, 0.75, ALMOST_ONE])
    assert draw(urn_of(weights), uniform).tolist() == [0, 0, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "places", [[0, 1, 2], [5, 70, 600], [63, 64, 127], [128, 190, 191], [61, 62, LARGE - 1]]
)
def test_draw_table_of_a_large_vocabulary(places: list[int]) -> None:
    """The same shares, whichever strides the tokens lie in."""
    weights = np.zeros((7, LARGE), np.float32)
    weights[:, places] = [0.5, 1, 0.5]
    uniform = np.array([0.0, 0.2, 0.25, 0.5, 0.74, 0.75, ALMOST_ONE])
    first, second, third = places
    wanted = [first, first, second, second, second, third, third]
    assert draw(urn_of(weights), uniform).tolist() == wanted


def test_a_draw_that_rounds_out_of_its_stride_stays_in_it() -> None:
    """Where the sum up to a stride cannot be told from the place, no token without weight falls."""
    weights = np.zeros((1, LARGE), np.float32)
    # The third stride's sum, 1 + 3/2 ulp, is rounded up, and less its share again, above the place.
    weights[0, [0, 64, 128 + 5]] = [1.0, 2.0**-52, 2.0**-53]
    assert draw(urn_of(weights), np.array([ALMOST_ONE])).tolist() == [128 + 5]


# The order


@pytest.mark.parametrize(
    ("logits", "options", "scores"),
    [
        # Bias, then repetition: (1 - 3) x 2 = -4, not 1 / 2 - 3.
        ([1, 0], {"bias": [-3, 0], "repetition_penalty": 2}, [-4, 0]),
        # Repetition, then presence: 4 / 2 - 1 = 1, not (4 - 1) / 2.
        ([4, 3], {"repetition_penalty": 2, "presence_penalty": 1}, [1, 3]),
        # Repetition, then frequency: 4 / 2 - 2 x 1 = 0, not (4 - 2) / 2.
        ([4, 3], {"repetition_penalty": 2, "frequency_penalty": 1}, [0, 3]),
        # Penalties, then temperature: (4 - 1) / 0.5 = 6, not 4 / 0.5 - 1.
        ([4, 4], {"presence_penalty": 1, "temperature": 0.5}, [6, 8]),
        # Bias, then temperature: (1 - 1) / 0.5 = 0, not 1 / 0.5 - 1.
        ([1, 1], {"bias": [-1, 0], "temperature": 0.5}, [0, 2]),
    ],
)
def test_rules_on_scores_act_in_the_documented_order(
    logits: list[float], options: dict[str, Any], scores: list[float]
) -> None:
    """Bias, repetition, frequency and presence, temperature: worked out where order matters."""
    weights = weigh_one(logits, counts=[2, 0], **options)
    highest = max(scores)
    assert weights == pytest.approx([math.exp(score - highest) for score in scores], rel=1e-6)


@pytest.mark.parametrize(
    ("shares", "options", "tokens"),
    [
        # A token that is not allowed takes no place among the k, nor in the nucleus.
        ([0.4, 0.3, 0.2, 0.1], {"allowed": [0, 2, 3], "top_k": 2}, [0, 2]),
        ([0.4, 0.3, 0.2, 0.1], {"allowed": [2, 3], "top_p": 0.6}, [2]),
        ([0.4, 0.3, 0.2, 0.1], {"allowed": [1, 2], "temperature": 0}, [1]),
        # Penalties move tokens out of the k.
        ([0.4, 0.3, 0.2, 0.1], {"counts": [1, 0, 0, 0], "presence_penalty": 2, "top_k": 2}, [1, 2]),
        # A bias moves a token into them.
        ([0.4, 0.3, 0.2, 0.1], {"bias": [0, 0, 0, 9], "top_k": 2}, [0, 3]),
        # The temperature flattens before top-p counts, and sharpens before min-p does.
        ([0.4, 0.3, 0.2, 0.1], {"temperature": 1000, "top_p": 0.8}, [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], {"temperature": 0.1, "min_p": 0.1}, [0]),
        # Top-k, then top-p: 0.4 of 0.7 is 0.571.
        ([0.4, 0.3, 0.2, 0.1], {"top_k": 2, "top_p": 0.57}, [0]),
        ([0.4, 0.3, 0.2, 0.1], {"top_p": 0.57}, [0, 1]),
        # Top-p, then min-p: among 0.5, 0.3 and 0.12 the first two would reach 0.85.
        ([0.5, 0.3, 0.12, 0.08], {"top_p": 0.85, "min_p": 0.2}, [0, 1, 2]),
        # Min-p, then typical-p: of 2/3 and 1/3 the first is nearer to the mean, of all it is not.
        ([0.5, 0.25, 0.125, 0.125], {"min_p": 0.5, "typical_p": 0.6}, [0]),
        ([0.5, 0.25, 0.125, 0.125], {"typical_p": 0.6}, [0, 1]),
    ],
)
@pytest.mark.parametrize("width", [0, 600])
def test_rules_on_weights_act_in_the_documented_order(
    shares: list[float], options: dict[str, Any], tokens: list[int], width: int
) -> None:
    """Each acts on what the one before it left, worked out where another order would show."""
    weights, places = spread(rows(shares), width)
    wide = dict(options)
    for name in ("counts", "bias"):
        if name in options:
            wide[name] = np.zeros(weights.shape[1]).tolist()
            for place, value in zip(places, options[name], strict=True):
                wide[name][place] = value
    if "allowed" in options:
        wide["allowed"] = places[options["allowed"]].tolist()
    with np.errstate(divide="ignore"):
        found = weigh_one(np.log(weights[0]).tolist(), **wide)
    assert np.flatnonzero(found).tolist() == places[tokens].tolist()


# The parameters' ends


@pytest.mark.parametrize("vocabulary", [4, 600])
def test_temperature_zero_takes_the_most_likely_token_of_lowest_id(vocabulary: int) -> None:
    """At temperature 0 one token is left; a tie goes to the lower token id."""
    logits = np.zeros((2, vocabulary), np.float32)
    logits[:, -4:] = [[1, 5, 5, 2], [7, 5, 5, 7]]
    first = vocabulary - 4
    params = SamplingParams(temperature=0)
    assert kept(weigh_rows(logits, [params] * 2)) == [[first + 1], [first]]
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert draw_rows(logits, params, uniform) == [first + 1, first]


@pytest.mark.parametrize("vocabulary", [7, 65, 600])
def test_top_k_1_is_temperature_zero(vocabulary: int) -> None:
    """One token is left in either case, and it is the same one, ties included."""
    logits = np.random.default_rng(0).standard_normal((50, vocabulary)).astype(np.float32).round(1)
    for uniform in (0.0, ALMOST_ONE):
        assert draw_rows(logits, SamplingParams(top_k=1), uniform) == draw_rows(
            logits, SamplingParams(temperature=0), uniform
        )


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-60, 1e-40, 1e-30, 1e-3])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    """Towards 0 the most likely token alone is left, without a warning or a NaN."""
    assert weigh_one([1, 3, 2, -1e30], temperature=temperature) == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-60, 1e-46, 1e-40, 1e-3])
def test_a_tiny_temperature_is_not_zero(temperature: float) -> None:
    """Equals of the highest score are drawn evenly, be the temperature below float32 itself."""
    assert weigh_one([3, 1, 3], temperature=temperature) == [1, 0, 1]


def test_the_coldest_temperature_parts_neighbours() -> None:
    """There already two neighbouring float32 numbers are as good as infinitely far apart."""
    below = float(np.nextafter(np.float32(2.0**-60), np.float32(0)))
    assert weigh_one([2.0**-60, below], temperature=float(COLDEST)) == [1, 0]


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1.7e308])
def test_a_huge_temperature_draws_evenly(temperature: float) -> None:
    """Towards infinity all allowed tokens are equally likely, and the others stay impossible."""
    params = SamplingParams(temperature=temperature)
    logits = rows([1, 30, NO, -20, 2])
    drawn = [draw_rows(logits, params, share / 8)[0] for share in range(8)]
    assert drawn == [0, 0, 1, 1, 3, 3, 4, 4]


def test_options_that_are_not_given_are_neutral() -> None:
    """No option and its neutral value give the same record, and then no rule runs at all."""
    neutral = SamplingParams(
        temperature=1,
        top_k=10**30,
        top_p=1,
        min_p=0,
        repetition_penalty=1,
        frequency_penalty=0,
        presence_penalty=0,
        typical_p=1,
    )
    assert record(SamplingParams()) == record(neutral) == NEUTRAL
    rules = Rules.stack([SamplingParams(), neutral])
    columns = {name: value for name, value in vars(rules).items() if name.endswith("_B1")}
    assert columns
    assert set(columns.values()) == {None}
    assert not rules.need_counts


def test_rules_stack_what_was_not_given_as_neutral() -> None:
    """Options that are None change no bit of a row that stands beside one that has them."""
    every = SamplingParams(
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
        repetition_penalty=2,
        frequency_penalty=1,
        presence_penalty=1,
        temperature=0.5,
    )
    rng = np.random.default_rng(3)
    for vocabulary in (50, 65, 600):
        logits = rng.standard_normal((2, vocabulary)).astype(np.float32)
        logits[:, 1] = -50  # so unlikely that it is lost in the sum of the others
        both = weigh_rows(logits, [SamplingParams(), every], counts=[1] * vocabulary)
        plain = np.exp(logits[0] - logits[0].max())
        assert both[0].tobytes() == plain.tobytes()


def test_the_logits_stay_as_they_are() -> None:
    """What the network said belongs to the decoder: the rules work on a copy."""
    for vocabulary in (5, 600):
        logits = np.arange(vocabulary, dtype=np.float32)[None]
        before = logits.copy()
        weigh_rows(logits, [SamplingParams(temperature=0.5, top_k=2)], bias=[1.0] * vocabulary)
        assert logits.tolist() == before.tolist()


# Rows without a token

RULES = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.5},
    {"min_p": 0.5},
    {"typical_p": 0.5},
    {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 1.0},
    {"top_k": 3, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9},
]


@pytest.mark.parametrize("options", RULES, ids=lambda options: "+".join(options) or "none")
@pytest.mark.parametrize("vocabulary", [3, 65, 600])
def test_a_row_without_a_token_is_told(vocabulary: int, options: dict[str, Any]) -> None:
    """Damaged and infinite logits give `NONE` under every rule, and neighbours keep theirs."""
    good = np.linspace(-1, 1, vocabulary).astype(np.float32)
    bad = [
        np.full(vocabulary, NO),
        np.full(vocabulary, math.nan),
        np.full(vocabulary, math.inf),
        np.where(np.arange(vocabulary) == 1, math.nan, good),
        np.where(np.arange(vocabulary) == 1, math.inf, good),
    ]
    params = SamplingParams(**options)
    (alone,) = draw_rows(good[None], params, 0.5)
    assert 0 <= alone < vocabulary
    logits = np.array([*bad, good, *bad], np.float32)
    wanted = [NONE] * len(bad) + [alone] + [NONE] * len(bad)
    assert draw_rows(logits, params, 0.5) == wanted
    assert draw_rows(np.array(bad, np.float32), params, 0.5) == [NONE] * len(bad)


@pytest.mark.parametrize("options", RULES, ids=lambda options: "+".join(options) or "none")
@pytest.mark.parametrize("vocabulary", [3, 65, 600])
def test_a_row_in_which_nothing_is_allowed_is_told(
    vocabulary: int, options: dict[str, Any]
) -> None:
    """A barrier around everything gives `NONE`, and one around all but one token that token."""
    logits = np.zeros((2, vocabulary), np.float32)
    barrier = np.full((2, vocabulary), NO, np.float32)
    barrier[1, -1] = 0.0
    params = SamplingParams(**options)
    assert draw_rows(logits, params, 0.5, barrier=barrier) == [NONE, vocabulary - 1]
    assert draw_rows(logits[:1], params, 0.5, barrier=barrier[:1]) == [NONE]


@pytest.mark.parametrize("vocabulary", [3, 600])
def test_scores_that_leave_float32_are_told(vocabulary: int) -> None:
    """Where the rules drive a logit beyond all numbers there is no token, and no warning."""
    logits = np.full((1, vocabulary), 3e38, np.float32)
    counts = [1] * vocabulary
    tokens = sample(
        logits,
        Rules.stack([SamplingParams(repetition_penalty=0.01)]),
        barrier_BV=np.zeros_like(logits),
        uniform_B=np.zeros(1),
        counts_BV=np.array([counts], np.int32),
    )
    assert tokens.tolist() == [NONE]


@pytest.mark.parametrize("vocabulary", [2, 600])
def test_what_the_network_rules_out_takes_no_part(vocabulary: int) -> None:
    """A logit of -inf is no damage: its token is never drawn, and the others are."""
    logits = np.full((1, vocabulary), NO, np.float32)
    logits[0, 1] = -5
    for options in RULES:
        assert draw_rows(logits, SamplingParams(**options), ALMOST_ONE) == [1]


# The draw


@given(
    weights=st.lists(
        st.floats(0, 2.0**-10, width=32) | st.just(0.0) | st.floats(2.0**-10, 1, width=32),
        min_size=1,
        max_size=60,
    ),
    width=st.sampled_from([0, LARGE]),
    uniform=st.sampled_from([0.0, 5e-324, ALMOST_ONE]) | st.floats(0, ALMOST_ONE),
)
def test_an_impossible_token_is_never_drawn(
    weights: list[float], width: int, uniform: float
) -> None:
    """Whatever the uniform in [0, 1), the token drawn has a probability above 0."""
    if not any(weights):
        weights.append(1.0)
    wide, _ = spread(rows(weights), width)
    (token,) = draw(urn_of(wide), np.array([uniform]))
    assert wide[0, token] > 0


@pytest.mark.parametrize("vocabulary", [3, 65, SMALL, SMALL + 1, 1000])
def test_the_ends_of_the_uniform_are_the_ends_of_what_may_be_drawn(vocabulary: int) -> None:
    """Uniform 0 draws the first token of any weight, and the last uniform below 1 the last."""
    rng = np.random.default_rng(vocabulary)
    for _ in range(30):
        logits = rng.standard_normal((1, vocabulary)).astype(np.float32)
        barrier = np.where(rng.random((1, vocabulary)) < 0.5, 0.0, NO).astype(np.float32)
        barrier[0, rng.integers(vocabulary)] = 0.0
        allowed = np.flatnonzero(barrier[0] == 0.0)
        params = SamplingParams()
        assert draw_rows(logits, params, 0.0, barrier=barrier) == [allowed[0]]
        assert draw_rows(logits, params, ALMOST_ONE, barrier=barrier) == [allowed[-1]]
