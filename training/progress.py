"""Where a run stands, beside its tensors: what is saved with them and read again by a resume."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: at which step, how good, of which weights, how tempered."""

    step: int
    nats: float
    averaged: bool
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything that the next step of the loop depends on and that is no tensor.

    `sum_nats` and `sum_tokens` count since the last evaluation; `smooth` is the running loss that
    the watch for divergence looks at; `shortened` is (at step, new number of steps); `temperature`
    is the one that the next evaluation tries, and its neighbours.
    """

    step: int = 0
    best: Best | None = None
    stale: int = 0
    sum_nats: float = 0.0
    sum_tokens: int = 0
    smooth: float | None = None
    seconds: float = 0.0
    shortened: tuple[int, int] | None = None
    temperature: float = 1.0
    finished: bool = False

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` gave."""
        values = dict(fields)
        if values["best"] is not None:
            values["best"] = Best(**values["best"])
        if values["shortened"] is not None:
            values["shortened"] = tuple(values["shortened"])
        return cls(**values)
