"""From logits to tokens: the sampling rules, on many rows at once, each with its own parameters.

They act in this order, each on what the one before it left:

    logit bias, repetition penalty, frequency and presence penalty, tokens allowed at this step,
    temperature, top-k, top-p, min-p, typical-p, draw

The rules before top-k change *scores*, float32 logits in which -inf means "not to be drawn"; from
top-k on they change *weights*, exp(score - highest score), in which 0 means the same. `sample` is a
pure function: it makes one copy, and the rules work on that in place, since at 64 rows and 5,000
tokens every further copy costs as much as a rule.

A neutral parameter leaves a row's bits alone and a row's result never depends on its neighbours, so
a text is the same alone and in a crowd. That is why arrays are C-ordered (NumPy adds up a
Fortran-ordered one in another order), running sums are float64, and token ids break ties.

    B rows   A those of them that a rule concerns   V vocabulary   W the same, filled up to strides
    K tokens by falling weight
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from charloom.params import SamplingParams

Scores = NDArray[np.float32]
Weights = NDArray[np.float32]
Sums = NDArray[np.float64]
Integers = NDArray[np.int64]
Counts = NDArray[np.int32]

NONE = -1
"""What `sample` gives for a row in which no token is left, or whose logits are not numbers."""

SMALL = 512
"""Up to this many tokens a row is sorted and summed up whole; of a larger vocabulary only those
tokens are sorted that a rule cannot leave out at sight."""

STRIDE = 64
"""In a larger vocabulary the draw sums up strides of this many tokens, then looks into one."""

ALMOST_ONE = np.nextafter(1.0, 0.0)

COLDEST = np.float32(2.0**-100)
"""Temperatures below this act like it: already here only equals of the highest score are left."""

RECORD = np.dtype(
    [
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("temperature", np.float32),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float32),
        ("typical_p", np.float64),
    ]
)
"""The parameters of one row."""

NEUTRAL = np.array((1.0, 0.0, 0.0, 1.0, np.iinfo(np.int64).max, 1.0, 0.0, 1.0), RECORD)
"""The values that leave a row as it is."""


def record(params: SamplingParams) -> NDArray[np.void]:
    """The parameters of one request as a `RECORD`, (); what was not given is neutral."""
    row = NEUTRAL.copy()
    for name in RECORD.names or ():
        value = getattr(params, name)
        if value is not None:
            # A number beyond the type means what the type's largest does.
            row[name] = min(value, NEUTRAL["top_k"]) if name == "top_k" else _clip(value)
    if params.temperature > 0.0:
        row["temperature"] = max(row["temperature"], COLDEST)  # float32 rounds the coldest to 0
    return row


def _clip(value: float) -> float:
    """The value, or the largest of float32."""
    largest = float(np.finfo(np.float32).max)
    return min(max(value, -largest), largest)


class Rules:
    """The parameters of a batch's rows, laid out for the rules; None where all rows are neutral."""

    def __init__(self, records_B: NDArray[np.void]) -> None:
        self.repetition_B1 = _column(records_B, "repetition_penalty")
        self.frequency_B1 = _column(records_B, "frequency_penalty")
        self.presence_B1 = _column(records_B, "presence_penalty")
        penalties = (self.repetition_B1, self.frequency_B1, self.presence_B1)
        self.need_counts = any(penalty_B1 is not None for penalty_B1 in penalties)
        self.temperature_B1 = _column(records_B, "temperature")
        self.greedy_A = np.empty(0, np.int64)
        if self.temperature_B1 is not None:
            is_greedy_B1 = self.temperature_B1 == 0.0
            self.greedy_A = np.flatnonzero(is_greedy_B1)
            self.temperature_B1 = np.where(is_greedy_B1, np.float32(1.0), self.temperature_B1)
        self.top_k_B1 = _column(records_B, "top_k")
        self.top_p_B1 = _column(records_B, "top_p")
        self.min_p_B1 = _column(records_B, "min_p")
        self.typical_p_B1 = _column(records_B, "typical_p")

    @classmethod
    def stack(cls, rows: Sequence[SamplingParams]) -> Self:
        """The rules of several requests, in their order."""
        return cls(np.stack([record(row) for row in rows]))


