"""What a field of options says of itself: its sentence for `--help`, and the values it takes.

The options of a corpus, of a run and of a recipe are dataclasses whose fields carry this as their
metadata, so that a limit stands once and every sentence about it is made from there.
"""

import operator
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from charloom.cli.options import flag

_BOUNDS = (
    ("least", "of at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
    ("below", "below", operator.lt),
)


def option(help_: str, **constraints: Any) -> Mapping[str, Any]:
    """Metadata of a field: its sentence for `--help` and the range it must lie in."""
    ends = [
        f"{word}{constraints[key]:g}" if isinstance(constraints[key], float) else constraints[key]
        for key, word in (("least", ""), ("above", "above "), ("most", ""), ("below", "below "))
        if key in constraints
    ]
    return {"help": f"{help_}  [{' to '.join(map(str, ends))}]" if ends else help_, **constraints}


def range_problem(item: "Field[Any]", value: object) -> str | None:
    """The sentence for a value outside its field's limits, or None; None as a value is fine."""
    limits = item.metadata
    if value is None:
        return None
    if "choices" in limits:
        fits = any(type(value) is type(choice) and value == choice for choice in limits["choices"])
        listed = ", ".join(str(choice).lower() for choice in limits["choices"])
        return None if fits else f"{flag(item)} is {value!r}; choose one of {listed}."
    bounds = [(word, holds, limits[key]) for key, word, holds in _BOUNDS if key in limits]
    if not bounds:
        return None
    is_whole = any(isinstance(limit, int) for _, _, limit in bounds)
    kind = "whole number" if is_whole else "number"
    if (
        isinstance(value, int if is_whole else int | float)
        and not isinstance(value, bool)
        and all(holds(value, limit) for _, holds, limit in bounds)
    ):
        return None
    return f"{flag(item)} is {value!r}; give a {kind} {_range_words(limits)}."


def _range_words(limits: Mapping[str, Any]) -> str:
    return " and ".join(f"{word} {limits[key]}" for key, word, _ in _BOUNDS if key in limits)
