"""A recipe tried on a corpus and a machine, and the choice among those that were."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from charloom.architecture import Architecture
from training.batches import Batches
from training.calibration import (
    TooLargeError,
    calibrate,
    memory_needed,
    physical_memory,
    too_large,
)
from training.config import Precision
from training.corpus import EncodedCorpus
from training.recipe import Draft, Recipe
from training.recurrence import Arithmetic

LEAST_STEPS = 1000
"""A text is read more often than its recipe says where that is less: learning takes steps too."""

_FORWARD_SHARE = 0.4  # a forward pass costs a third of a step, a little more without large batches

Measure = Callable[..., tuple[Arithmetic, float]]
"""What `calibrate` does."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe tried: the network it makes, the arithmetic to use and what a step takes."""

    draft: Draft
    architecture: Architecture
    batches: Batches
    precision: Arithmetic
    step_seconds: float

    @property
    def token_seconds(self) -> float:
        """What it takes to read a held-out token."""
        return self.step_seconds * _FORWARD_SHARE / self.batches.tokens_per_step

    @property
    def most_steps(self) -> int:
        """Updates after which this text has been read often enough, or learnt at all."""
        return max(math.ceil(self.draft.most_passes * self.batches.steps_per_epoch), LEAST_STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Where recipes are tried: a corpus, a machine, and the fields of a recipe that stand."""

    corpus: EncodedCorpus
    choices: Mapping[str, Any]
    seed: int
    precision: Precision
    device: torch.device
    seconds: float
    """Of timing, for each recipe."""
    measure: Measure = calibrate

    def attempt(self, draft: Draft) -> Trial:
        """Time a recipe; raises `TooLargeError` where it does not fit the memory."""
        recipe = self.settle(draft, passes=draft.most_passes)
        architecture = recipe.architecture(self.corpus.tokenizer.vocabulary_size)
        batches = Batches(
            self.corpus.train,
            batch_size=recipe.batch_size,
            sequence_length=recipe.sequence_length,
            seed=self.seed,
        )
        needed = memory_needed(architecture, batches.largest, precision=self.precision)
        if self.device.type == "cpu" and needed > physical_memory():
            raise too_large(recipe, architecture)
        precision, step_seconds = self.measure(
            recipe,
            architecture,
            batches,
            precision=self.precision,
            device=self.device,
            seconds=self.seconds,
        )
        return Trial(draft, architecture, batches, precision, step_seconds)

    def largest(self, drafts: Iterable[Draft], *, readable: Callable[[Trial], float]) -> Trial:
        """The last of ever larger networks whose steps are worth it, the first in any case.

        `readable` tells how many tokens a network reads within the budget. None is timed that
        could not read enough anyway.
        """
        first, *larger = drafts
        chosen = self.attempt(first)
        for draft in larger:
            if readable(chosen) < draft.worth_from:  # and this one reads even less
                break
            try:
                trial = self.attempt(draft)
            except TooLargeError:
                break
            if readable(trial) < draft.worth_from:
                break
            chosen = trial
        return chosen

    def settle(self, draft: Draft, *, passes: float) -> Recipe:
        """The recipe for so many passes over this corpus."""
        boundaries = self.corpus.train.boundaries
        tokens = len(self.corpus.train.tokens)
        mean = math.inf if boundaries is None else tokens / max(len(boundaries) - 1, 1)
        return draft.settle(self.choices, passes=passes, tokens=tokens, document_tokens=mean)
