"""What a step takes on this machine: memory by an estimate, arithmetic and seconds by trying.

Steps are timed on throw-away copies of the network, at a learning rate of zero.
"""

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from charloom.architecture import Architecture
from charloom.errors import OptionError
from training.batches import Batches
from training.config import Precision
from training.learner import Learner
from training.recipe import Recipe
from training.recurrence import Arithmetic

_ID_BYTES = 40  # of inputs and targets, and of finding them in the text
_COPIES = 10  # weights, gradient, two moments and average, twice while both arithmetics are tried
_WARMUP_STEPS = 2  # the first steps build kernels
_LEAST_ROUNDS = 3
_CLEARLY_FASTER = 1.2  # what bfloat16 must gain; less may be chance, and the next run's other way


class TooLargeError(OptionError):
    """A step of this network does not fit the memory."""


def too_large(recipe: Recipe, architecture: Architecture) -> TooLargeError:
    """The error about a network whose steps do not fit the memory."""
    return TooLargeError(
        [
            f"--hidden {recipe.hidden} with --layers {recipe.layers} makes "
            f"{architecture.parameters:,} parameters, which with --batch-size "
            f"{recipe.batch_size} and --sequence-length {recipe.sequence_length} do not fit the "
            "memory; make one of them smaller."
        ]
    )


def memory_needed(architecture: Architecture, positions: int, *, precision: Precision) -> int:
    """Bytes that a step on so many positions (lanes x steps) takes at least.

    Within a position: token ids and masks, four times the logits, and of each unit its gates, its
    state and its output, forward and back. Measured: this, or up to twice as much.
    """
    width = 2 if precision == "bfloat16" else 4  # auto tries float32 too
    units = architecture.layers * architecture.hidden * (2 * architecture.gates + 4)
    return (
        _COPIES * 4 * architecture.parameters
        + (_ID_BYTES + 4 * 4 * architecture.vocabulary + width * units) * positions
    )


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def calibrate(
    recipe: Recipe,
    architecture: Architecture,
    batches: Batches,
    *,
    precision: Precision,
    device: torch.device,
    seconds: float,
) -> tuple[Arithmetic, float]:
    """The arithmetic to use and the seconds a step takes with it, from steps on throw-away copies.

    `auto` times both, in turns, so that a busy machine disturbs both alike; some processors refuse
    bfloat16, some emulate it. Raises `OptionError` where bfloat16 was asked for and refused, and
    `TooLargeError` where a step does not fit the memory.
    """
    candidates: list[Arithmetic] = ["float32", "bfloat16"] if precision == "auto" else [precision]
    stepping: dict[Arithmetic, Iterator[float]] = {}
    refusal: RuntimeError | None = None
    with _memory_limit(recipe, architecture):
        for candidate in candidates:
            learner = Learner(
                recipe, architecture, steps=1, seed=0, precision=candidate, device=device
            )
            steps = _step_seconds(learner, batches)
            try:
                for _ in range(_WARMUP_STEPS):
                    next(steps)
            except RuntimeError as error:
                if candidate == "float32" or "memory" in str(error):
                    raise
                refusal = error
            else:
                stepping[candidate] = steps
        if not stepping:
            message = "--precision is 'bfloat16', which this machine refuses; use auto or float32."
            raise OptionError([message]) from refusal
        times: dict[Arithmetic, list[float]] = {candidate: [] for candidate in stepping}
        began, rounds = time.perf_counter(), 0
        while rounds < _LEAST_ROUNDS or time.perf_counter() - began < seconds:
            for candidate, steps in stepping.items():
                times[candidate].append(next(steps))
            rounds += 1
    medians = {candidate: statistics.median(spent) for candidate, spent in times.items()}
    best = choose_precision(medians)
    return best, medians[best]


@contextmanager
def _memory_limit(recipe: Recipe, architecture: Architecture) -> Iterator[None]:
    """Turn the ways in which memory is refused into the sentence about them."""
    try:
        yield
    except MemoryError as error:  # NumPy's; torch has none of its own
        raise too_large(recipe, architecture) from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise too_large(recipe, architecture) from error


def choose_precision(seconds: Mapping[Arithmetic, float]) -> Arithmetic:
    """Which arithmetic to use, by the seconds of a step with each that is possible here.

    bfloat16 only where it is clearly faster, so that chance does not decide between two runs.
    """
    if "float32" not in seconds:
        return "bfloat16"
    if "bfloat16" not in seconds or seconds["float32"] < _CLEARLY_FASTER * seconds["bfloat16"]:
        return "float32"
    return "bfloat16"


def _step_seconds(learner: Learner, batches: Batches) -> Iterator[float]:
    """The time of one step after another, for ever."""
    for step, batch in enumerate(batches.since(0)):
        start = time.perf_counter()
        learner.learn(batch, step=step, rate=0.0)
        yield time.perf_counter() - start
