"""The network that is fitted: embedding, a stack of single-layer recurrent modules, output layer.

One module per layer, so that locked dropout, residual links and weight drop fit between the fused
kernels; parameters carry the names of `charloom.architecture`, so a state dict is a weights file.

Legend: T steps, B lanes, V vocabulary, E embedding size, H hidden size, G gates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from charloom.architecture import Architecture
from training.masks import Purpose, keep_mask
from training.recurrence import Arithmetic, recur

OUTPUT_GAIN = 4.0
"""How many times wider than by its number of inputs the output layer starts, and faster it learns.

A hidden state is about a quarter as large as what a layer's weights are usually drawn for. The gain
is as good as multiplying it by four, or as normalising it, and costs nothing: 1.438 nats per
character instead of 1.518 after four passes over a megabyte (docs/experiments.md).
"""

LayerState = tuple[Tensor, ...]
"""What a layer carries, each of shape (B, H) and float32: (h, c) in an LSTM, (h,) elsewhere."""


@dataclass(frozen=True, slots=True)
class Masks:
    """The random masks of one step, a pair of entries per layer; None leaves everything as it is.

    `outputs[k]` of shape (1, B, H) multiplies what layer k hands up: one mask for all T steps, the
    locked dropout of Gal and Ghahramani (2016). `recurrent[k]` of shape (G*H, H) multiplies the
    layer's recurrent weights: DropConnect as in AWD-LSTM (Merity, Keskar and Socher, 2018).
    """

    outputs: Sequence[Tensor | None]
    recurrent: Sequence[Tensor | None]

    @classmethod
    def draw(
        cls,
        architecture: Architecture,
        *,
        lanes: int,
        dropout: float,
        weight_drop: float,
        seed: int,
        step: int,
        device: torch.device,
    ) -> Self:
        """The masks of this (seed, step); a rate of 0 draws nothing."""
        hidden, rows = architecture.hidden, architecture.gates * architecture.hidden
        shapes = (
            (Purpose.DROPOUT, dropout, (1, lanes, hidden)),
            (Purpose.WEIGHT_DROP, weight_drop, (rows, hidden)),
        )
        outputs, recurrent = (
            [
                keep_mask(shape, rate, seed=seed, step=step, purpose=purpose, layer=layer).to(
                    device
                )
                if rate
                else None
                for layer in range(architecture.layers)
            ]
            for purpose, rate, shape in shapes
        )
        return cls(outputs, recurrent)


class RecurrentLayer(nn.Module):
    """The weights of one recurrent layer, gates stacked in PyTorch's order."""

    def __init__(self, architecture: Architecture, inputs: int) -> None:
        super().__init__()
        rows, hidden = architecture.gates * architecture.hidden, architecture.hidden
        self.cell = architecture.cell
        self.weight_ih = nn.Parameter(torch.empty(rows, inputs))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def forward(
        self,
        inputs_TBI: Tensor,
        state: LayerState,
        *,
        weight_ih: Tensor,
        recurrent_mask: Tensor | None,
        precision: Arithmetic,
    ) -> tuple[Tensor, LayerState]:
        """Outputs (T, B, H) and the state after the last step."""
        weight_hh = self.weight_hh if recurrent_mask is None else self.weight_hh * recurrent_mask
        return recur(
            self.cell,
            inputs_TBI,
            state,
            weight_ih,
            weight_hh,
            self.bias_ih,
            self.bias_hh,
            precision=precision,
        )


