"""The step of an LSTM, a GRU and a tanh RNN, gate by gate: what the networks of Charloom *are*.

A cell is written as its equations after the two matrix products, because only these differ between
implementations: `from_input` = W_i x + b_i and `from_state` = W_h h + b_h arrive with the gates
stacked side by side in PyTorch's order, and the new state leaves. Faster decoders and training are
measured against this file.

LSTM  Hochreiter & Schmidhuber 1997 (Neural Computation 9:1735) with the forget gate of Gers,
      Schmidhuber & Cummins 2000 (Neural Computation 12:2451):
          i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      how much of the candidate enters
          f = sigmoid(W_if x + b_if + W_hf h + b_hf)      how much of the memory stays
          g =    tanh(W_ig x + b_ig + W_hg h + b_hg)      the candidate
          o = sigmoid(W_io x + b_io + W_ho h + b_ho)      how much of the memory is shown
          c' = f c + i g
          h' = o tanh(c')
GRU   Cho et al. 2014 (arXiv 1406.1078) in cuDNN's form, which PyTorch shares: the reset gate acts
      on the candidate's recurrent product, after its bias, where the paper has it act on h before:
          r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)      how much of the past the candidate sees
          z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)      how much of the past stays
          n =    tanh(W_in x + b_in + r (W_hn h + b_hn))  the candidate
          h' = (1 - z) n + z h
RNN   Elman 1990 (Cognitive Science 14:179):
          h' = tanh(W_i x + b_i + W_h h + b_h)

Array names end in their shape:
    B rows   V vocabulary   I input size   H hidden size   G gates x H   L layers   P state parts

Everything is float32. `product` adds up each number by itself in one fixed order, so a row has the
same bits whatever stands beside it and however many threads BLAS has; a BLAS matrix product does
not (of a (64, 256) by (256, 1024) one, rows alone and together differ). The price, measured on one
core of an AMD EPYC for H = 256: 21 microseconds against 15 for one row, 340 against 124 for 16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from charloom.architecture import Architecture

Floats = NDArray[np.float32]
State = Floats
"""All that a network remembers, (L, P, B, H): parts are h and c in an LSTM, h alone elsewhere."""


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)), through tanh since that overflows nowhere; absolute error below 1e-7."""
    half = np.float32(0.5)
    result: Floats = half * np.tanh(half * x) + half
    return result


def product(x_BI: Floats, weight_GI: Floats) -> Floats:
    """The product x W^T, (B, G): the bits of a number depend on one row of x and of W alone."""
    result: Floats = np.vecdot(x_BI[:, None, :], weight_GI)
    return result


def lstm(from_input_BG: Floats, from_state_BG: Floats, c_BH: Floats) -> tuple[Floats, Floats]:
    """One LSTM step: the new h and c, each (B, H)."""
    i, f, g, o = np.split(from_input_BG + from_state_BG, 4, axis=1)
    c = sigmoid(f) * c_BH + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(from_input_BG: Floats, from_state_BG: Floats, h_BH: Floats) -> Floats:
    """One GRU step: the new h, (B, H)."""
    r_input, z_input, n_input = np.split(from_input_BG, 3, axis=1)
    r_state, z_state, n_state = np.split(from_state_BG, 3, axis=1)
    r = sigmoid(r_input + r_state)
    z = sigmoid(z_input + z_state)
    n = np.tanh(n_input + r * n_state)
    new_BH: Floats = (np.float32(1.0) - z) * n + z * h_BH
    return new_BH


def rnn(from_input_BH: Floats, from_state_BH: Floats) -> Floats:
    """One tanh RNN step: the new h, (B, H)."""
    new_BH: Floats = np.tanh(from_input_BH + from_state_BH)
    return new_BH


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The weights of one recurrent layer, gates stacked as the checkpoint has them."""

    weight_ih_GI: Floats
    weight_hh_GH: Floats
    bias_ih_G: Floats
    bias_hh_G: Floats

    def from_input(self, x_BI: Floats) -> Floats:
        """W_i x + b_i, (B, G)."""
        return product(x_BI, self.weight_ih_GI) + self.bias_ih_G

    def from_state(self, h_BH: Floats) -> Floats:
        """W_h h + b_h, (B, G)."""
        return product(h_BH, self.weight_hh_GH) + self.bias_hh_G


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A whole network: embedding, recurrent layers and output layer, one step at a time."""

    architecture: Architecture
    embedding_VE: Floats
    layers: tuple[Layer, ...]
    output_VH: Floats
    output_bias_V: Floats

    @classmethod
    def from_tensors(cls, architecture: Architecture, tensors: Mapping[str, Floats]) -> Self:
        """Take a checkpoint's tensors, which are those of `architecture.tensor_shapes()`."""
        # Row by row in memory: the bits of a sum may depend on the stride it is read with.
        rows = {
            name: np.require(tensors[name], np.float32, ["C_CONTIGUOUS", "ALIGNED"])
            for name in architecture.tensor_shapes()
        }
        embedding = rows["embedding.weight"]
        return cls(
            architecture=architecture,
            embedding_VE=embedding,
            layers=tuple(
                Layer(
                    weight_ih_GI=rows[f"layers.{layer}.weight_ih"],
                    weight_hh_GH=rows[f"layers.{layer}.weight_hh"],
                    bias_ih_G=rows[f"layers.{layer}.bias_ih"],
                    bias_hh_G=rows[f"layers.{layer}.bias_hh"],
                )
                for layer in range(architecture.layers)
            ),
            output_VH=embedding if architecture.tied else rows["output.weight"],
            output_bias_V=rows["output.bias"],
        )

    def initial_state(self, rows: int) -> State:
        """The state at the start of every text: zeros."""
        parts, hidden = self.architecture.state_parts, self.architecture.hidden
        return np.zeros((self.architecture.layers, parts, rows, hidden), np.float32)

    def step(self, tokens_B: NDArray[np.int32], state_LPBH: State) -> tuple[Floats, State]:
        """Read one token per row: logits of the token after it, (B, V), and the new state."""
        new_LPBH = np.empty_like(state_LPBH)
        first_BG = self.layers[0].from_input(self.embedding_VE[tokens_B])
        x_BH = self._recur(0, first_BG, state_LPBH[0], new_LPBH[0])
        for index, layer in enumerate(self.layers[1:], start=1):
            y_BH = self._recur(index, layer.from_input(x_BH), state_LPBH[index], new_LPBH[index])
            # A residual layer hands on what it read plus what it wrote. Layer 0 hands on only what
            # it wrote, as its input may have another size.
            x_BH = x_BH + y_BH if self.architecture.residual else y_BH
        return product(x_BH, self.output_VH) + self.output_bias_V, new_LPBH

    def _recur(self, index: int, from_input_BG: Floats, old_PBH: Floats, new_PBH: Floats) -> Floats:
        """Run the cell of one layer: fills `new_PBH` and gives the new h, (B, H)."""
        from_state_BG = self.layers[index].from_state(old_PBH[0])
        if self.architecture.cell == "lstm":
            new_PBH[0], new_PBH[1] = lstm(from_input_BG, from_state_BG, old_PBH[1])
        elif self.architecture.cell == "gru":
            new_PBH[0] = gru(from_input_BG, from_state_BG, old_PBH[0])
        else:
            new_PBH[0] = rnn(from_input_BG, from_state_BG)
        new_BH: Floats = new_PBH[0]
        return new_BH
