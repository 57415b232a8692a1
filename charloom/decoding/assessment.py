"""How likely tokens were where they stood: what scoring and log-probabilities are made of.

Natural logarithms, float64. A row's numbers do not depend on its neighbours: every sum runs along
one row of a C-ordered array.

    N tokens   V vocabulary   T most likely alternatives
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SMALL = 256
"""Up to this many tokens a row is sorted whole; of 8,000 that would take 16 times as long."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assessment:
    """N tokens in the order of the text, each judged by the logits from which it followed."""

    tokens_N: Integers
    logprobs_N: Floats
    """Log-probability by the model."""
    ranks_N: Integers
    """1 for the most likely token; equals count by token id."""
    entropies_N: Floats
    """Expected surprise at this place, in nats."""
    sampled_N: Floats
    """Log-probability after the sampling rules; NaN for tokens that were not drawn."""
    top_NT: Integers
    """The model's most likely tokens, the most likely first."""
    top_logprobs_NT: Floats
    top_sampled_NT: Floats
    """Log-probabilities of the most likely tokens after the sampling rules; -inf where taken
    out."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One assessment after the other; there must be at least one."""
        return cls(
            **{
                item.name: np.concatenate([getattr(part, item.name) for part in parts])
                for item in fields(cls)
            }
        )

    def __getitem__(self, index: slice) -> Self:
        """The assessment of some of the tokens."""
        return type(self)(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def __len__(self) -> int:
        return len(self.tokens_N)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assessment):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, item.name), getattr(other, item.name), equal_nan=True)
            for item in fields(self)
        )

    __hash__ = None  # type: ignore[assignment] # as with all that compares arrays


# What is taken out has the logarithm -inf, and what a damaged network says is NaN, in silence.
@np.errstate(divide="ignore", invalid="ignore")
def assess(
    logits_NV: NDArray[np.float32],
    tokens_N: Integers,
    *,
    top: int,
    weights_NV: NDArray[np.float32] | None = None,
) -> Assessment:
    """Judge tokens by the logits they followed from, and by what the rules made of them, if
    drawn.
    """
    row_N = np.arange(len(tokens_N))
    scores_NV = np.ascontiguousarray(logits_NV, np.float64)
    scores_NV -= scores_NV.max(axis=1, keepdims=True)
    shares_NV = np.exp(scores_NV)
    total_N1 = shares_NV.sum(axis=1, keepdims=True)
    scores_NV -= np.log(total_N1)
    shares_NV /= total_N1
    logprobs_N = scores_NV[row_N, tokens_N]
    own_N1 = logits_NV[row_N, tokens_N][:, None]
    is_earlier_NV = np.arange(logits_NV.shape[1]) < tokens_N[:, None]
    is_above_NV = (logits_NV > own_N1) | ((logits_NV == own_N1) & is_earlier_NV)
    # A share of 0 adds no surprise, whatever its logarithm.
    terms_NV = np.where(shares_NV > 0.0, shares_NV * -scores_NV, 0.0)
    top_NT = _top(logits_NV, min(top, logits_NV.shape[1]))
    row_N1 = row_N[:, None]
    sampled_N = np.full(len(tokens_N), np.nan)
    top_sampled_NT = np.full(top_NT.shape, np.nan)
    if weights_NV is not None:
        total_N = np.ascontiguousarray(weights_NV, np.float64).sum(axis=1)
        sampled_N = np.log(weights_NV[row_N, tokens_N] / total_N)
        top_sampled_NT = np.log(weights_NV[row_N1, top_NT] / total_N[:, None])
    return Assessment(
        tokens_N=tokens_N,
        logprobs_N=logprobs_N,
        ranks_N=is_above_NV.sum(axis=1) + 1,
        entropies_N=terms_NV.sum(axis=1),
        sampled_N=sampled_N,
        top_NT=top_NT,
        top_logprobs_NT=scores_NV[row_N1, top_NT],
        top_sampled_NT=top_sampled_NT,
    )


def _top(logits_NV: NDArray[np.float32], count: int) -> NDArray[Any]:
    """The tokens of the highest logits, (N, T), from the highest down, equals by token id."""
    if count == 0:
        return np.empty((len(logits_NV), 0), np.int64)
    falling_NV = -logits_NV
    if falling_NV.shape[1] <= SMALL:
        return falling_NV.argsort(axis=1, kind="stable")[:, :count]
    last_N = np.partition(falling_NV, count - 1, axis=1)[:, count - 1]
    top_NT = np.empty((len(logits_NV), count), np.int64)
    for row, (falling_V, last) in enumerate(zip(falling_NV, last_N, strict=True)):
        # In the order of their ids, the last one's equals too; what is no number comes last.
        tokens = np.flatnonzero(~(falling_V > last))
        top_NT[row] = tokens[np.argsort(falling_V[tokens], kind="stable")[:count]]
    return top_NT
