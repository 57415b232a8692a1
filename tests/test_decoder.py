"""Rows of a decoder: each has its own bits, whatever steps beside it, on any number of threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from charloom.architecture import CELLS, Architecture, Cell
from charloom.cell import Floats
from charloom.checkpoint import Checkpoint
from charloom.decoding.decoder import (
    Decoder,
    GraphDecoder,
    Kernel,
    arithmetic_of,
    choose_kernel,
    is_exact,
)
from charloom.params import Precision

CAPACITY = 70
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
VOCABULARIES = {1: 2, 3: 65, 17: 300, 33: 65, 100: 300, 128: 65, 200: 5000, 512: 65}
"""A vocabulary for each hidden size: the sizes are those that vectors of 8 and 16 do not divide."""


def checkpoint(
    cell: Cell = "lstm", seed: int = 0, change: Callable[[Floats], Floats] = np.array, **sizes: Any
) -> Checkpoint:
    """A model of random weights, each passed through `change`."""
    fields = {"vocabulary": 23, "embedding": 12, "hidden": 24, "layers": 2} | sizes
    architecture = Architecture(cell=cell, **fields)
    rng = np.random.default_rng(seed)
    bound = architecture.hidden**-0.5
    return Checkpoint(
        path=Path("nowhere"),
        architecture=architecture,
        tokenizer=None,
        tensors={
            name: change(rng.uniform(-bound, bound, lengths).astype(np.float32))
            for name, lengths in architecture.tensor_shapes().items()
        },
        token_counts=np.ones(architecture.vocabulary, np.int64),
        documents="none",
        summary={},
        fingerprint=f"model {seed}",
    )


def awkward_model(cell: Cell, hidden: int) -> Checkpoint:
    """A model whose sizes fill no vector."""
    return checkpoint(cell, vocabulary=VOCABULARIES[hidden], embedding=9, hidden=hidden)


def random_state(model: Architecture, rng: np.random.Generator, size: float = 1.0) -> Floats:
    """The state of a row, (L, P, H)."""
    shape = (model.layers, model.state_parts, model.hidden)
    return (rng.uniform(-1, 1, shape) * size).astype(np.float32)


def test_the_runtime_and_the_cell_are_one_decoder(cell_decoder: Callable[..., Decoder]) -> None:
    """Rows written, cleared, moved, read and stepped at random go the way of the cell's."""
    rng = np.random.default_rng(0)
    for cell in CELLS:
        model = checkpoint(cell)
        architecture = model.architecture
        decoders = (
            GraphDecoder(model, "float32", capacity=8, threads=1),
            cell_decoder(architecture, model.tensors, capacity=8),
        )
        rows = 0
        for _ in range(200):
            act = rng.choice(["write", "clear", "leave", "step"])
            if act in ("write", "clear") and rows < 8:
                state = random_state(architecture, rng)
                for decoder in decoders:
                    if act == "write":
                        decoder.write(rows, state)
                    else:
                        decoder.clear(rows)
                rows += 1
            elif act == "leave" and rows:
                left = rng.integers(rows)
                rows -= 1
                for decoder in decoders:
                    decoder.move(rows, left)
            elif act == "step" and rows:
                tokens_B = rng.integers(0, 23, rows, np.int32)
                logits, expected = (decoder.step(tokens_B) for decoder in decoders)
                np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
                for row in range(rows):
                    state, expected = (decoder.read(row) for decoder in decoders)
                    np.testing.assert_allclose(state, expected, rtol=0, atol=1e-4)
        assert [decoder.vocabulary_size for decoder in decoders] == [23, 23]


# A row alone and among others


def follow(
    crowd: GraphDecoder,
    alone: GraphDecoder,
    model: Architecture,
    seed: int,
    crowds: list[int],
    size: float = 1.0,
) -> None:
    """Step crowds of rows that join and leave, each row checked against itself alone."""
    rng = np.random.default_rng(seed)
    states: list[Floats] = []
    for rows in crowds:
        while len(states) < rows:
            state = random_state(model, rng, size)
            if rng.random() < 0.2:
                state[:] = 0.0
                crowd.clear(len(states))
            else:
                crowd.write(len(states), state)
            states.append(state)
        while len(states) > rows:
            left, last = rng.integers(len(states)), states.pop()
            if left < len(states):
                crowd.move(len(states), left)
                states[left] = last
        tokens_B = rng.integers(0, model.vocabulary, rows, np.int32)
        logits_BV = crowd.step(tokens_B)
        for row, state in enumerate(states):
            alone.write(0, state)
            assert alone.step(tokens_B[row : row + 1]).tobytes() == logits_BV[row].tobytes()
            states[row] = alone.read(0)
            assert states[row].tobytes() == crowd.read(row).tobytes()


