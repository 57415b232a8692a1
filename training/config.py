"""The options of a training run: the only home of their defaults, limits and explanations.

The command line, a TOML file and a program all fill the same frozen dataclass; `None` means "not
given" and lets the plan decide (`training.plan`). Everything out of range is reported at once.
"""

import operator
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args

from charloom.architecture import CELLS, Cell
from charloom.cli.options import flag
from charloom.errors import OptionError
from charloom.params import THREADS_LIMIT

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DEFAULT_MINUTES = 5.0
DEVICE_REMEDY = "choose auto, cpu, cuda, cuda:N or mps"

_BOUNDS = (
    ("least", "of at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
    ("below", "below", operator.lt),
)


def _range_words(limits: Mapping[str, Any]) -> str:
    return " and ".join(f"{word} {limits[key]}" for key, word, _ in _BOUNDS if key in limits)


def option(help_: str, **constraints: Any) -> Mapping[str, Any]:
    """Metadata of a field: its sentence for `--help` and the range it must lie in."""
    ends = [
        f"{word}{constraints[key]:g}" if isinstance(constraints[key], float) else constraints[key]
        for key, word in (("least", ""), ("above", "above "), ("most", ""), ("below", "below "))
        if key in constraints
    ]
    return {"help": f"{help_}  [{' to '.join(map(str, ends))}]" if ends else help_, **constraints}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """What a user may choose about the network and the way it is fitted.

    Raises `OptionError` with one sentence for every field out of range.
    """

    cell: Cell = field(
        default="lstm", metadata=option("Recurrent cell of every layer.", choices=CELLS)
    )
    layers: int = field(default=2, metadata=option("Recurrent layers.", least=1, most=32))
    hidden: int = field(
        default=256, metadata=option("Units in each layer's hidden state.", least=1, most=8192)
    )
    embedding: int | None = field(
        default=None,
        metadata=option(
            "Size of a token's embedding [default: the hidden size, 128 at most].",
            least=1,
            most=8192,
        ),
    )
    residual: bool = field(
        default=False,
        metadata=option(
            "Add each layer's input to its output (from the second on).", choices=(False, True)
        ),
    )
    tied: bool = field(
        default=False,
        metadata=option("Use the embedding as the output layer's weights.", choices=(False, True)),
    )
    dropout: float = field(
        default=0.1,
        metadata=option(
            "Share of each layer's outputs dropped, one mask per lane and sequence.",
            least=0.0,
            most=0.99,
        ),
    )
    weight_drop: float = field(
        default=0.0,
        metadata=option("Share of the recurrent weights dropped per step.", least=0.0, most=0.99),
    )
    batch_size: int = field(
        default=16, metadata=option("Lanes of text read side by side.", least=1, most=65536)
    )
    sequence_length: int = field(
        default=64,
        metadata=option("Tokens per lane between two weight updates.", least=1, most=65536),
    )
    learning_rate: float = field(
        default=4e-3, metadata=option("Peak of AdamW's learning rate.", above=0.0, most=10.0)
    )
    weight_decay: float = field(
        default=0.01, metadata=option("AdamW's decay of weight matrices.", least=0.0, most=10.0)
    )
    clip_norm: float = field(
        default=1.0, metadata=option("Largest norm of the gradient.", above=0.0, most=1e6)
    )
    minutes: float | None = field(
        default=None,
        metadata=option(
            f"Budget of the whole command in minutes [default: {DEFAULT_MINUTES:g}].",
            above=0.0,
            most=525_600.0,
        ),
    )
    epochs: float | None = field(
        default=None,
        metadata=option("Budget in passes over the training text.", above=0.0, most=1e6),
    )
    steps: int | None = field(
        default=None, metadata=option("Budget in weight updates.", least=1, most=10**9)
    )
    patience: int = field(
        default=12,
        metadata=option("Evaluations without progress before stopping early.", least=1, most=10**6),
    )
    seed: int = field(
        default=1,
        metadata=option("Seed of weights, masks and data order.", least=0, most=2**53 - 1),
    )
    precision: Precision = field(
        default="auto",
        metadata=option(
            "Arithmetic of the matrix products; auto takes bfloat16 where it is clearly faster.",
            choices=PRECISIONS,
        ),
    )
    device: str = field(
        default="auto",
        metadata=option("Where to compute: auto, cpu, cuda or cuda:N, mps."),
    )
    threads: int | None = field(
        default=None,
        metadata=option("Processor threads [default: one per core].", least=1, most=THREADS_LIMIT),
    )

    def __post_init__(self) -> None:
        problems = [
            problem
            for item in fields(self)
            if (problem := range_problem(item, getattr(self, item.name)))
        ]
        budgets = [
            f"--{name}"
            for name in ("minutes", "epochs", "steps")
            if getattr(self, name) is not None
        ]
        if len(budgets) > 1:
            problems.append(f"{' and '.join(budgets)} are both given; give one budget.")
        if not isinstance(self.device, str):
            problems.append(f"--device is {self.device!r}; {DEVICE_REMEDY}.")
        if self.tied and self.embedding not in (None, self.hidden):
            problems.append(
                f"--tied needs --embedding equal to --hidden, not {self.embedding} and "
                f"{self.hidden}; leave --embedding out."
            )
        if problems:
            raise OptionError(problems)


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
