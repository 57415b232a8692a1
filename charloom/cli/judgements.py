"""Log-probabilities as JSON: strict, so what is not a finite number is null."""

import math
from typing import Any

from charloom.decoding.assessment import Assessment
from charloom.tokenizer import Tokenizer


def judgements(assessment: Assessment, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """One object per token: what it is, how likely it was, and the most likely alternatives.

    `logprob` is the model's, `sampled_logprob` what the sampling options made of it, both natural
    logarithms; `entropy` is in nats and `rank` is 1 for the most likely token.
    """
    return [
        {
            "token": token,
            "text": tokenizer.decode([token]),
            "logprob": finite(assessment.logprobs_N[place]),
            "sampled_logprob": finite(assessment.sampled_N[place]),
            "rank": int(assessment.ranks_N[place]),
            "entropy": finite(assessment.entropies_N[place]),
            "top": [
                {
                    "token": int(other),
                    "text": tokenizer.decode([int(other)]),
                    "logprob": finite(assessment.top_logprobs_NT[place, rank]),
                    "sampled_logprob": finite(assessment.top_sampled_NT[place, rank]),
                }
                for rank, other in enumerate(assessment.top_NT[place])
            ],
        }
        for place, token in enumerate(assessment.tokens_N.tolist())
    ]


def finite(value: float) -> float | None:
    """The number, or null where JSON has none for it."""
    return float(value) if math.isfinite(value) else None
