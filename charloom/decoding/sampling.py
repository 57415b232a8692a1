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

    B rows   A some of them   V vocabulary   K some of its tokens   S strides of W tokens
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

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

LIKELY = np.float32(2.0**-10)
"""Top-p looks first at the tokens of a large vocabulary that are at least this likely, relative to
the most likely one."""

STRIDE = 64
"""In a larger vocabulary the draw sums up strides of this many tokens, then looks into one."""

LEAST = np.finfo(np.float32).smallest_subnormal

COLDEST = np.float32(2.0**-100)
"""Temperatures below this act like it: already here only equals of the highest score are left, as
scores that differ do so by more than some 2**-93, but for scores near 0."""

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
        # Rows that top-p does not apply to, beside others that it does.
        self.no_top_p_A = np.flatnonzero(records_B["top_p"] == 1.0)
        self.min_p_B1 = _column(records_B, "min_p")
        self.typical_p_B1 = _column(records_B, "typical_p")
        self._records_B = records_B
        self._split: tuple[int, Split] | None = None

    def split(self, vocabulary: int) -> "Split":
        """The rows whose tokens top-k or top-p make few, and the others, each with their rules."""
        if self._split is None or self._split[0] != vocabulary:
            records_B = self._records_B
            is_cut_B = (records_B["top_k"] < vocabulary) | (records_B["top_p"] < 1.0)
            parts = []
            for rows in (np.flatnonzero(is_cut_B), np.flatnonzero(~is_cut_B)):
                rules = self if len(rows) == len(records_B) else type(self)(records_B[rows])
                parts.append((rows, rules))
            self._split = vocabulary, (parts[0], parts[1])
        return self._split[1]

    @classmethod
    def stack(cls, rows: Sequence[SamplingParams]) -> Self:
        """The rules of several requests, in their order."""
        return cls(np.stack([record(row) for row in rows]))


Split = tuple[tuple[Integers, Rules], tuple[Integers, Rules]]


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
        urn = weigh(logits_BV, rules, barrier_BV=barrier_BV, bias_BV=bias_BV, counts_BV=counts_BV)
        tokens_B = draw(urn, uniform_B)
    return np.where(np.isfinite(urn.peak_B1[:, 0]), tokens_B, NONE)


class Lot(NamedTuple):
    """Weights of tokens that may be drawn: in each row in the order of their numbers."""

    rows: Integers | None
    """The rows of the batch; None for all of them."""
    weights_AK: Weights
    tokens_AK: Integers | None
    """The tokens' numbers; None where these are the columns."""


class Urn(NamedTuple):
    """What a batch is drawn from."""

    lots: Sequence[Lot]
    peak_B1: Scores
    """Each row's highest score before temperature; where it is not finite there is no token to
    draw, and the weights mean nothing."""

    def weights(self, rows: Integers, vocabulary: int) -> Weights:
        """The weight of every token in some rows of the batch, (N, V)."""
        weights_BV = np.zeros((len(self.peak_B1), vocabulary), np.float32)
        for lot in self.lots:
            at = np.arange(len(weights_BV)) if lot.rows is None else lot.rows
            if lot.tokens_AK is None:
                weights_BV[at] = lot.weights_AK
            else:  # what fills a row up weighs nothing, and adds that to its token 0
                np.add.at(weights_BV, (at[:, None], lot.tokens_AK), lot.weights_AK)
        return weights_BV[rows]


def weigh(
    logits_BV: NDArray[np.float32],
    rules: Rules,
    *,
    barrier_BV: Scores,
    bias_BV: Scores | None = None,
    counts_BV: Counts | None = None,
) -> Urn:
    """All rules but the draw.

    NumPy is to be told to pass over scores beyond float32 and over rows that are not numbers
    (`np.errstate`).
    """
    # A barrier lets only 0 and -inf in, so it makes no difference that it comes first.
    scores_BV = np.add(logits_BV, barrier_BV, order="C")
    if bias_BV is not None:
        scores_BV += bias_BV
    if rules.need_counts:
        assert counts_BV is not None, "penalties need the counts of prompt and text"
        penalise_repetition(scores_BV, rules.repetition_B1, counts_BV)
        penalise_presence(scores_BV, rules.frequency_B1, rules.presence_B1, counts_BV)
    peak_B1 = np.maximum.reduce(scores_BV, axis=1, keepdims=True)
    scores_BV -= peak_B1
    temper(scores_BV, rules)
    weights_BV = np.exp(scores_BV, out=scores_BV)
    if weights_BV.shape[1] <= SMALL:
        keep_top_k(weights_BV, rules.top_k_B1)
        keep_top_p(weights_BV, rules.top_p_B1, rules.no_top_p_A)
        return Urn((_fill(weights_BV, rules),), peak_B1)
    (cut, cut_rules), (free, free_rules) = rules.split(weights_BV.shape[1])
    if not cut.size:
        return Urn((_fill(weights_BV, rules),), peak_B1)
    if not free.size:
        return Urn((_cut(weights_BV, rules),), peak_B1)
    lots = (_cut(weights_BV[cut], cut_rules, cut), _fill(weights_BV[free], free_rules, free))
    return Urn(lots, peak_B1)


