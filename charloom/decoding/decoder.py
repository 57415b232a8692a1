"""Rows of hidden state and the step that moves them on: tokens in, logits out.

`Decoder` is all that the engine knows of a network, so that tests can put a script or the readable
NumPy cell in its place. The rows in use are always the first ones: each step feeds one token to
each of them and moves their states on. A row can be read, written, cleared and moved, and that is
all it takes to let texts join, leave, branch and go on from a state that was kept.

`GraphDecoder` runs the step graph of `charloom.decoding.graph` in ONNX Runtime. States lie in two
arrays that take turns as input and output, bound once for each number of rows, so that a step
allocates nothing and copies no state. One array for both would do if the runtime ran the graph as
written, but it may not: it fuses product and tanh of an RNN, which then writes over what its second
thread still reads.

**Same bits.** A row has the same bits alone and among others, whatever the number of threads,
because no sum runs across rows, int8 sums are exact, and the runtime packs the constant weights of
a float32 product when it loads them, which fixes the order of its sums (without packing, rows of
float32 models differed between alone and among others). Denormal numbers count on every thread: the
runtime's option to flush them reaches its own threads and whichever thread opened the process's
first session, but no other that calls a step.

    B rows   V vocabulary   L layers   P state parts   H hidden size
"""

from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from typing import Literal, NamedTuple, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from charloom.cell import State
from charloom.checkpoint import Checkpoint
from charloom.decoding.graph import Arithmetic, build, serialise, state_names
from charloom.params import Precision

Kernel = Literal["float32", "int8", "int8-unsigned"]
"""How a step multiplies: in float32, or in exact 8-bit products with signed or unsigned weights."""

Multiply = Callable[[NDArray[np.uint8], NDArray[np.int8] | NDArray[np.uint8]], NDArray[np.int32]]
"""A product of 8-bit integers, (B, I) by (I, G)."""

PROBE_STEPS = 16


class Decoder(Protocol):
    """Some network with the states of up to `capacity` texts.

    Two decoders of the same `fingerprint` give the same bits.
    """

    vocabulary_size: int
    capacity: int
    fingerprint: str

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first B rows: logits of the token after it, (B, V).

        The array belongs to the decoder and holds until the next step. Rows from B on are out of
        use: what they held is lost.
        """

    def read(self, row: int) -> State:
        """A copy of a row's state, (L, P, H)."""

    def write(self, row: int, state_LPH: State) -> None:
        """Put a state into a row."""

    def clear(self, row: int) -> None:
        """Put a row at the start of a text: zeros."""

    def move(self, source: int, target: int) -> None:
        """Put a copy of the source row's state into the target row."""


class _Bound(NamedTuple):
    """What a step of the first rows reads and writes: cutting it out anew would cost each step."""

    tokens_B: NDArray[np.int32]
    logits_BV: NDArray[np.float32]
    turns: Sequence[onnxruntime.IOBinding]
    """One for either of the arrays that the states are read from."""


