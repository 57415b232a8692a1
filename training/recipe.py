"""A recipe: every choice about a network and the way it is fitted to a text.

The named ones, from `tiny` to `large`, are files in `recipes/`, to be read. What depends on how
often the text is going to be read, the dropouts, stands there as points [passes, value]: the more
passes, the more a network has to be kept from learning the text by heart. `Draft.settle` turns
a file, the corpus and the user's own choices into a `Recipe`, in which nothing is open any more.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, Literal, Self, get_args

from charloom.architecture import CELLS, Architecture, Cell
from charloom.errors import OptionError
from training.limits import option, range_problem

RecipeName = Literal["tiny", "small", "base", "large"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)
"""From the smallest network to the largest."""

_GRAIN = 20  # values between two points are rounded to twentieths: people read them
_BATCH_LIMIT = 65536
_EMBEDDING = 128  # of a token, where the hidden size is not smaller


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a recipe decides, all of it settled.

    Raises `OptionError` with one sentence for every field out of range.
    """

    cell: Cell = field(metadata=option("Recurrent cell of every layer.", choices=CELLS))
    layers: int = field(metadata=option("Recurrent layers.", least=1, most=32))
    hidden: int = field(metadata=option("Units in each layer's hidden state.", least=1, most=8192))
    embedding: int = field(
        metadata=option(
            f"Size of a token's embedding [default: the hidden size, {_EMBEDDING} at most].",
            least=1,
            most=8192,
        ),
    )
    residual: bool = field(
        metadata=option(
            "Add each layer's input to its output (from the second on).", choices=(False, True)
        ),
    )
    tied: bool = field(
        metadata=option("Use the embedding as the output layer's weights.", choices=(False, True)),
    )
    dropout: float = field(
        metadata=option(
            "Share of each layer's outputs dropped, one mask per lane and sequence.",
            least=0.0,
            most=0.99,
        ),
    )
    weight_drop: float = field(
        metadata=option("Share of the recurrent weights dropped per step.", least=0.0, most=0.99),
    )
    batch_size: int = field(
        metadata=option("Lanes of text read side by side.", least=1, most=_BATCH_LIMIT)
    )
    sequence_length: int = field(
        metadata=option("Tokens per lane between two weight updates.", least=1, most=65536),
    )
    learning_rate: float = field(
        metadata=option("Peak of AdamW's learning rate.", above=0.0, most=10.0)
    )
    weight_decay: float = field(
        metadata=option("AdamW's decay of weight matrices.", least=0.0, most=10.0)
    )
    clip_norm: float = field(metadata=option("Largest norm of the gradient.", above=0.0, most=1e6))

    def __post_init__(self) -> None:
        check_choices({item.name: getattr(self, item.name) for item in fields(self)})

    def architecture(self, vocabulary: int) -> Architecture:
        """The network for so many tokens."""
        return Architecture(
            cell=self.cell,
            vocabulary=vocabulary,
            embedding=self.embedding,
            hidden=self.hidden,
            layers=self.layers,
            residual=self.residual,
            tied=self.tied,
        )


def check_choices(choices: Mapping[str, Any]) -> None:
    """Raise `OptionError` with every problem of these fields of a recipe."""
    problems = [
        problem
        for item in fields(Recipe)
        if (problem := range_problem(item, choices.get(item.name)))
    ]
    embedding, hidden = choices.get("embedding"), choices.get("hidden")
    if choices.get("tied") and embedding is not None and hidden not in (None, embedding):
        problems.append(
            f"--tied needs --embedding equal to --hidden, not {embedding} and {hidden}; leave "
            "--embedding out."
        )
    if problems:
        raise OptionError(problems)


Points = tuple[tuple[float, float], ...]
"""A value that depends on the passes over the text: (passes, value), in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A named recipe as its file has it, some values still open.

    `worth_from` is how many tokens have to be read within the budget before its network is better
    than a smaller one's; `most_passes` how often the same text is worth reading. Only dropouts may
    be points, as values between them are rounded to twentieths.
    """

    name: RecipeName
    worth_from: int
    most_passes: float
    values: Mapping[str, float | str | bool | Points]

    @classmethod
    def named(cls, name: RecipeName) -> Self:
        """Read the recipe of this name."""
        file = resources.files("training") / "recipes" / f"{name}.toml"
        found = tomllib.loads(file.read_text("utf-8"))
        values = {
            key: tuple((passes, level) for passes, level in value)
            if isinstance(value, list)
            else value
            for table in ("network", "training")
            for key, value in found[table].items()
        }
        return cls(
            name=name,
            worth_from=found["worth_from"],
            most_passes=found["most_passes"],
            values=values,
        )

    @classmethod
    def nearest(cls, choices: Mapping[str, Any]) -> Self:
        """The recipe whose own network is nearest in size to the one that is chosen."""
        drafts = [cls.named(name) for name in RECIPES]

        def distance(draft: Self) -> float:
            own, asked = (_size({**draft.values, **some}) for some in ({}, choices))
            return abs(math.log(asked / own))

        return min(drafts, key=distance)

    def settle(
        self,
        choices: Mapping[str, Any],
        *,
        passes: float,
        tokens: float = math.inf,
        document_tokens: float = math.inf,
    ) -> Recipe:
        """The recipe for a text that is read so often, with what the user chose instead.

        `tokens` is the text's length and `document_tokens` the mean length of its documents: where
        they are shorter than a sequence, more lanes make up for it, though no more than there is
        text for. Raises `OptionError` for choices out of range.
        """
        settled: dict[str, Any] = {
            key: at(value, passes) if isinstance(value, tuple) else value
            for key, value in self.values.items()
        }
        settled |= choices
        if "embedding" not in settled:
            hidden = settled["hidden"]
            settled["embedding"] = hidden if settled["tied"] else min(hidden, _EMBEDDING)
        if "batch_size" not in choices:
            length = min(max(document_tokens, 1.0), settled["sequence_length"])
            lanes = settled["batch_size"] * settled["sequence_length"] / length
            most = min(tokens / length, _BATCH_LIMIT)
            settled["batch_size"] = max(1, round(min(lanes, most)))
        return Recipe(**settled)


def _size(values: Mapping[str, Any]) -> int:
    """What the number of recurrent weights grows with."""
    size: int = values["layers"] * values["hidden"] ** 2
    return size


def at(points: Points, passes: float) -> float:
    """The value for so many passes: straight between two points on a logarithmic scale.

    Beyond the first and the last point it is theirs; between them it is rounded to twentieths.
    """
    (first, value), *rest = points
    if passes <= first:
        return value
    for after, level in rest:
        if passes < after:
            share = math.log(passes / first) / math.log(after / first)
            return round(_GRAIN * (value + share * (level - value))) / _GRAIN
        first, value = after, level
    return value