def _fill(weights_AW: Weights, rules: Rules, rows: Integers | None = None) -> Lot:
    """The last rules, on rows that hold a weight for every token."""
    keep_min_p(weights_AW, rules.min_p_B1)
    keep_typical_p(weights_AW, rules.typical_p_B1)
    return Lot(rows, weights_AW, None)


def _cut(weights_AV: Weights, rules: Rules, rows: Integers | None = None) -> Lot:
    """Top-k, top-p and the last rules where these leave few tokens of a large vocabulary.

    Only the tokens above a floor are looked at. With top-k that is the k-th largest weight or less.
    With top-p it is `LIKELY` at first, and in rows where too few are above it, an equal share of
    what may be left out: all tokens below such a share hold less than that together.
    """
    floor_A1: Weights | np.float32 = LIKELY
    if rules.top_k_B1 is not None:
        floor_A1 = _find_kth(weights_AV, rules.top_k_B1)
    weights_AK, tokens_AK = _gather(weights_AV, floor_A1)
    keep_top_k(weights_AK, rules.top_k_B1)
    if rules.top_p_B1 is not None:
        total_A1 = np.add.reduce(weights_AV, axis=1, dtype=np.float64, keepdims=True)
        ranked_AK, reached_AK = _reach(weights_AK)
        if rules.top_k_B1 is not None:  # where top-k left few, they are all there is
            has_k_A1 = rules.top_k_B1 < weights_AV.shape[1]
            total_A1 = np.where(has_k_A1, reached_AK[:, -1:], total_A1)
        wanted_A1 = rules.top_p_B1 * total_A1
        is_short_A1 = reached_AK[:, -1:] < wanted_A1
        is_short_A1[rules.no_top_p_A] = False
        if is_short_A1.any():
            share_A1 = 0.999 * (1.0 - rules.top_p_B1) * total_A1 / weights_AV.shape[1]
            share_A1 = np.maximum(share_A1.astype(np.float32), LEAST)
            weights_AK, tokens_AK = _gather(weights_AV, np.where(is_short_A1, share_A1, floor_A1))
            keep_top_k(weights_AK, rules.top_k_B1)
            ranked_AK, reached_AK = _reach(weights_AK)
        # Summed up in another order, all weights may round to less than p of the total.
        wanted_A1 = np.minimum(wanted_A1, reached_AK[:, -1:])
        _keep_nucleus(weights_AK, ranked_AK, reached_AK, wanted_A1, rules.no_top_p_A)
    lot = _fill(weights_AK, rules, rows)
    return Lot(rows, lot.weights_AK, tokens_AK)


def _find_kth(weights_AV: Weights, k_A1: Integers) -> Weights:
    """A floor that k weights reach in rows with top-k, near the k-th largest, else `LIKELY`."""
    vocabulary = weights_AV.shape[1]
    floor_A1 = np.full(k_A1.shape, LIKELY)
    strides = vocabulary // STRIDE
    few = np.flatnonzero(k_A1 <= strides)
    if few.size:
        # As many strides as k have their largest weight at or above the k-th of those.
        strides_ASW = weights_AV[few, : strides * STRIDE].reshape(len(few), strides, STRIDE)
        largest_AS = np.maximum.reduce(strides_ASW, axis=2)
        largest_AS.sort(axis=1)
        floor_A1[few] = largest_AS[np.arange(len(few)), -k_A1[few, 0], None]
    for row in np.flatnonzero((k_A1 > strides) & (k_A1 < vocabulary)):
        place = vocabulary - int(k_A1[row, 0])
        floor_A1[row] = np.partition(weights_AV[row], place)[place]
    return np.maximum(floor_A1, LEAST)


def _gather(weights_AV: Weights, floor_A1: Weights | np.float32) -> tuple[Weights, Integers]:
    """The weights of at least the floor, which is above 0, and their tokens, (A, K), by token.

    Rows are filled up with weights of 0.
    """
    rows, vocabulary = weights_AV.shape
    flat = np.flatnonzero(weights_AV >= floor_A1)
    if rows == 1 and flat.size:
        return weights_AV.take(flat, axis=1), flat[None]
    starts_A = np.arange(rows) * vocabulary
    known_A = np.diff(flat.searchsorted(starts_A), append=len(flat))
    shape = rows, max(int(known_A.max()), 1)
    is_filled_AK = np.arange(shape[1]) < known_A[:, None]
    weights_AK, tokens_AK = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    weights_AK[is_filled_AK] = weights_AV.ravel()[flat]
    tokens_AK[is_filled_AK] = flat - np.repeat(starts_A, known_A)
    return weights_AK, tokens_AK


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