@pytest.mark.parametrize("hidden", VOCABULARIES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(
    kernel: Kernel, cell: Cell, hidden: int
) -> None:
    """Logits and states of rows that join and leave are those of each alone, on 1 and 2 threads."""
    model = awkward_model(cell, hidden)
    alone = GraphDecoder(model, kernel, capacity=1, threads=1)
    for threads in (1, 2):
        crowd = GraphDecoder(model, kernel, capacity=CAPACITY, threads=threads, spinning=False)
        follow(crowd, alone, model.architecture, hidden, [1, 2, 70, 17, 5])


@settings(max_examples=150)
@given(
    cell=st.sampled_from(CELLS),
    kernel=st.sampled_from(KERNELS),
    layers=st.integers(1, 3),
    vocabulary=st.integers(1, 300),
    hidden=st.integers(1, 150),
    tied=st.booleans(),
    residual=st.booleans(),
    spread=st.sampled_from([0.3, 1.0, 30.0]),
    threads=st.integers(1, 3),
    crowds=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=5),
    elsewhere=st.booleans(),
)
def test_rows_of_any_model_have_bits_of_their_own(
    kernel: Kernel,
    spread: float,
    threads: int,
    crowds: list[int],
    elsewhere: bool,
    **fields: Any,
) -> None:
    """Whatever the shape, the weights, the crowds and the thread that calls, a row has its bits."""
    embedding = fields["hidden"] if fields["tied"] else 5
    model = checkpoint(**fields, embedding=embedding, change=lambda tensor: tensor * spread)
    alone = GraphDecoder(model, kernel, capacity=1, threads=1)
    crowd = GraphDecoder(model, kernel, capacity=CAPACITY, threads=threads, spinning=False)
    if elsewhere:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(follow, crowd, alone, model.architecture, 0, crowds).result()
    else:
        follow(crowd, alone, model.architecture, 0, crowds)


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-45])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("cell", CELLS)
def test_denormal_states_change_no_bit(cell: Cell, kernel: Kernel, size: float) -> None:
    """Rows whose states are denormal numbers have the same bits alone and among others."""
    model = checkpoint(cell, hidden=200)
    alone = GraphDecoder(model, kernel, capacity=1, threads=1)
    crowd = GraphDecoder(model, kernel, capacity=64, threads=2, spinning=False)
    follow(crowd, alone, model.architecture, 0, [64, 64, 9], size)


def test_denormal_numbers_count_on_every_thread() -> None:
    """A memory halved by each step passes through the denormal numbers in every row of many."""
    model = checkpoint(hidden=512, layers=1, change=np.zeros_like)
    decoder = GraphDecoder(model, "float32", capacity=64, threads=2, spinning=False)
    state = np.full((1, 2, 512), 1e-37, np.float32)
    for row in range(64):
        decoder.write(row, state)
    expected = np.float32(1e-37)
    for _ in range(9):
        decoder.step(np.zeros(64, np.int32))
        expected *= np.float32(0.5)
        assert all((decoder.read(row)[0, 1] == expected).all() for row in range(64))
    assert 0 < expected < np.finfo(np.float32).smallest_normal


def test_a_vocabulary_of_thousands_has_the_same_bits_too() -> None:
    """With an output layer that is shared out among threads a row has its own logits."""
    model = checkpoint(vocabulary=5000, embedding=4, hidden=128, layers=1)
    for kernel in KERNELS:
        alone = GraphDecoder(model, kernel, capacity=1, threads=1)
        crowd = GraphDecoder(model, kernel, capacity=64, threads=2, spinning=False)
        follow(crowd, alone, model.architecture, 0, [64, 3, 2, 1])


# What a decoder does with its rows


def test_what_is_read_is_a_copy() -> None:
    """A state that was read stays as it was while its row is stepped on."""
    decoder = GraphDecoder(checkpoint(), "float32", capacity=1, threads=1)
    decoder.step(np.array([3], np.int32))
    state = decoder.read(0)
    before = state.tobytes()
    decoder.step(np.array([4], np.int32))
    assert state.tobytes() == before
    assert decoder.read(0).tobytes() != before


