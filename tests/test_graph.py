"""The step graph: float32 is the cell, int8 is arithmetic in whole numbers, the fold is fixed."""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from charloom.architecture import CELLS, Architecture, Cell
from charloom.cell import Floats, gru, lstm, rnn
from charloom.cell import Network as CellNetwork
from charloom.decoding.graph import build, fold, state_names

STEPS = 500


def shape(cell: Cell, **changes: Any) -> Architecture:
    fields = {"cell": cell, "vocabulary": 23, "embedding": 12, "hidden": 24, "layers": 2} | changes
    if fields.get("tied"):
        fields["embedding"] = fields["hidden"]
    return Architecture(**fields)


def random_tensors(architecture: Architecture, seed: int = 0) -> dict[str, Floats]:
    """Weights as wide as PyTorch draws them, so that 500 steps neither die nor explode."""
    rng = np.random.default_rng(seed)
    bound = architecture.hidden**-0.5
    return {
        name: rng.uniform(-bound, bound, lengths).astype(np.float32)
        for name, lengths in architecture.tensor_shapes().items()
    }


def random_tokens(architecture: Architecture, *lengths: int) -> NDArray[np.int32]:
    return np.random.default_rng(1).integers(0, architecture.vocabulary, lengths, np.int32)


class Graph:
    """A step graph in the runtime, nothing around it."""

    def __init__(self, architecture: Architecture, graph: bytes) -> None:
        self.architecture = architecture
        self.states = state_names(architecture, "state")
        self.outputs = ["logits", *state_names(architecture, "next")]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )

    def step(self, tokens_B: NDArray[np.int32], state_LPBH: Floats) -> tuple[Floats, Floats]:
        """Logits (B, V) and the new state."""
        feed = {"tokens": tokens_B}
        feed |= zip(self.states, state_LPBH.reshape(-1, *state_LPBH.shape[2:]), strict=True)
        logits_BV, *states = self.session.run(self.outputs, feed)
        return logits_BV, np.stack(states).reshape(state_LPBH.shape)

    def logits(self, tokens_TB: NDArray[np.int32]) -> Floats:
        """Logits of whole texts, (T, B, V)."""
        state = initial_state(self.architecture, tokens_TB.shape[1])
        steps = []
        for tokens_B in tokens_TB:
            logits, state = self.step(tokens_B, state)
            steps.append(logits)
        return np.stack(steps)


def initial_state(architecture: Architecture, rows: int) -> Floats:
    return np.zeros(
        (architecture.layers, architecture.state_parts, rows, architecture.hidden), np.float32
    )


def cell_logits(
    architecture: Architecture, tensors: Mapping[str, Floats], tokens_TB: NDArray[np.int32]
) -> Floats:
    """The gate-by-gate definition, (T, B, V)."""
    network = CellNetwork.from_tensors(architecture, tensors)
    state = network.initial_state(tokens_TB.shape[1])
    steps = []
    for tokens_B in tokens_TB:
        logits, state = network.step(tokens_B, state)
        steps.append(logits)
    return np.stack(steps)


def torch_logits(
    architecture: Architecture, tensors: Mapping[str, Floats], tokens_TB: NDArray[np.int32]
) -> Floats:
    """PyTorch's own modules over whole sequences, (T, B, V)."""
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
    weights = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    with torch.no_grad():
        x = weights["embedding.weight"][torch.from_numpy(tokens_TB)]
        for layer in range(architecture.layers):
            module = kinds[architecture.cell](x.shape[-1], architecture.hidden)
            module.load_state_dict(
                {
                    f"{name}_l0": weights[f"layers.{layer}.{name}"]
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
            )
            y, _ = module(x)
            x = x + y if architecture.residual and layer > 0 else y
        output = weights["embedding.weight" if architecture.tied else "output.weight"]
        logits: Floats = torch.nn.functional.linear(x, output, weights["output.bias"]).numpy()
    return logits


# float32


@pytest.mark.parametrize(
    ("cell", "layers", "variant"),
    list(itertools.product(CELLS, (1, 2, 3, 4), ("plain", "residual and tied"))),
)
def test_float32_is_the_cell_and_torch(cell: Cell, layers: int, variant: str) -> None:
    """500 steps give the cell's and PyTorch's logits within 1e-4, folded and not."""
    is_rich = variant != "plain"
    architecture = shape(cell, layers=layers, residual=is_rich, tied=is_rich)
    tensors = random_tensors(architecture)
    tokens_TB = random_tokens(architecture, STEPS, 2)
    oracles = [oracle(architecture, tensors, tokens_TB) for oracle in (cell_logits, torch_logits)]
    for limit in (0, 10**6):
        graph = build(architecture, tensors, "float32", table_limit=limit)
        logits = Graph(architecture, graph).logits(tokens_TB)
        for expected in oracles:
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("residual", "tied"), [(True, False), (False, True)])
def test_float32_takes_each_variant_by_itself(residual: bool, tied: bool) -> None:
    """Residual links without tying and tying without residual links are the cell's too."""
    architecture = shape("lstm", layers=3, residual=residual, tied=tied)
    tensors = random_tensors(architecture)
    tokens_TB = random_tokens(architecture, 50, 2)
    logits = Graph(architecture, build(architecture, tensors, "float32")).logits(tokens_TB)
    expected = cell_logits(architecture, tensors, tokens_TB)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_limit_decides_between_table_and_embedding() -> None:
    """A table of exactly the limit is made, one value more is not."""
    architecture = shape("lstm", vocabulary=1000, embedding=2, hidden=3)
    tensors = random_tensors(architecture)
    size = 1000 * 4 * 3
    sizes = []
    for limit in (size, size - 1):
        graph = onnx.load_from_string(build(architecture, tensors, "float32", table_limit=limit))
        sizes.append(max(np.prod(constant.dims) for constant in graph.graph.initializer))
    assert sizes == [size, 1000 * 3]


