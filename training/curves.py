"""A run as a picture: `loss.png`, from the lines of `history.jsonl`.

Above, the losses that were measured: of training, with its dropout, and of the held-out text.
Below, what explains their turns: the learning rate and the norm of the gradient before it was
clipped, as they were at each evaluation.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a second of import that only the end of a run pays
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {
    "training": "training (with dropout)",
    "trained": "held out, trained weights",
    "averaged": "held out, averaged weights",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
}
"""What each curve is called, by its name in the history."""


def draw(history: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """A PNG of a run's curves over its steps, losses in nats per character."""
    buffer = io.BytesIO()
    plot(history, title=title).savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def plot(history: Sequence[Mapping[str, Any]], *, title: str) -> "Figure":
    """The same as a figure of matplotlib; a quantity that was never measured has no curve."""
    from matplotlib.figure import Figure

    lines = [line for line in history if "training" in line]  # events have no figures
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    norm = rate.twinx()
    losses.set(ylabel="nats per character", title=title)
    rate.set(xlabel="step", ylabel=LABELS["learning_rate"])
    norm.set(ylabel=LABELS["gradient_norm"])
    for axes, names, colour in (
        (losses, ("training", "trained", "averaged"), 0),
        (rate, ("learning_rate",), 3),
        (norm, ("gradient_norm",), 4),
    ):
        _add(axes, lines, names, first_colour=colour)
    for axes in (losses, rate):
        axes.grid(alpha=0.3)
    if lines:
        losses.legend()
        norm.legend(handles=[*rate.lines, *norm.lines], loc="upper right")
    return figure


def _add(
    axes: "Axes", lines: Sequence[Mapping[str, Any]], names: Sequence[str], *, first_colour: int
) -> None:
    """Draw those of the named quantities that were measured, each in a colour of its own."""
    for colour, name in enumerate(names, start=first_colour):
        values = [line.get(name, math.nan) for line in lines]
        if not all(map(math.isnan, values)):
            steps = [line["step"] for line in lines]
            axes.plot(steps, values, label=LABELS[name], color=f"C{colour}")