class GraphDecoder:
    """The step graph of a checkpoint in ONNX Runtime."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernel: Kernel,
        *,
        capacity: int,
        threads: int,
        spinning: bool = True,
    ) -> None:
        architecture = checkpoint.architecture
        arithmetic = arithmetic_of(kernel)
        self.vocabulary_size = architecture.vocabulary
        self.capacity = capacity
        self.kernel = kernel
        self.arithmetic = arithmetic
        graph = build(
            architecture,
            checkpoint.tensors,
            arithmetic,
            signed_weights=kernel != "int8-unsigned",
        )
        self._session = open_session(graph, threads=threads, spinning=spinning)
        self._inputs = state_names(architecture, "state")
        self._outputs = state_names(architecture, "next")
        shape = (2, architecture.layers, architecture.state_parts, capacity, architecture.hidden)
        self._states = np.zeros(shape, np.float32)
        self._current = 0
        self._tokens = np.zeros(capacity, np.int32)
        self._logits = np.zeros((capacity, architecture.vocabulary), np.float32)
        self._bound: dict[int, _Bound] = {}
        self.fingerprint = self._probe(checkpoint.fingerprint)

    def step(self, tokens_B: NDArray[np.int32]) -> NDArray[np.float32]:
        """Feed a token to each of the first B rows: logits of the token after it, (B, V)."""
        rows = len(tokens_B)
        bound = self._bound.get(rows)
        if bound is None:
            bound = self._bound[rows] = self._bind(rows)
        bound.tokens_B[:] = tokens_B
        self._session.run_with_iobinding(bound.turns[self._current])
        self._current = 1 - self._current
        return bound.logits_BV

    def read(self, row: int) -> State:
        """A copy of a row's state, (L, P, H)."""
        state: State = self._states[self._current, :, :, row].copy()
        return state

    def write(self, row: int, state_LPH: State) -> None:
        """Put a state into a row."""
        self._states[self._current, :, :, row] = state_LPH

    def clear(self, row: int) -> None:
        """Put a row at the start of a text: zeros."""
        self._states[self._current, :, :, row] = 0.0

    def move(self, source: int, target: int) -> None:
        """Put a copy of the source row's state into the target row."""
        states = self._states[self._current]
        states[:, :, target] = states[:, :, source]

    def _bind(self, rows: int) -> _Bound:
        """Cut the first rows out of every array, and tell the runtime where they lie."""
        tokens_B, logits_BV = self._tokens[:rows], self._logits[:rows]
        parts = self._states.shape[2]
        turns = []
        for current in range(2):
            binding = self._session.io_binding()
            binding.bind_input("tokens", *_place(tokens_B))
            binding.bind_output("logits", *_place(logits_BV))
            for index, (old, new) in enumerate(zip(self._inputs, self._outputs, strict=True)):
                layer, part = divmod(index, parts)
                states_SB = self._states[:, layer, part, :rows]
                binding.bind_input(old, *_place(states_SB[current]))
                binding.bind_output(new, *_place(states_SB[1 - current]))
            turns.append(binding)
        return _Bound(tokens_B, logits_BV, turns)

    def _probe(self, model: str) -> str:
        """Identify everything that the bits of a step depend on, by the bits of a few steps.

        Model, precision, instruction set and runtime version all show in them, so two machines that
        agree here write the same texts. The two int8 kernels agree, since both are exact.
        """
        digest = sha256(model.encode())
        for token in range(PROBE_STEPS):
            digest.update(self.step(np.array([token % self.vocabulary_size], np.int32)).tobytes())
        self.clear(0)
        return digest.hexdigest()


def _place(array: NDArray[np.generic]) -> tuple[str, int, object, tuple[int, ...], int]:
    """Where an array lies, as the runtime is told."""
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def arithmetic_of(kernel: Kernel) -> Arithmetic:
    """What a kernel computes with."""
    return "float32" if kernel == "float32" else "int8"


def _multiply(
    activations_BI: NDArray[np.uint8], weight_IG: NDArray[np.int8] | NDArray[np.uint8]
) -> NDArray[np.int32]:
    """The 8-bit product as a step makes it, on this processor."""
    weight = numpy_helper.from_array(weight_IG, "weight")
    rows, columns = ["rows", weight_IG.shape[0]], ["rows", weight_IG.shape[1]]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["activations", "weight"], ["sums"])],
        "product",
        [helper.make_tensor_value_info("activations", TensorProto.UINT8, rows)],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, columns)],
        [weight],
    )
    session = open_session(serialise(graph), threads=1, spinning=False)
    sums_BG: NDArray[np.int32] = session.run(None, {"activations": activations_BI})[0]
    return sums_BG


@cache
def is_exact(signed_weights: bool, multiply: Multiply = _multiply) -> bool:
    """Whether this processor's 8-bit product gives the sums of the largest products there are.

    x86 processors without VNNI add pairs of products in 16 bits, which the largest ones overflow.
    """
    length, columns = 64, 32
    weight_IG: NDArray[np.int8] | NDArray[np.uint8]
    if signed_weights:
        weight_IG = np.full((length, columns), 127, np.int8)
        weight_IG[:, 1::2] = -127
    else:
        weight_IG = np.full((length, columns), 255, np.uint8)
        weight_IG[:, 1::2] = 1
    for rows in (1, 64):  # kernels may differ
        activations_BI = np.full((rows, length), 255, np.uint8)
        sums_BG = activations_BI.astype(np.int64) @ weight_IG.astype(np.int64)
        if not np.array_equal(multiply(activations_BI, weight_IG), sums_BG):
            return False
    return True


def choose_kernel(asked: Precision, exact: Callable[[bool], bool] = is_exact) -> Kernel:
    """The arithmetic a request gets: the one place that decides, for every way to ask.

    "auto" is int8 where this processor multiplies signed weights exactly, else float32. "int8"
    takes unsigned weights there, slower with many rows, and float32 where not even they are exact.
    `exact` answers for the processor, given whether the weights are signed.
    """
    if asked == "float32":
        return "float32"
    if exact(True):
        return "int8"
    if asked == "int8" and exact(False):
        return "int8-unsigned"
    return "float32"


def open_session(graph: bytes, *, threads: int, spinning: bool) -> onnxruntime.InferenceSession:
    """A graph, ready to run; threads that spin wait busily for the next step."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
