"""The learning rate as a pure function, AdamW against torch's own, and the running average."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.network import OUTPUT_GAIN
from training.optimiser import FINAL_SHARE, Average, Optimiser, learning_rate


def test_the_rate_warms_up_peaks_and_falls_to_its_floor() -> None:
    """Linear to the peak over 2 % of the steps, then half a cosine down to 2 % of the peak."""
    rates = [learning_rate(step, peak=1.0, planned=1000, shortened=None) for step in range(1000)]

    assert rates[0] == pytest.approx(1 / 20)
    assert rates[9] == pytest.approx(0.5)
    assert max(rates) == rates[19] == 1.0
    middle = 19 + 490
    assert rates[middle] == pytest.approx(FINAL_SHARE + (1 - FINAL_SHARE) * 0.5)
    assert rates[-1] == pytest.approx(FINAL_SHARE)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[19:]))


@given(st.integers(1, 500), st.data())
def test_a_shortened_plan_walks_the_same_curve_faster(planned: int, data: st.DataObject) -> None:
    """No jump where the plan was shortened, and the floor at its new end."""
    at = data.draw(st.integers(0, planned - 1))
    steps = data.draw(st.integers(at + 1, planned))

    def rate(step: float, shortened: tuple[int, int] | None) -> float:
        return learning_rate(step, peak=1.0, planned=planned, shortened=shortened)

    assert rate(at, (at, steps)) == rate(at, None)
    after = at + (planned - at) / (steps - at)
    assert rate(at + 1, (at, steps)) == pytest.approx(rate(after, None))
    end = rate(steps, (at, steps))
    assert end == pytest.approx(rate(planned, None))


def test_a_plan_of_one_step_has_a_rate() -> None:
    """The smallest plan trains at a positive, finite rate."""
    assert 0 < learning_rate(0, peak=0.5, planned=1, shortened=None) <= 0.5


def test_adamw_equals_torchs_reference() -> None:
    """Ten updates equal torch's unfused AdamW with decay on the matrix alone."""
    torch.manual_seed(0)
    ours, reference = nn.Linear(5, 3), nn.Linear(5, 3)
    reference.load_state_dict(ours.state_dict())
    optimiser = Optimiser(ours, weight_decay=0.1, clip_norm=0.5)
    groups = [
        {"params": [reference.weight], "weight_decay": 0.1},
        {"params": [reference.bias], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), foreach=False, fused=False)
    for step in range(10):
        inputs = torch.randn(7, 5)
        ours(inputs).square().sum().backward()
        reference(inputs).square().sum().backward()
        norm = optimiser.clip()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norm == pytest.approx(float(expected)), step
        optimiser.step(0.01)
        adam.step()
        adam.zero_grad()

    torch.testing.assert_close(ours.weight, reference.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.bias, reference.bias, rtol=1e-5, atol=1e-7)


def test_the_output_layer_learns_as_from_larger_inputs() -> None:
    """It moves as AdamW moves a quarter of its weights that reads inputs four times as large."""
    torch.manual_seed(0)
    ours = nn.ModuleDict({"output": nn.Linear(5, 3, bias=False)})
    weight = ours["output"].weight
    quarter = nn.Parameter(weight.detach() / OUTPUT_GAIN)
    gains = {"output.weight": OUTPUT_GAIN}
    optimiser = Optimiser(ours, weight_decay=0.1, clip_norm=1e6, gains=gains)
    adam = torch.optim.AdamW([quarter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(10):
        inputs = torch.randn(7, 5)
        ours["output"](inputs).square().sum().backward()
        nn.functional.linear(inputs * OUTPUT_GAIN, quarter).square().sum().backward()
        optimiser.step(0.01)
        adam.step()
        adam.zero_grad()

    torch.testing.assert_close(weight, quarter * OUTPUT_GAIN, rtol=1e-4, atol=1e-6)


def test_a_restored_optimiser_goes_on_bit_for_bit() -> None:
    """Five updates, saved, restored into a new optimiser, and five more equal ten in one go."""
    torch.manual_seed(0)
    inputs = torch.randn(10, 7, 5)

    def run(network: nn.Module, optimiser: Optimiser, steps: range) -> None:
        for step in steps:
            network(inputs[step]).square().sum().backward()
            optimiser.clip()
            optimiser.step(0.01)

    whole = nn.Linear(5, 3)
    start = {name: part.clone() for name, part in whole.state_dict().items()}
    run(whole, Optimiser(whole, weight_decay=0.1, clip_norm=1.0), range(10))
    half = nn.Linear(5, 3)
    half.load_state_dict(start)
    first = Optimiser(half, weight_decay=0.1, clip_norm=1.0)
    run(half, first, range(5))
    saved = {name: part.clone() for name, part in first.state()}
    rest = nn.Linear(5, 3)
    rest.load_state_dict(half.state_dict())
    second = Optimiser(rest, weight_decay=0.1, clip_norm=1.0)
    second.load(saved, step=5)
    run(rest, second, range(5, 10))

    assert torch.equal(whole.weight, rest.weight)
    assert torch.equal(whole.bias, rest.bias)


def test_the_average_is_the_exponential_mean_of_the_weights() -> None:
    """It follows its definition, with a horizon that grows at first."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 1.0)
    average = Average(network, planned=1000)
    expected = 1.0
    for step in range(200):
        nn.init.constant_(network.weight, math.sin(step))
        average.update(step)
        decay = min(1 - 1 / 30, (1 + step) / (10 + step))
        expected += (1 - decay) * (math.sin(step) - expected)

    assert float(average.weights["weight"]) == pytest.approx(expected, abs=1e-5)