def _column(records_B: NDArray[np.void], name: str) -> NDArray[Any] | None:
    values_B = records_B[name]
    return None if (values_B == NEUTRAL[name]).all() else np.ascontiguousarray(values_B)[:, None]


def sample(
    logits_BV: NDArray[np.float32],
    rules: Rules,
    *,
    barrier_BV: Scores,
    uniform_B: Sums,
    bias_BV: Scores | None = None,
    counts_BV: Counts | None = None,
) -> Integers:
    """Draw one token per row, (B,): all rules, in their order; `NONE` where no token is left.

    `barrier_BV` is 0 for the tokens that may be drawn and -inf for the others, `uniform_B` holds a
    number in [0, 1) per row, and `counts_BV` says how often prompt and text hold each token (needed
    for penalties only). Barrier and bias may have one row for all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weights_BW, peak_B1 = weigh(
            logits_BV, rules, barrier_BV=barrier_BV, bias_BV=bias_BV, counts_BV=counts_BV
        )
        tokens_B = draw(weights_BW, uniform_B)
    return np.where(np.isfinite(peak_B1[:, 0]), tokens_B, NONE)


def weigh(
    logits_BV: NDArray[np.float32],
    rules: Rules,
    *,
    barrier_BV: Scores,
    bias_BV: Scores | None = None,
    counts_BV: Counts | None = None,
) -> tuple[Weights, Scores]:
    """All rules but the draw: weights (B, W), and each row's highest score before temperature.

    A row whose highest score is not finite has no token to draw, and its weights mean nothing;
    NumPy is to be told to pass over that and over scores beyond float32 (`np.errstate`). Columns
    beyond the vocabulary, which fill a large one up to whole strides, weigh nothing.
    """
    rows, vocabulary = logits_BV.shape
    width = vocabulary if vocabulary <= SMALL else -(-vocabulary // STRIDE) * STRIDE
    if width == vocabulary:
        padded_BW = scores_BV = np.add(logits_BV, barrier_BV, order="C")
    else:
        padded_BW = np.empty((rows, width), np.float32)
        padded_BW[:, vocabulary:] = -np.inf
        scores_BV = padded_BW[:, :vocabulary]
        np.add(logits_BV, barrier_BV, out=scores_BV)
    # A barrier lets only 0 and -inf in, so it makes no difference that it comes first.
    if bias_BV is not None:
        scores_BV += bias_BV
    if rules.need_counts:
        assert counts_BV is not None, "penalties need the counts of prompt and text"
        penalise_repetition(scores_BV, rules.repetition_B1, counts_BV)
        penalise_presence(scores_BV, rules.frequency_B1, rules.presence_B1, counts_BV)
    peak_B1 = np.maximum.reduce(scores_BV, axis=1, keepdims=True)
    scores_BV -= peak_B1
    temper(scores_BV, rules)
    weights_BW = np.exp(padded_BW, out=padded_BW)
    keep_top_k(weights_BW, rules.top_k_B1)
    keep_top_p(weights_BW, rules.top_p_B1)
    keep_min_p(weights_BW, rules.min_p_B1)
    keep_typical_p(weights_BW, rules.typical_p_B1)
    return weights_BW, peak_B1


def penalise_repetition(scores_BV: Scores, penalty_B1: Scores | None, counts_BV: Counts) -> None:
    """Divide positive scores of tokens in the text by the penalty and multiply negative ones by it.

    Keskar et al. 2019 (arXiv 1909.05858), section 4.1, in the form that keeps the sign.
    """
    if penalty_B1 is None:
        return
    penalised_BV = np.where(scores_BV > 0.0, scores_BV / penalty_B1, scores_BV * penalty_B1)
    np.copyto(scores_BV, penalised_BV, where=counts_BV > 0)


def penalise_presence(
    scores_BV: Scores,
    frequency_B1: Scores | None,
    presence_B1: Scores | None,
    counts_BV: Counts,
) -> None:
    """Lower the scores of tokens in the text: by the first for each occurrence, by the second once.

    As OpenAI's API describes its `frequency_penalty` and `presence_penalty`.
    """
    if frequency_B1 is not None:
        scores_BV -= frequency_B1 * counts_BV.astype(np.float32)
    if presence_B1 is not None:
        scores_BV -= presence_B1 * (counts_BV > 0)


def temper(scores_BV: Scores, rules: Rules) -> None:
    """Divide scores, of which the highest is 0, by the temperature.

    At temperature 0 the most likely token alone is left, the one of lowest id among equals.
    """
    if rules.temperature_B1 is None:
        return
    scores_BV /= rules.temperature_B1  # near 0 it sends all but the highest to -inf
    if rules.greedy_A.size:
        best_A = scores_BV[rules.greedy_A].argmax(axis=1)
        scores_BV[rules.greedy_A] = -np.inf
        scores_BV[rules.greedy_A, best_A] = 0.0


def keep_top_k(weights_BW: Weights, k_B1: Integers | None) -> None:
    """Keep the k most likely tokens of each row; of equal ones those of lower id."""
    if k_B1 is None:
        return
    width = weights_BW.shape[1]
    active = np.flatnonzero(k_B1 < width)
    if not active.size:
        return
    weights_AW, last_A = weights_BW[active], k_B1[active, 0] - 1
    floor_A1 = None
    if width > SMALL and last_A.max() < width // STRIDE:
        # As many strides as k have their largest weight at or above the k-th of those.
        largest_AS = weights_AW.reshape(len(active), -1, STRIDE).max(axis=2)
        largest_AS.sort(axis=1)
        floor_A1 = largest_AS[np.arange(len(active)), -1 - last_A, None]
    ranked_AK = _rank(weights_AW, floor_A1, least=int(last_A.max()) + 1)
    least_A1 = ranked_AK[np.arange(len(active)), last_A, None]
    is_kept_AW = weights_AW >= least_A1
    surplus_A = is_kept_AW.sum(axis=1) - last_A - 1
    for row in np.flatnonzero((surplus_A > 0) & (least_A1[:, 0] > 0.0)):
        equals = np.flatnonzero(weights_AW[row] == least_A1[row])
        is_kept_AW[row, equals[-surplus_A[row] :]] = False
    weights_BW[active] = weights_AW * is_kept_AW


def keep_top_p(weights_BW: Weights, p_B1: Sums | None) -> None:
    """Keep the fewest most likely tokens whose probabilities together reach p, and their equals.

    Holtzman et al. 2019 (arXiv 1904.09751).
    """
    if p_B1 is None:
        return
    rows, width = weights_BW.shape
    is_idle_B1 = p_B1 == 1.0  # rows to which this does not apply
    if width <= SMALL:
        ranked_BK = _rank(weights_BW, None)
        reached_BK = np.add.accumulate(ranked_BK, axis=1, dtype=np.float64)
        last_B = (reached_BK >= p_B1 * reached_BK[:, -1:]).argmax(axis=1)
    else:
        # All tokens below an equal share of what may be left out hold less than that together.
        total_B1 = np.add.reduce(weights_BW, axis=1, dtype=np.float64, keepdims=True)
        floor_B1 = (0.999 * (1.0 - p_B1) * total_B1 / width).astype(np.float32)
        floor_B1[is_idle_B1] = np.inf
        ranked_BK = _rank(weights_BW, floor_B1)
        reached_BK = np.add.accumulate(ranked_BK, axis=1, dtype=np.float64)
        # Summed up in another order, all weights may round to less than p of the total.
        wanted_B1 = np.minimum(p_B1 * total_B1, reached_BK[:, -1:])
        last_B = (reached_BK >= wanted_B1).argmax(axis=1)
    least_B1 = ranked_BK[np.arange(rows), last_B, None]
    least_B1[is_idle_B1] = 0.0
    weights_BW *= weights_BW >= least_B1


def _rank(weights_AW: Weights, floor_A1: Weights | None, least: int = 1) -> Weights:
    """The weights of at least the floor, or all, by falling size, (A, K); filled up with zeros.

    `least` is the smallest K: in a row that is not numbers no weight reaches any floor.
    """
    if floor_A1 is None:
        return np.sort(weights_AW, axis=1)[:, ::-1]
    is_above_AW = weights_AW >= floor_A1
    above_A = is_above_AW.sum(axis=1)
    above_AK = np.zeros((len(above_A), max(int(above_A.max()), least)), np.float32)
    above = weights_AW.ravel()[np.flatnonzero(is_above_AW)]
    above_AK.ravel()[np.flatnonzero(np.arange(above_AK.shape[1]) < above_A[:, None])] = above
    above_AK.sort(axis=1)
    return above_AK[:, ::-1]


def keep_min_p(weights_BW: Weights, p_B1: Weights | None) -> None:
    """Keep the tokens at least p times as likely as the row's most likely one, whose weight is 1.

    Nguyen et al. 2024 (arXiv 2407.01082).
    """
    if p_B1 is not None:
        weights_BW *= weights_BW >= p_B1


def keep_typical_p(weights_BW: Weights, p_B1: Sums | None) -> None:
    """Keep the tokens whose surprise is nearest to the mean surprise, until they reach p together.

    Meister et al. 2022 (arXiv 2202.00666); the mean surprise is the entropy of what is left. Of
    equally near tokens those of lower id stay.
    """
    if p_B1 is None:
        return
    rows = np.flatnonzero(p_B1 < 1.0)
    if not rows.size:
        return
    shares_AW = weights_BW[rows].astype(np.float64)
    shares_AW /= shares_AW.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of 0 is infinitely surprising
        surprise_AW = -np.log(shares_AW)
        entropy_A1 = np.where(shares_AW > 0, shares_AW * surprise_AW, 0.0).sum(
            axis=1, keepdims=True
        )
    order_AW = np.abs(surprise_AW - entropy_A1).argsort(axis=1, kind="stable")
    reached_AW = np.take_along_axis(shares_AW, order_AW, axis=1).cumsum(axis=1)
    is_kept_AW = np.ones(shares_AW.shape, np.bool_)
    is_kept_AW[:, 1:] = reached_AW[:, :-1] < p_B1[rows]
    kept_AW = np.zeros_like(is_kept_AW)
    np.put_along_axis(kept_AW, order_AW, is_kept_AW, axis=1)
    weights_BW[rows] *= kept_AW


def draw(weights_BW: Weights, uniform_B: Sums) -> Integers:
    """The token in whose share of the row's weight, laid out by token id, `uniform_B` falls.

    A uniform below 1 stays below the total after rounding, and a token of no weight has no share,
    so such a token is never drawn.
    """
    rows, width = weights_BW.shape
    if width <= SMALL:
        return _find(weights_BW, uniform_B)[0]
    strides_BSW = weights_BW.reshape(rows, -1, STRIDE)
    strides_BS = np.add.reduce(strides_BSW, axis=2)
    stride_B, target_B, reached_BS = _find(strides_BS, uniform_B)
    row_B = np.arange(rows)
    share_B = strides_BS[row_B, stride_B]
    into_B = (target_B - (reached_BS[row_B, stride_B] - share_B)) / share_B
    token_B = _find(strides_BSW[row_B, stride_B], into_B.clip(0.0, ALMOST_ONE))[0]
    return stride_B * STRIDE + token_B


def _find(weights_BW: Weights, uniform_B: Sums) -> tuple[Integers, Sums, Sums]:
    """The index in whose share of the row the uniform falls, that place, and the running sums."""
    reached_BW = np.add.accumulate(weights_BW, axis=1, dtype=np.float64)
    target_B = uniform_B * reached_BW[:, -1]
    index_B: Integers = (reached_BW > target_B[:, None]).argmax(axis=1)
    return index_B, target_B, reached_BW
