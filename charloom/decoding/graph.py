"""A checkpoint as an ONNX graph of one step, built in memory: tokens and states in, logits out.

The graph is the network of `charloom.cell` with the arithmetic rearranged for a processor that
reads every weight once per step:

- what the first layer makes of a token (embedding, input weights, both biases) is folded into one
  row of a table, as long as the table stays below `TABLE_LIMIT`;
- each further layer is one matrix product: input and state side by side against the input weights
  and recurrent weights one above the other. A GRU has two, since its reset gate comes between them;
- an LSTM's gates are reordered to i, f, o, g, so that one sigmoid serves three of them.

**int8.** A hidden state lies in (-1, 1) by construction, so its scale is the constant 1/127 and
needs no calibration. Residual links add states, so their sums need a wider range, which is known
from the depth; the range of embeddings is read off the table. All activations of a product then
share one scale because the weights absorb the ratio. Weights have one scale per output. The sums of
a product are whole numbers and exact, so a row has the same bits whatever stands beside it; a scale
taken over the batch, as in the usual dynamic quantisation, would couple the rows.

Processors without VNNI may saturate products of unsigned activations and signed weights;
`signed_weights=False` stores the weights unsigned, which is exact everywhere and slower.

Array names end in their shape:
    V vocabulary   I input size   H hidden size   G gates x H
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from charloom.architecture import Architecture
from charloom.cell import Floats, product

Arithmetic = Literal["float32", "int8"]

TABLE_LIMIT = 2**24
"""Largest folded table in float32 values (64 MiB); it depends on the checkpoint alone."""

OPSET = 21
IR_VERSION = 10

ZERO_POINT = 128
"""What an activation of 0 becomes in unsigned 8 bits."""

LARGEST = 127
"""The largest magnitude in 8 bits, on both sides of zero."""


def state_names(architecture: Architecture, prefix: str) -> list[str]:
    """Names of the graph's state inputs ("state") or outputs ("next"), layer by layer."""
    return [
        f"{prefix}.{layer}.{part}"
        for layer in range(architecture.layers)
        for part in range(architecture.state_parts)
    ]


def fold(tensors: Mapping[str, Floats]) -> Floats:
    """What the first layer makes of each token, W_i e + b_i, (V, G), gates in PyTorch's order.

    Each number is summed by itself in one fixed order (`charloom.cell.product`), so the bits depend
    neither on threads nor on the vocabulary.
    """
    table_VG = product(
        np.ascontiguousarray(tensors["embedding.weight"]),
        np.ascontiguousarray(tensors["layers.0.weight_ih"]),
    )
    table_VG += tensors["layers.0.bias_ih"]
    return table_VG


def build(
    architecture: Architecture,
    tensors: Mapping[str, Floats],
    arithmetic: Arithmetic,
    *,
    signed_weights: bool = True,
    table_limit: int = TABLE_LIMIT,
) -> bytes:
    """The step graph of a checkpoint's tensors, serialised.

    Inputs: `tokens` (B) int32 and the states `state_names(architecture, "state")`, each (B, H)
    float32. Outputs: `logits` (B, V) float32 and the new states under the prefix "next".
    """
    writer = _Writer()
    products: _Products
    if arithmetic == "int8":
        products = _Int8(writer, signed_weights=signed_weights)
    else:
        products = _Float32(writer)
    return _Network(architecture, tensors, writer, products, table_limit).build()


def serialise(graph: onnx.GraphProto) -> bytes:
    """A graph as a file that the runtime reads."""
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets)
    serialised: bytes = model.SerializeToString()
    return serialised


@dataclass(frozen=True, slots=True)
class _Signal:
    """A tensor in the graph and the largest magnitude that its values can have."""

    name: str
    bound: float