# int8


class WholeNumbers:
    """The quantised step in NumPy, every sum in 64-bit integers.

    Each layer is given what the graph made of the layer before, so that a last bit of a sigmoid,
    in which libraries differ, cannot push a value over to the next whole number.
    """

    def __init__(self, architecture: Architecture, tensors: Mapping[str, Floats], *, folded: bool):
        self.architecture, self.tensors, self.folded = architecture, tensors, folded

    def quantise(self, x_BI: Floats, bound: float) -> NDArray[np.int64]:
        """Whole numbers from -128 to 127, where `bound` is 127."""
        whole = np.rint(x_BI / np.float32(bound / 127)).astype(np.int64)
        return np.clip(whole, -128, 127)

    def product(self, inputs: list[tuple[Floats, float, Floats]], bias: Floats | None) -> Floats:
        """Sum of products, given each input, its bound and its weights."""
        x = np.concatenate([self.quantise(x, bound) for x, bound, _ in inputs], axis=1)
        weight = np.concatenate([w.astype(np.float64) * bound for _, bound, w in inputs], axis=1)
        scale = np.abs(weight).max(axis=1) / 127
        sums = x @ np.rint(weight / scale[:, None]).astype(np.int64).T
        result = sums.astype(np.float32) * (scale / 127).astype(np.float32)
        return result if bias is None else result + bias

    def gates(
        self, layer: int, tokens_B: NDArray[np.int32], x_BI: Floats, bound: float, h_BH: Floats
    ) -> tuple[Floats, Floats]:
        """What comes from input and state; together in the first where their sum is one product."""
        w_ih, w_hh, b_ih, b_hh = (
            self.tensors[f"layers.{layer}.{name}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        if layer == 0 and self.folded:
            from_input = fold(self.tensors)[tokens_B]
        elif self.architecture.cell == "gru":
            from_input = self.product([(x_BI, bound, w_ih)], b_ih)
        else:
            both = self.product([(x_BI, bound, w_ih), (h_BH, 1.0, w_hh)], b_ih + b_hh)
            return both, np.zeros_like(both)
        return from_input, self.product([(h_BH, 1.0, w_hh)], b_hh)

    def step(
        self, tokens_B: NDArray[np.int32], old_LPBH: Floats, made_LPBH: Floats
    ) -> tuple[Floats, Floats]:
        """Logits and new state, given the new state that the graph made."""
        embedding = self.tensors["embedding.weight"]
        x, bound = embedding[tokens_B], float(np.abs(embedding).max())
        new = np.empty_like(old_LPBH)
        for layer in range(self.architecture.layers):
            old = old_LPBH[layer]
            gates = self.gates(layer, tokens_B, x, bound, old[0])
            if self.architecture.cell == "lstm":
                new[layer] = lstm(*gates, old[1])
            elif self.architecture.cell == "gru":
                new[layer] = gru(*gates, old[0])
            else:
                new[layer] = rnn(*gates)
            y = made_LPBH[layer, 0]
            is_added = self.architecture.residual and layer > 0
            x, bound = (x + y, bound + 1.0) if is_added else (y, 1.0)
        output = "embedding.weight" if self.architecture.tied else "output.weight"
        return self.product([(x, bound, self.tensors[output])], self.tensors["output.bias"]), new


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("variant", ["plain", "residual and tied"])
@pytest.mark.parametrize("cell", CELLS)
def test_int8_is_arithmetic_in_whole_numbers(
    cell: Cell, variant: str, folded: bool, signed: bool
) -> None:
    """Logits are those of whole-number sums bit for bit, states within 1e-6, step by step."""
    is_rich = variant != "plain"
    architecture = shape(cell, hidden=33, layers=3, residual=is_rich, tied=is_rich)
    tensors = random_tensors(architecture)
    graph = Graph(
        architecture,
        build(
            architecture,
            tensors,
            "int8",
            signed_weights=signed,
            table_limit=10**6 if folded else 0,
        ),
    )
    oracle = WholeNumbers(architecture, tensors, folded=folded)
    state = initial_state(architecture, 5)
    for tokens_B in random_tokens(architecture, 20, 5):
        logits, new = graph.step(tokens_B, state)
        expected, expected_state = oracle.step(tokens_B, state, new)
        assert logits.tobytes() == expected.tobytes()
        np.testing.assert_allclose(new, expected_state, rtol=0, atol=1e-6)
        state = new


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_int8_stays_near_float32(cell: Cell, residual: bool) -> None:
    """Over 200 steps int8 logits stray from float32 by less than 5 % of their spread."""
    architecture = shape(cell, hidden=64, layers=3, residual=residual)
    tensors = random_tensors(architecture)
    tokens_TB = random_tokens(architecture, 200, 2)
    exact, rounded = (
        Graph(architecture, build(architecture, tensors, arithmetic)).logits(tokens_TB)
        for arithmetic in ("float32", "int8")
    )
    assert np.abs(exact - rounded).mean() < 0.05 * exact.std()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e15])