def keep_top_k(weights_AK: Weights, k_A1: Integers | None) -> None:
    """Keep the k most likely tokens of each row; of equal ones those of lower id."""
    if k_A1 is None:
        return
    rows, width = weights_AK.shape
    size_A1 = np.minimum(k_A1, width)
    least_A1 = np.sort(weights_AK, axis=1)[np.arange(rows), -size_A1[:, 0], None]
    is_kept_AK = weights_AK >= least_A1
    surplus_A = np.add.reduce(is_kept_AK, axis=1) - size_A1[:, 0]
    for row in np.flatnonzero((surplus_A > 0) & (least_A1[:, 0] > 0.0)):
        equals = np.flatnonzero(weights_AK[row] == least_A1[row])
        is_kept_AK[row, equals[-surplus_A[row] :]] = False
    weights_AK *= is_kept_AK


def keep_top_p(weights_BK: Weights, p_B1: Sums | None, idle_A: Integers) -> None:
    """Keep the fewest most likely tokens whose probabilities together reach p, and their equals.

    Holtzman et al. 2019 (arXiv 1904.09751). It does not apply to the rows `idle_A`.
    """
    if p_B1 is None:
        return
    ranked_BK, reached_BK = _reach(weights_BK)
    _keep_nucleus(weights_BK, ranked_BK, reached_BK, p_B1 * reached_BK[:, -1:], idle_A)


def _reach(weights_AK: Weights) -> tuple[Weights, Sums]:
    """The weights by falling size, and how much the first of them weigh together."""
    ranked_AK = np.sort(weights_AK, axis=1)[:, ::-1]
    return ranked_AK, np.add.accumulate(ranked_AK, axis=1, dtype=np.float64)


def _keep_nucleus(
    weights_AK: Weights, ranked_AK: Weights, reached_AK: Sums, wanted_A1: Sums, idle_A: Integers
) -> None:
    """Keep the largest weights of each row until they weigh as much as is wanted."""
    last_A = (reached_AK >= wanted_A1).argmax(axis=1)
    least_A1 = ranked_AK[np.arange(len(last_A)), last_A, None]
    if idle_A.size:
        least_A1[idle_A] = 0.0
    weights_AK *= weights_AK >= least_A1


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
    shares_AW /= _total(shares_AW)
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of 0 is infinitely surprising
        surprise_AW = -np.log(shares_AW)
        entropy_A1 = _total(np.where(shares_AW > 0, shares_AW * surprise_AW, 0.0))
    order_AW = np.abs(surprise_AW - entropy_A1).argsort(axis=1, kind="stable")
    reached_AW = np.take_along_axis(shares_AW, order_AW, axis=1).cumsum(axis=1)
    is_kept_AW = np.ones(shares_AW.shape, np.bool_)
    is_kept_AW[:, 1:] = reached_AW[:, :-1] < p_B1[rows]
    kept_AW = np.zeros_like(is_kept_AW)
    np.put_along_axis(kept_AW, order_AW, is_kept_AW, axis=1)
    weights_BW[rows] *= kept_AW


def _total(values_AK: Sums) -> Sums:
    """The sum of each row, (A, 1), added up one by one: zeros that fill a row up change no bit."""
    return np.add.accumulate(values_AK, axis=1)[:, -1:]


def draw(urn: Urn, uniform_B: Sums) -> Integers:
    """The token in whose share of the row's weight, laid out by token id, `uniform_B` falls.

    A uniform below 1 stays below the total after rounding, and a token of no weight has no share,
    so such a token is never drawn.
    """
    if urn.lots[0].rows is None:
        return _draw_lot(urn.lots[0], uniform_B)
    tokens_B = np.empty(len(uniform_B), np.int64)
    for lot in urn.lots:
        tokens_B[lot.rows] = _draw_lot(lot, uniform_B[lot.rows])
    return tokens_B


def _draw_lot(lot: Lot, uniform_A: Sums) -> Integers:
    weights_AK, tokens_AK = lot.weights_AK, lot.tokens_AK
    rows, width = weights_AK.shape
    if tokens_AK is not None:
        return tokens_AK[np.arange(rows), _find(weights_AK, uniform_A)[0]]
    if width <= SMALL:
        return _find(weights_AK, uniform_A)[0]
    strides_ASW = np.zeros((rows, -(-width // STRIDE), STRIDE), np.float32)
    strides_ASW.reshape(rows, -1)[:, :width] = weights_AK
    strides_AS = np.add.reduce(strides_ASW, axis=2)
    stride_A, target_A, reached_AS = _find(strides_AS, uniform_A)
    row_A = np.arange(rows)
    share_A = strides_AS[row_A, stride_A]
    into_A = (target_A - (reached_AS[row_A, stride_A] - share_A)) / share_A
    # Rounding may put the place before the stride, where tokens of no weight lie, never behind it.
    token_A = _find(strides_ASW[row_A, stride_A], np.maximum(into_A, 0.0))[0]
    return stride_A * STRIDE + token_A


def _find(weights_AK: Weights, uniform_A: Sums) -> tuple[Integers, Sums, Sums]:
    """The index in whose share of the row the uniform falls, that place, and the running sums."""
    reached_AK = np.add.accumulate(weights_AK, axis=1, dtype=np.float64)
    target_A = uniform_A * reached_AK[:, -1]
    index_A: Integers = (reached_AK > target_A[:, None]).argmax(axis=1)
    return index_A, target_A, reached_AK
