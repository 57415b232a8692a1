"""The readable network as a decoder: what any faster one is measured against."""

import numpy as np
from numpy.typing import NDArray

from charloom.architecture import Architecture
from charloom.cell import Floats, Network, State


class CellDecoder:
    """The NumPy network of `charloom.cell` behind the `Decoder` protocol.

    What a decoder is free to lose is lost here: a step turns the logits of the step before into its
    own, and the states of the rows it does not feed into NaN.
    """

    def __init__(
        self, architecture: Architecture, tensors: dict[str, Floats], *, capacity: int
    ) -> None:
        self.vocabulary_size = architecture.vocabulary
        self.capacity = capacity
        self.fingerprint = "cell"
        self._network = Network.from_tensors(architecture, tensors)
        self._state_LPBH = self._network.initial_state(capacity)
        self._logits_BV = np.zeros((capacity, architecture.vocabulary), np.float32)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first B rows: logits (B, V), until the next step."""
        rows = len(tokens_B)
        state = self._state_LPBH
        self._logits_BV[:rows], state[:, :, :rows] = self._network.step(
            tokens_B, state[:, :, :rows]
        )
        self._logits_BV[rows:] = state[:, :, rows:] = np.nan
        return self._logits_BV[:rows]

    def read(self, row: int) -> State:
        """A copy of a row's state, (L, P, H)."""
        return self._state_LPBH[:, :, row].copy()

    def write(self, row: int, state_LPH: State) -> None:
        """Put a state into a row."""
        self._state_LPBH[:, :, row] = state_LPH

    def clear(self, row: int) -> None:
        """Put a row at the start of a text."""
        self._state_LPBH[:, :, row] = 0.0

    def move(self, source: int, target: int) -> None:
        """Put a copy of one row's state into another."""
        self._state_LPBH[:, :, target] = self._state_LPBH[:, :, source]
