"""The picture of a run: which curves it has, and of what."""

import math
from typing import Any

import numpy as np
import pytest

from training.curves import LABELS, draw, plot

HISTORY: list[dict[str, Any]] = [
    {
        "step": step,
        "seconds": 1.0,
        "training": 3.0 / step,
        "trained": 3.1 / step,
        "averaged": 3.2 / step,
        "learning_rate": 1e-3 / step,
        "gradient_norm": 0.5 * step,
    }
    for step in (10, 20, 30)
]
EVENT = {"step": 20, "event": "shortened", "steps": 30}


def curves(history: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each curve, by its label."""
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata(), float).tolist(),
            np.asarray(line.get_ydata(), float).tolist(),
        )
        for axes in plot(history, title="m").axes
        for line in axes.lines
    }


def test_every_quantity_of_the_history_has_its_curve() -> None:
    """Losses, learning rate and gradient norm are drawn at their steps; events are not."""
    expected = {
        LABELS[name]: ([10.0, 20.0, 30.0], [line[name] for line in HISTORY]) for name in LABELS
    }
    assert curves([HISTORY[0], EVENT, *HISTORY[1:]]) == expected


def test_a_run_without_held_out_text_has_no_curve_of_it() -> None:
    """What was never measured is neither drawn nor named."""
    history = [
        {name: value for name, value in line.items() if name not in ("trained", "averaged")}
        for line in HISTORY
    ]
    assert set(curves(history)) == {
        LABELS[name] for name in ("training", "learning_rate", "gradient_norm")
    }


def test_a_figure_that_is_missing_once_leaves_a_gap() -> None:
    """A curve is broken where an evaluation did not measure it."""
    history = [HISTORY[0], {**HISTORY[1], "trained": math.nan}, HISTORY[2]]
    _, values = curves(history)[LABELS["trained"]]
    assert values[0] == HISTORY[0]["trained"]
    assert math.isnan(values[1])


@pytest.mark.parametrize("history", [[], [EVENT], HISTORY])
def test_any_history_is_a_picture(history: list[dict[str, Any]]) -> None:
    """A run that was stopped before its first evaluation has one too."""
    assert draw(history, title="m").startswith(b"\x89PNG")
