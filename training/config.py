"""The options of a training run: the only home of their defaults, limits and explanations.

What a network is and how it is fitted is a recipe's business (`training.recipe`); here is what
remains: which recipe, for how long, with which seed and on what machine. `None` means "not given"
and lets the plan decide (`training.plan`). Everything out of range is reported at once.
"""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from charloom.errors import OptionError
from charloom.params import THREADS_LIMIT
from training.limits import option, range_problem
from training.recipe import RECIPES, RecipeName

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DEFAULT_MINUTES = 5.0
DEVICE_REMEDY = "choose auto, cpu, cuda, cuda:N or mps"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """What a user may choose about a run, beside its recipe.

    Raises `OptionError` with one sentence for every field out of range.
    """

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
    output_temperature: float | None = field(
        default=None,
        metadata=option(
            "Divide the output layer by this [default: what fits the held-out text best].",
            least=0.1,
            most=10.0,
        ),
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
    recipe: RecipeName | None = field(
        default=None,
        metadata=option(
            "Named choice of network and fitting, each part of which the options from --cell on "
            "change [default: by corpus, machine and budget].",
            choices=RECIPES,
        ),
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
        if problems:
            raise OptionError(problems)
