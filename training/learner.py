"""One training step: forward with teacher forcing, cross-entropy, backward, clip, update, average.

A learner holds what a step changes (weights, moments, averaged weights, hidden state) and nothing
else; which text it reads, at which rate and for how long is told to it step by step. The state it
carries can be taken out and put back exactly.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from charloom.architecture import Architecture
from charloom.errors import DivergenceError
from training.batches import IGNORED, Batch
from training.masks import Purpose, chance
from training.network import OUTPUT_GAIN, LayerState, Masks, Network
from training.optimiser import Average, Optimiser
from training.recipe import Recipe
from training.recurrence import Arithmetic

RARE_RATE = 0.05
"""How often a rare character is shown as the unknown token, so that its row is trained."""

RARE_SHARE = 0.001
"""The unknown row is trained on the least frequent characters, up to this share of the text."""


class Learner:
    """A network in training.

    `unknown` is the token that stands in for the tokens listed in `rare` now and then; None where
    the tokenizer knows every text.
    """

    def __init__(
        self,
        recipe: Recipe,
        architecture: Architecture,
        *,
        steps: int,
        seed: int,
        precision: Arithmetic,
        device: torch.device,
        unknown: int | None = None,
        rare: Tensor | None = None,
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self._precision: Arithmetic = precision
        self._device = device
        self._unknown = unknown
        self._rare = rare
        self.network = Network(architecture, seed=seed).to(device)
        self.optimiser = Optimiser(
            self.network,
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            gains={"output.weight": OUTPUT_GAIN},
        )
        self.average = Average(self.network, planned=steps)
        self.hidden = self.network.initial_state(recipe.batch_size)

    def learn(self, batch: Batch, *, step: int, rate: float) -> tuple[float, float]:
        """Update the weights once; the mean loss in nats per token and the gradient's norm.

        Raises `DivergenceError` before anything is changed when either is not a finite number.
        """
        recipe = self._recipe
        if batch.fresh:
            self.hidden = self.network.initial_state(recipe.batch_size)
        inputs = torch.from_numpy(batch.inputs)
        targets = torch.from_numpy(batch.targets)
        if self._unknown is not None and self._rare is not None:
            inputs, targets = self._hide_rare(inputs, targets, step=step)
        masks = Masks.draw(
            self.network.architecture,
            lanes=recipe.batch_size,
            dropout=recipe.dropout,
            weight_drop=recipe.weight_drop,
            seed=self._seed,
            step=step,
            device=self._device,
        )
        logits, hidden = self.network(
            inputs.to(self._device), self.hidden, masks=masks, precision=self._precision
        )
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets.to(self._device).flatten(), ignore_index=IGNORED
        )
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        nats, norm = float(loss.detach()), self.optimiser.clip()
        if not (_finite(nats) and _finite(norm)):
            what = f"the loss became {nats}" if not _finite(nats) else f"the gradient became {norm}"
            raise DivergenceError(
                f"Training diverged at step {step + 1}: {what} at learning rate {rate:.3g}. "
                f"Train again with --overwrite and a smaller --learning-rate than "
                f"{recipe.learning_rate:g}."
            )
        self.hidden = [tuple(part.detach() for part in layer) for layer in hidden]
        self.optimiser.step(rate)
        self.average.update(step)
        return nats, norm

    def _hide_rare(self, inputs: Tensor, targets: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Show a few rare characters as unknown, input and target apart: each has its own draw."""
        assert self._rare is not None
        assert self._unknown is not None
        pair = torch.stack([inputs, targets])
        hit = torch.isin(pair, self._rare)
        if hit.any():
            drawn = chance(
                tuple(pair.shape),
                RARE_RATE,
                seed=self._seed,
                step=step,
                purpose=Purpose.RARE,
            )
            pair = torch.where(hit & torch.from_numpy(drawn), self._unknown, pair)
        return pair[0], pair[1]

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name."""
        tensors: dict[str, Tensor] = {
            f"weights.{name}": part for name, part in self.network.named_parameters()
        }
        tensors |= {f"average.{name}": part for name, part in self.average.weights.items()}
        tensors |= dict(self.optimiser.state())
        for index, layer in enumerate(self.hidden):
            tensors |= {f"hidden.{index}.{part}": value for part, value in enumerate(layer)}
        return tensors

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from what `state` gave after `step` steps."""
        for name, parameter in self.network.named_parameters():
            parameter.copy_(state[f"weights.{name}"])
        for name, part in self.average.weights.items():
            part.copy_(state[f"average.{name}"])
        self.optimiser.load(state, step=step)
        self.hidden = [
            _layer_state(state, index, len(layer), self._device)
            for index, layer in enumerate(self.hidden)
        ]


def rare_tokens(counts: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """The least frequent characters, as many as make up `RARE_SHARE` of the text, at least one."""
    order = np.argsort(counts, kind="stable")
    order = order[(counts[order] > 0) & (order != end)]
    share = np.cumsum(counts[order]) / max(counts.sum(), 1)
    count = max(int(np.searchsorted(share, RARE_SHARE, side="right")), 1)
    rare: NDArray[np.int64] = order[:count]
    return rare


def _layer_state(
    state: Mapping[str, Tensor], index: int, parts: int, device: torch.device
) -> LayerState:
    return tuple(state[f"hidden.{index}.{part}"].to(device) for part in range(parts))


def _finite(value: float) -> bool:
    return float("-inf") < value < float("inf")
