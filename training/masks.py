"""Every random mask of training, keyed and therefore never stored.

A mask is a function of (seed, step, purpose, layer): the counter of a Philox generator starts
there, so a resumed run draws what the uninterrupted one drew, and a process that holds some of the
lanes takes its rows of the same draw. Sixteen bits decide each place, so a rate is honoured to
1/65,536.
"""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LEVELS = 1 << 16


class Purpose(IntEnum):
    """What a mask is for; part of its key."""

    DROPOUT = 1
    WEIGHT_DROP = 2
    RARE = 3


def chance(
    shape: tuple[int, ...],
    rate: float,
    *,
    seed: int,
    step: int,
    purpose: Purpose,
    layer: int = 0,
) -> NDArray[np.bool_]:
    """A boolean array that is True with probability `rate` at each place."""
    size = int(np.prod(shape))
    generator = np.random.Philox(key=[seed, purpose], counter=[0, 0, layer, step])
    bits = generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
    return (bits < round(rate * _LEVELS)).reshape(shape)


def keep_mask(
    shape: tuple[int, ...],
    rate: float,
    *,
    seed: int,
    step: int,
    purpose: Purpose,
    layer: int = 0,
) -> Tensor:
    """0 where dropped, 1 / (1 - rate) where kept, float32: the expectation stays what it was."""
    dropped = chance(shape, rate, seed=seed, step=step, purpose=purpose, layer=layer)
    kept = 1.0 / (1.0 - round(rate * _LEVELS) / _LEVELS)
    return torch.from_numpy(~dropped).float().mul_(kept)
