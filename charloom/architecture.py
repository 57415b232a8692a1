"""What a network is made of, in the numbers that fix the shape of every tensor.

Training builds its modules from an `Architecture`, the NumPy cell reads one, and a checkpoint is
checked against one before a single tensor is used. The names of the tensors are the names in the
weights file:

    embedding.weight (V, E)
    layers.K.weight_ih (G*H, E or H)   layers.K.weight_hh (G*H, H)
    layers.K.bias_ih (G*H)             layers.K.bias_hh (G*H)
    output.weight (V, H), absent when tied to the embedding      output.bias (V)

V vocabulary, E embedding size, H hidden size, G gates: 4 in an LSTM (input, forget, candidate,
output), 3 in a GRU (reset, update, candidate), 1 in a tanh RNN, stacked in PyTorch's order.

With residual links, layer K >= 1 reads the sum of what layer K-1 read and wrote (layer 1 reads what
layer 0 wrote, since that layer's input may have another size), and the output layer reads the sum
over the last layer in the same way.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from charloom.errors import OptionError

Cell = Literal["lstm", "gru", "rnn"]
CELLS: tuple[Cell, ...] = get_args(Cell)
GATES: Mapping[Cell, int] = {"lstm": 4, "gru": 3, "rnn": 1}
STATE_PARTS: Mapping[Cell, int] = {"lstm": 2, "gru": 1, "rnn": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The shape of one network.

    Raises `OptionError` with every problem when a number is out of range.
    """

    cell: Cell
    vocabulary: int
    embedding: int
    hidden: int
    layers: int
    residual: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.cell not in CELLS:
            problems.append(f"cell is {self.cell!r}; choose one of {', '.join(CELLS)}.")
        for name in ("vocabulary", "embedding", "hidden", "layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                problems.append(f"{name} is {value!r}; give a whole number of at least 1.")
        problems += [
            f"{name} is {getattr(self, name)!r}; give true or false."
            for name in ("residual", "tied")
            if type(getattr(self, name)) is not bool
        ]
        if self.tied is True and self.embedding != self.hidden:
            problems.append(
                f"tied embeddings need embedding size = hidden size, not {self.embedding} and "
                f"{self.hidden}; make them equal or leave them untied."
            )
        if problems:
            raise OptionError(problems)

    @property
    def gates(self) -> int:
        """Gate blocks stacked in each layer's weights."""
        return GATES[self.cell]

    @property
    def state_parts(self) -> int:
        """Vectors a layer carries from step to step: h and c in an LSTM, h alone elsewhere."""
        return STATE_PARTS[self.cell]

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the weights file, in the order of the forward pass."""
        rows = self.gates * self.hidden
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.vocabulary, self.embedding)}
        for layer in range(self.layers):
            width = self.embedding if layer == 0 else self.hidden
            shapes[f"layers.{layer}.weight_ih"] = (rows, width)
            shapes[f"layers.{layer}.weight_hh"] = (rows, self.hidden)
            shapes[f"layers.{layer}.bias_ih"] = (rows,)
            shapes[f"layers.{layer}.bias_hh"] = (rows,)
        if not self.tied:
            shapes["output.weight"] = (self.vocabulary, self.hidden)
        shapes["output.bias"] = (self.vocabulary,)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, for `config.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; raises `OptionError` on a missing, unknown or bad field."""
        names = set(cls.__dataclass_fields__)
        problems = [f"architecture has no field {name!r}." for name in sorted(set(fields) - names)]
        problems += [f"architecture lacks {name!r}." for name in sorted(names - set(fields))]
        if problems:
            raise OptionError(problems)
        return cls(**fields)