@pytest.mark.parametrize("limit", [0, 10**6])
def test_int8_takes_weights_of_any_size(size: float, limit: int) -> None:
    """Weights that are zero, denormal or huge make no scale of zero or infinity."""
    architecture = shape("lstm")
    tensors = {
        name: (np.sign(tensor) * size).astype(np.float32)
        for name, tensor in random_tensors(architecture).items()
    }
    graph = Graph(architecture, build(architecture, tensors, "int8", table_limit=limit))
    logits = graph.logits(random_tokens(architecture, 5, 2))
    assert np.isfinite(logits).all()


# The fold

FOLD_GOLDEN = "d58d780993a0c77822fc3283bbd9aef535f57bcc807cedaafe878a8652aabc6c"


def test_the_fold_has_its_golden_bits() -> None:
    """For fixed weights whose sums no processor rounds, the table is the one committed here."""
    architecture = shape("gru", vocabulary=7, embedding=10, hidden=5)
    tensors = {
        name: ((np.arange(np.prod(lengths)) * 37 % 101 - 50) / 64)
        .astype(np.float32)
        .reshape(lengths)
        for name, lengths in architecture.tensor_shapes().items()
    }
    table_VG = fold(tensors)
    assert table_VG.shape == (7, 15)
    assert table_VG.dtype == np.float32
    assert hashlib.sha256(table_VG.tobytes()).hexdigest() == FOLD_GOLDEN


def test_a_row_of_the_fold_depends_on_its_token_alone() -> None:
    """The table of some tokens has the bits these have in the table of all."""
    architecture = shape("lstm", vocabulary=300, embedding=77, hidden=50)
    tensors = random_tensors(architecture)
    table_VG = fold(tensors)
    for tokens in (slice(0, 1), slice(3, 40), slice(299, 300)):
        part = tensors | {"embedding.weight": tensors["embedding.weight"][tokens]}
        assert fold(part).tobytes() == table_VG[tokens].tobytes()


def test_the_fold_takes_weights_in_any_memory_order() -> None:
    """Weights that lie column by column give the same bits."""
    architecture = shape("lstm", embedding=77)
    tensors = random_tensors(architecture)
    turned = {name: np.asfortranarray(tensor) for name, tensor in tensors.items()}
    assert fold(turned).tobytes() == fold(tensors).tobytes()


THREADS_PROBE = """
import hashlib
import numpy as np
from charloom.architecture import Architecture
from charloom.decoding.graph import build
architecture = Architecture(cell="lstm", vocabulary=300, embedding=256, hidden=256, layers=2)
rng = np.random.default_rng(0)
tensors = {
    name: rng.random(shape, np.float32) - np.float32(0.5)
    for name, shape in architecture.tensor_shapes().items()
}
for arithmetic in ("float32", "int8"):
    print(hashlib.sha256(build(architecture, tensors, arithmetic)).hexdigest())
"""


def test_a_graph_has_the_same_bytes_whatever_the_threads(
    printed_with_threads: Callable[[str], set[str]],
) -> None:
    """One and several BLAS threads fold and quantise to the same graph, byte for byte."""
    assert len(printed_with_threads(THREADS_PROBE)) == 1
