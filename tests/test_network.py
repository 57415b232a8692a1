"""The network: its parameters are a weights file, its forward pass is the NumPy cell's."""

from typing import Any

import numpy as np
import pytest
import torch

from charloom.architecture import Architecture, Cell
from charloom.cell import Network as CellNetwork
from training.network import OUTPUT_GAIN, Masks, Network

CPU = torch.device("cpu")


def shape(cell: Cell = "lstm", **changes: Any) -> Architecture:
    fields = {"cell": cell, "vocabulary": 11, "embedding": 6, "hidden": 8, "layers": 3} | changes
    return Architecture(**fields)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_is_a_weights_file(cell: Cell, tied: bool) -> None:
    """Names, shapes and order of the parameters are those the architecture gives."""
    architecture = shape(cell, tied=tied, embedding=8)

    state = Network(architecture, seed=1).state_dict()

    assert {name: tuple(part.shape) for name, part in state.items()} == architecture.tensor_shapes()
    assert sum(part.numel() for part in state.values()) == architecture.parameters


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"residual": True}, {"tied": True, "embedding": 8}, {"layers": 1}, {"embedding": 40}],
)
def test_the_forward_pass_is_the_numpy_cell(cell: Cell, changes: dict[str, Any]) -> None:
    """Logits of 200 steps in three lanes agree with the gate-by-gate definition to 1e-5."""
    architecture = shape(cell, **changes)
    network = Network(architecture, seed=5)
    tokens = np.random.default_rng(0).integers(0, 11, size=(200, 3))
    tensors = {name: part.detach().numpy() for name, part in network.state_dict().items()}
    oracle = CellNetwork.from_tensors(architecture, tensors)

    with torch.inference_mode():
        logits, _ = network(torch.from_numpy(tokens), network.initial_state(3))

    state = oracle.initial_state(3)
    for step, row in enumerate(tokens):
        expected, state = oracle.step(row.astype(np.int32), state)
        np.testing.assert_allclose(logits[step].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_carrying_the_state_equals_reading_in_one_go(cell: Cell) -> None:
    """Two halves with the state handed on give the logits of the whole."""
    network = Network(shape(cell), seed=5)
    tokens = torch.randint(0, 11, (40, 2), generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        whole, _ = network(tokens, network.initial_state(2))
        first, state = network(tokens[:13], network.initial_state(2))
        second, _ = network(tokens[13:], state)

    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-6)


def test_a_new_lstm_remembers() -> None:
    """The forget gate's biases sum to one in a new network; other biases are small."""
    network = Network(shape(), seed=1)
    state = network.state_dict()

    for layer in range(3):
        bias = state[f"layers.{layer}.bias_ih"] + state[f"layers.{layer}.bias_hh"]
        assert (bias[8:16] == 1.0).all()
        assert (bias[:8].abs() < 1.0).all()


def test_a_new_output_layer_is_wide() -> None:
    """Its weights lie evenly within four times what the hidden size gives."""
    weight = Network(shape(vocabulary=500), seed=1).state_dict()["output.weight"]

    bound = OUTPUT_GAIN / 8**0.5
    assert 0.99 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_loaded_weights_are_never_initialised_over() -> None:
    """A forget-gate bias that was trained to something else stays what it is."""
    trained = Network(shape(), seed=1).state_dict()
    trained["layers.0.bias_ih"] = torch.full((32,), -3.0)
    network = Network(shape())

    network.load_state_dict(trained)

    assert (network.state_dict()["layers.0.bias_ih"] == -3.0).all()


def test_the_seed_decides_the_weights() -> None:
    """Equal seeds draw equal weights, and different ones different weights."""
    one, same, other = (Network(shape(), seed=seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.weight_hh"], other["layers.0.weight_hh"])


def draw(architecture: Architecture, *, dropout: float, weight_drop: float, step: int) -> Masks:
    return Masks.draw(
        architecture,
        lanes=2,
        dropout=dropout,
        weight_drop=weight_drop,
        seed=1,
        step=step,
        device=CPU,
    )


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weight_drop_acts_in_every_step(cell: Cell, precision: Any) -> None:
    """A mask of recurrent weights changes the output, and equals masking the weights themselves."""
    architecture = shape(cell)
    network = Network(architecture, seed=1)
    tokens = torch.randint(0, 11, (20, 2), generator=torch.Generator().manual_seed(0))
    state = network.initial_state(2)

    with torch.no_grad():
        plain, _ = network(tokens, state, precision=precision)
        for step in range(2):
            masks = draw(architecture, dropout=0.0, weight_drop=0.5, step=step)
            dropped, _ = network(tokens, state, masks=masks, precision=precision)
            masked = Network(architecture, seed=1)
            for layer in range(3):
                masked.get_parameter(f"layers.{layer}.weight_hh").mul_(masks.recurrent[layer])
            expected, _ = masked(tokens, state, precision=precision)
            assert not torch.allclose(dropped, plain)
            assert torch.equal(dropped, expected)


def test_weight_drop_lets_no_gradient_to_dropped_weights() -> None:
    """The gradient of a dropped weight is zero, and that of a kept one is not."""
    architecture = shape()
    network = Network(architecture, seed=1)
    tokens = torch.randint(0, 11, (20, 2), generator=torch.Generator().manual_seed(0))
    masks = draw(architecture, dropout=0.0, weight_drop=0.5, step=0)

    logits, _ = network(tokens, network.initial_state(2), masks=masks)
    logits.square().sum().backward()

    gradient = network.get_parameter("layers.1.weight_hh").grad
    assert gradient is not None
    assert (gradient[masks.recurrent[1] == 0] == 0).all()
    assert (gradient[masks.recurrent[1] != 0] != 0).float().mean() > 0.99


def test_dropout_is_locked_in_time_and_free_between_lanes() -> None:
    """One mask serves all steps of a sequence, another lane has another one."""
    masks = draw(shape(), dropout=0.5, weight_drop=0.0, step=0)

    first, second, _ = masks.outputs
    assert first is not None
    assert first.shape == (1, 2, 8)
    assert second is not None
    assert not torch.equal(first, second)
    lanes = draw(shape(hidden=200), dropout=0.5, weight_drop=0.0, step=0).outputs[0]
    assert lanes is not None
    assert not torch.equal(lanes[0, 0], lanes[0, 1])


def test_rates_of_zero_draw_no_masks() -> None:
    """Without dropout and weight drop there is nothing to multiply."""
    masks = draw(shape(), dropout=0.0, weight_drop=0.0, step=0)

    assert list(masks.outputs) == list(masks.recurrent) == [None, None, None]