def test_a_new_decoder_and_a_cleared_row_are_at_the_start_of_a_text() -> None:
    """Nothing of the steps that identify a decoder is left, nor of a text before."""
    decoder = GraphDecoder(checkpoint(), "int8", capacity=3, threads=1)
    assert not any(decoder.read(row).any() for row in range(3))
    decoder.step(np.array([1, 2, 3], np.int32))
    assert decoder.read(1).any()
    decoder.clear(1)
    assert not decoder.read(1).any()
    assert decoder.read(0).any()
    assert decoder.read(2).any()


def test_a_step_that_fails_moves_no_row() -> None:
    """A token outside the vocabulary is refused, and every state is what it was."""
    decoder = GraphDecoder(checkpoint(), "float32", capacity=2, threads=1)
    decoder.step(np.array([1, 2], np.int32))
    before = [decoder.read(row).tobytes() for row in range(2)]
    with pytest.raises(Exception, match="out of data bounds"):
        decoder.step(np.array([1, 23], np.int32))
    assert [decoder.read(row).tobytes() for row in range(2)] == before


# What identifies a decoder


def test_a_fingerprint_tells_models_and_precisions_apart() -> None:
    """Other weights or another arithmetic give another one."""
    decoders = [
        GraphDecoder(checkpoint(seed=seed), kernel, capacity=1, threads=1)
        for seed in (0, 1)
        for kernel in ("float32", "int8")
    ]
    assert len({decoder.fingerprint for decoder in decoders}) == 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fingerprint_does_not_depend_on_threads_or_room(kernel: Kernel) -> None:
    """What changes no bit of an answer changes no fingerprint."""
    model = checkpoint(hidden=200)
    decoders = [
        GraphDecoder(model, kernel, capacity=capacity, threads=threads, spinning=spinning)
        for capacity, threads, spinning in [(1, 1, True), (64, 2, False), (3, 3, False)]
    ]
    assert len({decoder.fingerprint for decoder in decoders}) == 1


def test_both_int8_kernels_have_one_fingerprint() -> None:
    """Signed and unsigned weights multiply exactly, so texts of one kernel are the other's."""
    assert is_exact(False)
    if is_exact(True):
        signed, unsigned = (
            GraphDecoder(checkpoint(hidden=200), kernel, capacity=1, threads=1)
            for kernel in ("int8", "int8-unsigned")
        )
        assert signed.fingerprint == unsigned.fingerprint


# Which arithmetic a request gets


@pytest.mark.parametrize(
    ("asked", "signed", "unsigned", "kernel"),
    [
        ("auto", True, True, "int8"),
        ("auto", False, True, "float32"),
        ("auto", False, False, "float32"),
        ("int8", True, True, "int8"),
        ("int8", False, True, "int8-unsigned"),
        ("int8", False, False, "float32"),
        ("float32", True, True, "float32"),
        ("float32", False, False, "float32"),
    ],
)
def test_the_kernel_follows_from_what_is_asked_and_what_is_exact(
    asked: Precision, signed: bool, unsigned: bool, kernel: Kernel
) -> None:
    """No answer comes from a product that may overflow; "auto" takes no slow kernel."""
    chosen = choose_kernel(asked, lambda signed_weights: signed if signed_weights else unsigned)
    assert chosen == kernel
    assert arithmetic_of(chosen) == ("float32" if kernel == "float32" else "int8")


def saturating(
    activations_BI: NDArray[np.uint8], weight_IG: NDArray[np.int8] | NDArray[np.uint8]
) -> NDArray[np.int32]:
    """The product of processors without VNNI: pairs of products are added in 16 bits."""
    if weight_IG.dtype == np.uint8:  # widened to 16 bits before they are multiplied
        return activations_BI.astype(np.int32) @ weight_IG.astype(np.int32)
    pairs = activations_BI[:, :, None].astype(np.int64) * weight_IG.astype(np.int64)
    sums = pairs[:, ::2] + pairs[:, 1::2]
    return np.clip(sums, -(2**15), 2**15 - 1).sum(axis=1).astype(np.int32)


def test_a_product_that_saturates_is_found_out() -> None:
    """The sums that are compared are too large for 16 bits with signed weights."""
    assert not is_exact(True, saturating)
    assert is_exact(False, saturating)


def test_a_product_that_saturates_for_many_rows_only_is_found_out() -> None:
    """One row and many may take different paths, and both are compared."""

    def product(
        activations_BI: NDArray[np.uint8], weight_IG: NDArray[np.int8]
    ) -> NDArray[np.int32]:
        if len(activations_BI) > 1:
            return saturating(activations_BI, weight_IG)
        return activations_BI.astype(np.int32) @ weight_IG.astype(np.int32)

    assert not is_exact(True, product)
