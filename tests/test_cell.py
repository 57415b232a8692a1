import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from charloom.architecture import CELLS, Architecture, Cell
from charloom.cell import Floats, Layer, Network, lstm, product, sigmoid

STEPS = 200


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, Floats]:
    """Weights as wide as PyTorch draws them, so that 200 steps neither die nor explode."""
    rng = np.random.default_rng(seed)
    bound = architecture.hidden**-0.5
    return {
        name: rng.uniform(-bound, bound, shape).astype(np.float32)
        for name, shape in architecture.tensor_shapes().items()
    }


def random_tokens(architecture: Architecture, *shape: int) -> NDArray[np.int32]:
    """Tokens, the same each time."""
    rng = np.random.default_rng(1)
    return rng.integers(0, architecture.vocabulary, shape).astype(np.int32)


def torch_layer(
    architecture: Architecture, tensors: dict[str, Floats], layer: int
) -> torch.nn.RNNBase:
    """PyTorch's module for one layer, holding the same weights."""
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
    width = architecture.embedding if layer == 0 else architecture.hidden
    module: torch.nn.RNNBase = kinds[architecture.cell](width, architecture.hidden)
    module.load_state_dict(
        {
            f"{name}_l0": torch.from_numpy(tensors[f"layers.{layer}.{name}"])
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
    )
    return module


def torch_logits(
    architecture: Architecture, tensors: dict[str, Floats], tokens_TB: NDArray[np.int32]
) -> Floats:
    """The second implementation: logits (T, B, V) of PyTorch's modules over whole sequences."""
    weights = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    with torch.no_grad():
        x = torch.nn.functional.embedding(
            torch.from_numpy(tokens_TB.astype(np.int64)), weights["embedding.weight"]
        )
        for layer in range(architecture.layers):
            y, _ = torch_layer(architecture, tensors, layer)(x)
            x = x + y if architecture.residual and layer > 0 else y
        output = weights["embedding.weight" if architecture.tied else "output.weight"]
        logits: Floats = torch.nn.functional.linear(x, output, weights["output.bias"]).numpy()
    return logits


@pytest.mark.parametrize(
    ("cell", "residual", "tied"), list(itertools.product(CELLS, (False, True), (False, True)))
)
def test_network_agrees_with_torch(cell: Cell, residual: bool, tied: bool) -> None:
    """200 steps through three layers give PyTorch's logits within 1e-5, for every architecture."""
    architecture = Architecture(
        cell=cell,
        vocabulary=23,
        embedding=48 if tied else 20,
        hidden=48,
        layers=3,
        residual=residual,
        tied=tied,
    )
    tensors = random_tensors(architecture)
    network = Network.from_tensors(architecture, tensors)
    tokens_TB = random_tokens(architecture, STEPS, 3)
    state = network.initial_state(3)
    steps = []
    for tokens_B in tokens_TB:
        logits, state = network.step(tokens_B, state)
        assert logits.dtype == state.dtype == np.float32
        steps.append(logits)
    expected = torch_logits(architecture, tensors, tokens_TB)
    np.testing.assert_allclose(np.stack(steps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_state_agrees_with_stacked_torch_module(cell: Cell) -> None:
    """PyTorch's module of four layers ends 200 steps in the same state, part by part."""
    architecture = Architecture(cell=cell, vocabulary=9, embedding=16, hidden=32, layers=4)
    tensors = random_tensors(architecture)
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
    module = kinds[cell](16, 32, num_layers=4)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    module.load_state_dict(
        {
            f"{name}_l{layer}": torch.from_numpy(tensors[f"layers.{layer}.{name}"])
            for layer in range(4)
            for name in names
        }
    )
    network = Network.from_tensors(architecture, tensors)
    tokens_TB = random_tokens(architecture, STEPS, 2)
    state = network.initial_state(2)
    for tokens_B in tokens_TB:
        _, state = network.step(tokens_B, state)
    with torch.no_grad():
        _, final = module(torch.from_numpy(tensors["embedding.weight"][tokens_TB]))
    parts = final if cell == "lstm" else (final,)
    assert state.shape == (4, len(parts), 2, 32)
    for part, expected in enumerate(parts):
        np.testing.assert_allclose(state[:, part], expected.numpy(), rtol=0, atol=1e-5)


def test_lstm_agrees_with_torch_lstm_cell() -> None:
    """200 steps of one layer give the states of `nn.LSTMCell` within 1e-5."""
    rng = np.random.default_rng(0)
    reference = torch.nn.LSTMCell(12, 40)
    layer = Layer(
        weight_ih_GI=reference.weight_ih.detach().numpy(),
        weight_hh_GH=reference.weight_hh.detach().numpy(),
        bias_ih_G=reference.bias_ih.detach().numpy(),
        bias_hh_G=reference.bias_hh.detach().numpy(),
    )
    h = c = np.zeros((5, 40), np.float32)
    states = (torch.zeros(5, 40), torch.zeros(5, 40))
    for _ in range(STEPS):
        x = rng.standard_normal((5, 12)).astype(np.float32)
        h, c = lstm(layer.from_input(x), layer.from_state(h), c)
        with torch.no_grad():
            states = reference(torch.from_numpy(x), states)
        np.testing.assert_allclose(h, states[0].numpy(), rtol=0, atol=1e-5)
        np.testing.assert_allclose(c, states[1].numpy(), rtol=0, atol=1e-5)


# The textbook exercise: rows are the input, forget, candidate and output gate, columns the inputs
# x1, x2, x3 and a constant 1. x2 writes (1), keeps (0) or clears (-1) the memory, x3 shows it.
EXERCISE_WEIGHTS = np.array(
    [[0, 100, 0, -10], [0, 100, 0, 10], [1, 0, 0, 0], [0, 0, 100, -10]], np.float32
)
EXERCISE_INPUTS = np.array(
    [
        [1, 0, 0, 1],
        [3, 1, 0, 1],
        [2, 0, 0, 1],
        [4, 1, 0, 1],
        [2, 0, 0, 1],
        [1, 0, 1, 1],
        [3, -1, 0, 1],
        [6, 1, 0, 1],
        [1, 0, 1, 1],
    ],
    np.float32,
)


def exercise_in_numpy() -> list[float]:
    """Solve the exercise by the equations."""
    h = c = np.zeros((1, 1), np.float32)
    outputs = []
    for x in EXERCISE_INPUTS[:, None]:
        h, c = lstm(product(x, EXERCISE_WEIGHTS), np.zeros((1, 4), np.float32), c)
        outputs.append(float(h[0, 0]))
    return outputs


def exercise_in_lstm_cell() -> list[float]:
    """Solve it by PyTorch's single step."""
    cell = torch.nn.LSTMCell(4, 1, bias=False)
    state = (torch.zeros(1, 1), torch.zeros(1, 1))
    outputs = []
    with torch.no_grad():
        cell.weight_ih.copy_(torch.from_numpy(EXERCISE_WEIGHTS))
        cell.weight_hh.zero_()
        for x in torch.from_numpy(EXERCISE_INPUTS):
            state = cell(x[None], state)
            outputs.append(float(state[0]))
    return outputs


def exercise_in_lstm() -> list[float]:
    """Solve it by PyTorch's whole sequence."""
    module = torch.nn.LSTM(4, 1, bias=False)
    with torch.no_grad():
        weights = dict(module.named_parameters())
        weights["weight_ih_l0"].copy_(torch.from_numpy(EXERCISE_WEIGHTS))
        weights["weight_hh_l0"].zero_()
        outputs, _ = module(torch.from_numpy(EXERCISE_INPUTS))
    return [float(output) for output in outputs]


@pytest.mark.parametrize("solve", [exercise_in_numpy, exercise_in_lstm_cell, exercise_in_lstm])
def test_textbook_exercise(solve: Callable[[], list[float]]) -> None:
    """The memory is written twice, shown, cleared, written and shown, as one works out by hand."""
    outputs = solve()
    assert np.abs(np.round(outputs, 2)).tolist() == [0, 0, 0, 0, 0, 0.96, 0, 0, 0.76]
    assert np.abs(np.round(outputs, 3)).tolist() == [0, 0, 0, 0, 0, 0.964, 0, 0, 0.762]


def test_textbook_exercise_with_gates_rounded_by_hand() -> None:
    """Gates of exactly 0 and 1 leave tanh(tanh 3 + tanh 4) and tanh(tanh 6) to be shown."""
    assert round(float(np.tanh(np.tanh(3) + np.tanh(4))), 2) == 0.96
    assert round(float(np.tanh(np.tanh(6))), 2) == 0.76


def test_sigmoid_is_stable() -> None:
    """It equals 1 / (1 + exp(-x)) within 1e-7, exactly 0 and 1 far out, and never warns."""
    x = np.linspace(-30, 30, 10_001, dtype=np.float32)
    with np.errstate(all="raise"):
        result = sigmoid(x)
        far = sigmoid(np.array([-1000, -np.inf, 1000, np.inf, 0], np.float32))
    assert result.dtype == np.float32
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(result, exact, rtol=0, atol=1e-7)
    assert far.tolist() == [0, 0, 1, 1, 0.5]


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(cell: Cell) -> None:
    """Logits and states of each of 64 rows equal those of the row stepped alone, bit for bit."""
    architecture = Architecture(cell=cell, vocabulary=67, embedding=96, hidden=96, layers=2)
    network = Network.from_tensors(architecture, random_tensors(architecture))
    tokens_TB = random_tokens(architecture, 10, 64)
    state = network.initial_state(64)
    alone = [network.initial_state(1) for _ in range(64)]
    for tokens_B in tokens_TB:
        logits, state = network.step(tokens_B, state)
        for row in range(64):
            row_logits, alone[row] = network.step(tokens_B[row : row + 1], alone[row])
            assert row_logits.tobytes() == logits[row].tobytes()
            assert alone[row].tobytes() == state[:, :, row].tobytes()


THREADS_PROBE = """
import hashlib
import numpy as np
from charloom.architecture import Architecture
from charloom.cell import Network
architecture = Architecture(cell="lstm", vocabulary=67, embedding=256, hidden=256, layers=2)
rng = np.random.default_rng(0)
tensors = {
    name: (rng.random(shape, np.float32) - 0.5) / 8
    for name, shape in architecture.tensor_shapes().items()
}
network = Network.from_tensors(architecture, tensors)
state = network.initial_state(4)
digest = hashlib.sha256()
for token in range(60):
    logits, state = network.step(np.full(4, token, np.int32), state)
    digest.update(logits.tobytes())
print(digest.hexdigest())
"""


def test_bits_do_not_depend_on_the_number_of_threads(
    printed_with_threads: Callable[[str], set[str]],
) -> None:
    """One and several BLAS threads give the same logits, bit for bit."""
    assert len(printed_with_threads(THREADS_PROBE)) == 1


def test_a_step_leaves_the_state_it_was_given_alone() -> None:
    """The state after a prompt can be continued more than once."""
    architecture = Architecture(cell="lstm", vocabulary=5, embedding=8, hidden=8, layers=2)
    network = Network.from_tensors(architecture, random_tensors(architecture))
    _, state = network.step(np.array([1], np.int32), network.initial_state(1))
    before = state.copy()
    first, _ = network.step(np.array([2], np.int32), state)
    second, _ = network.step(np.array([2], np.int32), state)
    assert state.tobytes() == before.tobytes()
    assert first.tobytes() == second.tobytes()
