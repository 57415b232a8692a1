"""Random masks: keyed, exact in their rate, independent of one another."""

import numpy as np
import pytest

from training.masks import Purpose, chance, keep_mask


def test_a_mask_is_a_function_of_its_key() -> None:
    """The same key draws the same mask, and each part of the key matters."""
    key = {"seed": 3, "step": 9, "purpose": Purpose.DROPOUT, "layer": 1}

    mask = chance((40, 50), 0.5, **key)

    assert np.array_equal(mask, chance((40, 50), 0.5, **key))
    for change in ({"seed": 4}, {"step": 10}, {"purpose": Purpose.RARE}, {"layer": 0}):
        assert not np.array_equal(mask, chance((40, 50), 0.5, **key | change))


def test_lanes_of_a_part_are_rows_of_the_whole() -> None:
    """A process that holds the first lanes draws the first rows of everyone's mask."""
    key = {"seed": 3, "step": 9, "purpose": Purpose.DROPOUT}

    whole = chance((16, 33), 0.3, **key)

    assert np.array_equal(whole[:5], chance((5, 33), 0.3, **key))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_a_mask_hits_at_its_rate(rate: float) -> None:
    """Of a million places the share that is hit lies within five standard deviations."""
    hits = chance((1000, 1000), rate, seed=1, step=1, purpose=Purpose.WEIGHT_DROP)

    assert abs(hits.mean() - rate) <= 5 * (rate * (1 - rate)) ** 0.5 / 1000


def test_what_is_kept_is_scaled_up() -> None:
    """A keep mask holds 0 and 1 / (1 - rate) only, so that its mean is about one."""
    mask = keep_mask((500, 500), 0.25, seed=1, step=1, purpose=Purpose.DROPOUT)

    assert set(mask.unique().tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert abs(float(mask.mean()) - 1.0) < 0.01
