"""One row of a small vocabulary, drawn from by Python's own lists: the sampler's bits, sooner.

A single text spends less time in the network than a crowd, and what its rules cost is then the
number of NumPy calls: a step pushes NumPy's code out of the caches, and each call fetches its share
of it again. Lists need little code, and for the fifty to a hundred weights of a character model
they are the shorter way: between the steps of a 2 x 512 model 14 microseconds instead of about 30.

No bit differs from `charloom.decoding.sampling`, so which of the two draws is a matter of speed
alone. What float32 rounds is left to NumPy, the same calls for one row as for many: the distance
from the peak, temperature and exp. From there on a weight is compared, ordered and added up in
float64, which a Python float is, and both add up one by one in the same order.

    V vocabulary
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from charloom.decoding.sampling import NEUTRAL, Scores

FEW = 128
"""Up to this many tokens lists are faster than arrays."""

OWN_RULES = ("temperature", "top_p", "min_p")
"""The parameters that may be other than neutral; for all others there is the sampler."""


class LoneRow:
    """Draws for one row with temperature, top-p and min-p, one step at a time."""

    def __init__(self, record: NDArray[np.void], barrier_V: Scores) -> None:
        """The row's parameters, (), which `can_draw`, and what may be drawn of its tokens."""
        self._barrier_V = barrier_V
        self._temperature = np.float32(record["temperature"])
        self._has_top_p = bool(record["top_p"] < 1.0)
        self._top_p = float(record["top_p"])
        self._min_p = float(record["min_p"])

    @staticmethod
    def can_draw(record: NDArray[np.void], vocabulary: int) -> bool:
        """Whether lists know all rules that the row asks for, and are the shorter way."""
        others = set(NEUTRAL.dtype.names or ()) - set(OWN_RULES)
        return vocabulary <= FEW and all(record[name] == NEUTRAL[name] for name in others)

    def draw(self, logits_V: NDArray[np.float32], uniform: float) -> tuple[int, float]:
        """The token that `sampling.sample` draws, and the row's highest score before temperature.

        Where that is not finite there is no token to draw, and the one given means nothing. NumPy
        is to be told to pass over scores beyond float32 (`np.errstate`).
        """
        scores_V = logits_V + self._barrier_V
        best = int(scores_V.argmax())  # the first that is not a number, where there is one
        peak = scores_V[best]
        if not isfinite(peak) or self._temperature == 0.0:
            return best, peak
        scores_V -= peak
        scores_V /= self._temperature
        weights = np.exp(scores_V, out=scores_V).tolist()
        least = self._min_p
        if self._has_top_p:
            ranked = sorted(weights, reverse=True)
            reached = [*accumulate(ranked)]
            least = max(least, ranked[bisect_left(reached, self._top_p * reached[-1])])
        kept: Sequence[int] = range(len(weights))
        if least > 0.0:
            kept = [token for token, weight in enumerate(weights) if weight >= least]
            weights = [weights[token] for token in kept]
        reached = [*accumulate(weights)]
        return kept[bisect_right(reached, uniform * reached[-1])], peak