class _Writer:
    """Collects nodes and constants; every tensor gets a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant and give its name."""
        name = f"constant.{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def ops(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs and give their names."""
        names = [f"{kind}.{len(self.nodes)}.{output}" for output in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and give its name."""
        return self.ops(kind, inputs, 1, **attributes)[0]

    def rename(self, name: str, new: str) -> None:
        """Call a node's output by the name it has outside the graph; an Identity would copy it."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if old == name else old for old in names]


class _Float32:
    """Matrix products in float32."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer

    def embed(self, embedding_VE: Floats, tokens: str) -> _Signal:
        """One row of the embedding per token."""
        name = self._writer.op("Gather", self._writer.constant(embedding_VE), tokens)
        return _Signal(name, bound=1.0)

    def product(
        self, signals: Sequence[_Signal], weights: Sequence[Floats], bias_G: Floats | None
    ) -> str:
        """The sum of the products of each signal (B, I) with its weights (G, I), and the bias."""
        names = [signal.name for signal in signals]
        x = names[0] if len(names) == 1 else self._writer.op("Concat", *names, axis=1)
        weight = self._writer.constant(np.concatenate(weights, axis=1).T)
        if bias_G is None:
            return self._writer.op("MatMul", x, weight)
        return self._writer.op("Gemm", x, weight, self._writer.constant(bias_G))


class _Int8:
    """Matrix products of 8-bit integers, with the scales fixed here and now."""

    def __init__(self, writer: _Writer, *, signed_weights: bool) -> None:
        self._writer = writer
        self._signed_weights = signed_weights
        self._zero_point = writer.constant(np.array(ZERO_POINT, np.uint8))
        self._quantised: dict[str, str] = {}

    def embed(self, embedding_VE: Floats, tokens: str) -> _Signal:
        """One row of the embedding per token, already quantised by the table's largest value."""
        bound = float(np.abs(embedding_VE).max()) or 1.0
        rows_VE = np.rint(embedding_VE / np.float32(bound) * np.float32(LARGEST)) + ZERO_POINT
        table = self._writer.constant(rows_VE.astype(np.uint8))
        name = self._writer.op("Gather", table, tokens)
        self._quantised[name] = name
        return _Signal(name, bound)

    def product(
        self, signals: Sequence[_Signal], weights: Sequence[Floats], bias_G: Floats | None
    ) -> str:
        """The sum of the products of each signal (B, I) with its weights (G, I), and the bias.

        Every signal counts in units of its own bound / 127; the weights take the bound over.
        """
        names = [self._quantise(signal) for signal in signals]
        x = names[0] if len(names) == 1 else self._writer.op("Concat", *names, axis=1)
        # In float64, where no weight that a file can hold makes a scale of zero or infinity.
        scaled_GI = np.concatenate(
            [
                weight.astype(np.float64) * signal.bound
                for weight, signal in zip(weights, signals, strict=True)
            ],
            axis=1,
        )
        largest_G = np.abs(scaled_GI).max(axis=1)
        scale_G = np.where(largest_G > 0, largest_G, 1.0) / LARGEST
        weight_IG = np.rint(scaled_GI / scale_G[:, None]).T
        inputs = [x]
        if self._signed_weights:
            inputs += [self._writer.constant(weight_IG.astype(np.int8)), self._zero_point]
        else:
            weight = self._writer.constant((weight_IG + ZERO_POINT).astype(np.uint8))
            inputs += [weight, self._zero_point, self._zero_point]
        sums = self._writer.op("MatMulInteger", *inputs)
        # One node for these, MatMulIntegerToFloat, is slower for few rows: it multiplies the scales
        # of both sides at each step.
        unit_G = self._writer.constant((scale_G / LARGEST).astype(np.float32))
        result = self._writer.op("Mul", self._writer.op("Cast", sums, to=TensorProto.FLOAT), unit_G)
        if bias_G is None:
            return result
        return self._writer.op("Add", result, self._writer.constant(bias_G))

    def _quantise(self, signal: _Signal) -> str:
        """The signal in unsigned 8 bits; made once however many products read it."""
        name = self._quantised.get(signal.name)
        if name is None:
            scale = self._writer.constant(np.array(signal.bound / LARGEST, np.float32))
            name = self._writer.op("QuantizeLinear", signal.name, scale, self._zero_point)
            self._quantised[signal.name] = name
        return name


_Products = _Float32 | _Int8


class _Network:
    """Writes the layers of one network."""

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Floats],
        writer: _Writer,
        products: _Products,
        table_limit: int,
    ) -> None:
        self._architecture = architecture
        self._tensors = tensors
        self._writer = writer
        self._products = products
        folded = architecture.vocabulary * architecture.gates * architecture.hidden
        self._is_folded = folded <= table_limit

    def build(self) -> bytes:
        """The whole graph, serialised."""
        architecture = self._architecture
        # Layer 0 hands on what it wrote; with residual links each further layer hands on what it
        # read plus what it wrote, and every hidden state lies in (-1, 1).
        x = self._layer(0, None)
        for layer in range(1, architecture.layers):
            y = self._layer(layer, x)
            if architecture.residual:
                y = _Signal(self._writer.op("Add", x.name, y.name), x.bound + y.bound)
            x = y
        output = "embedding.weight" if architecture.tied else "output.weight"
        logits = self._products.product([x], [self._tensors[output]], self._tensors["output.bias"])
        self._writer.rename(logits, "logits")
        return self._finish()

    def _layer(self, layer: int, x: _Signal | None) -> _Signal:
        """One recurrent layer; without an input it is the first, which reads tokens."""
        states = [f"state.{layer}.{part}" for part in range(self._architecture.state_parts)]
        cell = {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[self._architecture.cell]
        for part, name in enumerate(cell(layer, x, states)):
            self._writer.rename(name, f"next.{layer}.{part}")
        return _Signal(f"next.{layer}.0", 1.0)

    def _lstm(self, layer: int, x: _Signal | None, states: Sequence[str]) -> list[str]:
        hidden = self._architecture.hidden
        i, f, g, o = (slice(gate * hidden, (gate + 1) * hidden) for gate in range(4))
        gates = self._joint(layer, x, states[0], np.r_[i, f, o, g])
        ifo, g_name = self._split(gates, 3 * hidden, hidden)
        i_name, f_name, o_name = self._split(
            self._writer.op("Sigmoid", ifo), hidden, hidden, hidden
        )
        kept = self._writer.op("Mul", f_name, states[1])
        added = self._writer.op("Mul", i_name, self._writer.op("Tanh", g_name))
        c = self._writer.op("Add", kept, added)
        h = self._writer.op("Mul", o_name, self._writer.op("Tanh", c))
        return [h, c]

    def _rnn(self, layer: int, x: _Signal | None, states: Sequence[str]) -> list[str]:
        every = np.arange(self._architecture.hidden)
        return [self._writer.op("Tanh", self._joint(layer, x, states[0], every))]

    def _gru(self, layer: int, x: _Signal | None, states: Sequence[str]) -> list[str]:
        hidden = self._architecture.hidden
        rows = slice(0, 3 * hidden)
        bias_G = self._tensors[f"layers.{layer}.bias_hh"]
        from_input = self._from_input(layer, x, rows)
        from_state = self._products.product(
            [_Signal(states[0], 1.0)], [self._tensors[f"layers.{layer}.weight_hh"]], bias_G
        )
        rz_input, n_input = self._split(from_input, 2 * hidden, hidden)
        rz_state, n_state = self._split(from_state, 2 * hidden, hidden)
        rz = self._writer.op("Sigmoid", self._writer.op("Add", rz_input, rz_state))
        r, z = self._split(rz, hidden, hidden)
        candidate = self._writer.op("Add", n_input, self._writer.op("Mul", r, n_state))
        n = self._writer.op("Tanh", candidate)
        # (1 - z) n + z h, with one product less
        moved = self._writer.op("Mul", z, self._writer.op("Sub", states[0], n))
        return [self._writer.op("Add", n, moved)]

    def _from_input(self, layer: int, x: _Signal | None, rows: Any) -> str:
        """W_i x + b_i of some rows of the weights, (B, rows)."""
        if x is None and self._is_folded:
            table = self._writer.constant(fold(self._tensors)[:, rows])
            return self._writer.op("Gather", table, "tokens")
        return self._products.product(
            [self._embed() if x is None else x],
            [self._tensors[f"layers.{layer}.weight_ih"][rows]],
            self._tensors[f"layers.{layer}.bias_ih"][rows],
        )

    def _joint(self, layer: int, x: _Signal | None, state: str, rows: Any) -> str:
        """W_i x + b_i + W_h h + b_h of some rows of the weights, (B, rows)."""
        h = _Signal(state, 1.0)
        weight_hh = self._tensors[f"layers.{layer}.weight_hh"][rows]
        bias_hh = self._tensors[f"layers.{layer}.bias_hh"][rows]
        if x is None and self._is_folded:
            table = fold(self._tensors)[:, rows] + bias_hh
            from_input = self._writer.op("Gather", self._writer.constant(table), "tokens")
            return self._writer.op(
                "Add", self._products.product([h], [weight_hh], None), from_input
            )
        return self._products.product(
            [self._embed() if x is None else x, h],
            [self._tensors[f"layers.{layer}.weight_ih"][rows], weight_hh],
            self._tensors[f"layers.{layer}.bias_ih"][rows] + bias_hh,
        )

    def _embed(self) -> _Signal:
        return self._products.embed(self._tensors["embedding.weight"], "tokens")

    def _split(self, name: str, *sizes: int) -> list[str]:
        lengths = self._writer.constant(np.array(sizes, np.int64))
        return self._writer.ops("Split", [name, lengths], len(sizes), axis=1)

    def _finish(self) -> bytes:
        architecture = self._architecture
        states = state_names(architecture, "state")
        news = state_names(architecture, "next")
        row: list[str | int | None] = ["rows", architecture.hidden]
        graph = helper.make_graph(
            self._writer.nodes,
            "step",
            [
                helper.make_tensor_value_info("tokens", TensorProto.INT32, ["rows"]),
                *(helper.make_tensor_value_info(name, TensorProto.FLOAT, row) for name in states),
            ],
            [
                helper.make_tensor_value_info(
                    "logits", TensorProto.FLOAT, ["rows", architecture.vocabulary]
                ),
                *(helper.make_tensor_value_info(name, TensorProto.FLOAT, row) for name in news),
            ],
            self._writer.constants,
        )
        return serialise(graph)
