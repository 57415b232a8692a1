"""AdamW, the learning rate as a pure function of the step, and the average of the weights."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

WARMUP_SHARE = 0.02
FINAL_SHARE = 0.02
AVERAGE_SHARE = 0.03
BETAS = (0.9, 0.99)


def learning_rate(
    step: float, *, peak: float, planned: int, shortened: tuple[int, int] | None
) -> float:
    """Learning rate of update `step`, counted from 0, in a plan of `planned` updates.

    Linear warm-up over 2 % of the plan, then half a cosine down to 2 % of the peak (Loshchilov and
    Hutter, 2017). `shortened` is (at, steps): from update `at` on the plan ends after `steps`
    updates, and the same curve is walked faster from there, without a jump.
    """
    place = step
    if shortened is not None and step > shortened[0]:
        at, steps = shortened
        place = at + (step - at) * (planned - at) / max(steps - at, 1)
    warmup = max(1.0, WARMUP_SHARE * planned)
    if place + 1 < warmup:
        return peak * (place + 1) / warmup
    progress = min((place + 1 - warmup) / max(planned - warmup, 1.0), 1.0)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimiser:
    """AdamW (Loshchilov and Hutter, 2019) with norm clipping; only matrices decay.

    A parameter in `gains` learns so many times as fast as the others, and decays as they do.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        weight_decay: float,
        clip_norm: float,
        gains: Mapping[str, float] | None = None,
    ) -> None:
        self._parameters = dict(network.named_parameters())
        self._clip_norm = clip_norm
        # As few groups as there are kinds: the fused kernel is called once for each.
        kinds: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            gain = 1.0 if gains is None else gains.get(name, 1.0)
            decay = weight_decay / gain if parameter.ndim > 1 else 0.0
            kinds.setdefault((decay, gain), []).append(parameter)
        groups = [
            {"params": parameters, "weight_decay": decay, "gain": gain}
            for (decay, gain), parameters in kinds.items()
        ]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)
        zeros = {
            f"{moment}.{name}": torch.zeros_like(parameter)
            for name, parameter in self._parameters.items()
            for moment in ("first", "second")
        }
        self.load(zeros, step=0)

    def clip(self) -> float:
        """Scale the gradients down to the largest norm allowed; their norm before that."""
        parameters = self._parameters.values()
        return float(nn.utils.clip_grad_norm_(parameters, self._clip_norm, foreach=True))

    def step(self, rate: float) -> None:
        """Update the weights at this learning rate and forget the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = rate * group["gain"]
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Both moments of every parameter, by name."""
        for name, parameter in self._parameters.items():
            moments = self._adam.state[parameter]
            yield f"first.{name}", moments["exp_avg"]
            yield f"second.{name}", moments["exp_avg_sq"]

    def load(self, state: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from what `state` gave after `step` updates."""
        for name, parameter in self._parameters.items():
            self._adam.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": state[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": state[f"second.{name}"].to(parameter.device),
            }


class Average:
    """Exponential average of the weights over about 3 % of the plan (Polyak and Juditsky, 1992).

    Its horizon grows with the step at first, so that the random start is soon forgotten.
    """

    def __init__(self, network: nn.Module, *, planned: int) -> None:
        self._network = network
        self._decay = 1 - 1 / max(AVERAGE_SHARE * planned, 1.0)
        self.weights = {
            name: parameter.detach().clone() for name, parameter in network.named_parameters()
        }

    def update(self, step: int) -> None:
        """Take in the weights after update `step`, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        latest = [parameter.detach() for parameter in self._network.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), latest, 1 - decay)
