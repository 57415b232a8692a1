"""How much memory a model takes: an estimate from its shape, before and after it is loaded.

A model is held as float32 arrays, from which further engines can be opened, and once more in each
open engine, where the runtime keeps two copies of the graph's constants: the one it was given, and
one laid out for its products. To these come what a step of all rows needs beside the weights, and
the states that are kept of prompts, which count in full although they come little by little.

Bytes that a process had more (private and dirty, what its allocator had free given back) with a
model open and 64 rows written, without states kept, against this estimate, in millions:

    network, arithmetic              measured   estimated
    2 x 512 LSTM, 100 tokens, int8         31          33
    2 x 512 LSTM, 100 tokens, float32      45          52
    2 x 1024 LSTM, 100 tokens, int8        97         101
    2 x 1024 GRU, 100 tokens, float32     127         132
    2 x 512 LSTM, 5,000 tokens, int8      135         145
    2 x 512 LSTM, 20,000 tokens, int8     170         167
"""

from collections.abc import Iterable

from charloom.architecture import Architecture
from charloom.decoding.decoder import Kernel
from charloom.decoding.graph import TABLE_LIMIT

FLOAT = 4
"""Bytes of a float32."""

COPIES = 2
"""Of an engine's constants."""

ROW_VECTORS = 8
"""About how many vectors as wide as vocabulary, gates and state together a row needs in a step."""

OVERHEAD = 3 << 20
"""Bytes of tokenizer, runtime session and the like."""


def estimate(
    architecture: Architecture, kernels: Iterable[Kernel], *, rows: int, cache: int
) -> int:
    """Bytes of a model whose engines of these kernels are open, each with so many rows."""
    weights = architecture.parameters * FLOAT
    engines = sum(_engine(architecture, kernel, rows) for kernel in kernels)
    return weights + engines + cache + OVERHEAD


def _engine(architecture: Architecture, kernel: Kernel, rows: int) -> int:
    """Bytes of one engine."""
    gates = architecture.gates * architecture.hidden
    state = architecture.layers * architecture.state_parts * architecture.hidden
    numbers, table = architecture.parameters, architecture.vocabulary * gates
    if table <= TABLE_LIMIT:  # it stands for the embedding and what the first layer makes of it
        numbers -= gates * architecture.embedding
        numbers -= 0 if architecture.tied else architecture.vocabulary * architecture.embedding
    else:
        table = 0
    size = FLOAT if kernel == "float32" else 1
    constants = numbers * size + table * FLOAT
    vectors = rows * (architecture.vocabulary + gates + state) * ROW_VECTORS
    return COPIES * constants + vectors * FLOAT