class OutputLayer(nn.Module):
    """The weights from the last layer to the logits; those of a tied layer are the embedding's."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        shape = (architecture.vocabulary, architecture.hidden)
        self.weight = None if architecture.tied else nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(architecture.vocabulary))


class Network(nn.Module):
    """A stack of recurrent layers between an embedding and an output layer.

    A new network is drawn from `seed`: recurrent layers uniform in +-1/sqrt(H), the output layer
    in `OUTPUT_GAIN` times that, and an LSTM's forget-gate bias 1 (Jozefowicz, Zaremba and
    Sutskever, 2015). Without a seed the parameters are
    left empty for `load_state_dict`, so what was trained is never initialised over.
    """

    def __init__(self, architecture: Architecture, *, seed: int | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        vocabulary, hidden = architecture.vocabulary, architecture.hidden
        self.embedding = nn.Embedding(
            vocabulary,
            architecture.embedding,
            _weight=torch.empty(vocabulary, architecture.embedding),
        )
        self.layers = nn.ModuleList(
            RecurrentLayer(architecture, architecture.embedding if layer == 0 else hidden)
            for layer in range(architecture.layers)
        )
        self.output = OutputLayer(architecture)
        if seed is not None:
            self._draw(torch.Generator().manual_seed(seed))

    @classmethod
    def from_arrays(cls, architecture: Architecture, arrays: Mapping[str, Any]) -> Self:
        """The network with these weights: NumPy arrays as in a checkpoint, which are copied."""
        network = cls(architecture)
        network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
        return network

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        hidden = self.architecture.hidden
        bound = 1 / math.sqrt(hidden)
        scale = bound if self.architecture.tied else 1.0
        self.embedding.weight.normal_(0.0, scale, generator=generator)
        for layer in self._stack:
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
            if self.architecture.cell == "lstm":
                layer.bias_ih[hidden : 2 * hidden] = 1.0
                layer.bias_hh[hidden : 2 * hidden] = 0.0
        if self.output.weight is not None:
            wide = OUTPUT_GAIN * bound
            self.output.weight.uniform_(-wide, wide, generator=generator)
        self.output.bias.zero_()

    @property
    def _stack(self) -> list[RecurrentLayer]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentLayer)]

    def initial_state(self, lanes: int) -> list[LayerState]:
        """The zero state of every layer."""
        device = self.embedding.weight.device
        return [
            tuple(
                torch.zeros(lanes, self.architecture.hidden, device=device)
                for _ in range(self.architecture.state_parts)
            )
            for _ in self.layers
        ]

    def _first_input(self, tokens_TB: Tensor, precision: Arithmetic) -> tuple[Tensor, Tensor]:
        """What layer 0 reads, (T, B, I), and its input weights, (G*H, I).

        W_ih E[token] is column `token` of W_ih E^T. Where there are fewer tokens than values in an
        embedding, that small product and one-hot tokens replace the products of all steps, forward
        and backward: 6 % of a 2 x 256 step, 20 % of a 2 x 512 one with 512 values (V = 67).
        """
        weight_ih, embedding = self._stack[0].weight_ih, self.embedding.weight
        if self.architecture.vocabulary >= self.architecture.embedding:
            return self.embedding(tokens_TB), weight_ih
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        tokens = torch.eye(self.architecture.vocabulary, dtype=dtype, device=embedding.device)
        return tokens[tokens_TB], weight_ih @ embedding.t()

    def forward(
        self,
        tokens_TB: Tensor,
        state: Sequence[LayerState],
        *,
        masks: Masks | None = None,
        precision: Arithmetic = "float32",
    ) -> tuple[Tensor, list[LayerState]]:
        """Logits (T, B, V) in float32 and the state after the last step."""
        stream, weight_ih = self._first_input(tokens_TB, precision)
        after: list[LayerState] = []
        for index, layer in enumerate(self._stack):
            outputs, layer_state = layer(
                stream,
                state[index],
                weight_ih=weight_ih if index == 0 else layer.weight_ih,
                recurrent_mask=None if masks is None else masks.recurrent[index],
                precision=precision,
            )
            after.append(layer_state)
            if masks is not None and (mask := masks.outputs[index]) is not None:
                outputs = outputs * mask.to(outputs.dtype)
            residual = self.architecture.residual and index > 0
            stream = stream + outputs if residual else outputs
        weight = self.embedding.weight if self.output.weight is None else self.output.weight
        logits = functional.linear(stream, weight.to(stream.dtype))
        return logits.float() + self.output.bias, after
