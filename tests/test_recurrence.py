"""One layer over a sequence: the stepped LSTM against PyTorch's, and the choice between them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from charloom.architecture import CELLS, GATES, STATE_PARTS, Cell
from training import recurrence
from training.recurrence import Arithmetic, SteppedLSTM, prefers_stepping, recur

Layer = Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor]]

NAMES = ("out", "h_T", "c_T", "dx", "dh", "dc", "dweight_ih", "dweight_hh", "dbias")


def draw(
    *, steps: int, lanes: int, inputs: int, hidden: int, gates: int = 4, seed: int = 0
) -> tuple[Tensor, ...]:
    """x, h, c, both weights and one bias, float32, of the sizes that training starts from."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape).normal_(0.0, scale, generator=generator)

    rows = gates * hidden
    return (
        normal(steps, lanes, inputs),
        normal(lanes, hidden, scale=0.5),
        normal(lanes, hidden),
        normal(rows, inputs, scale=inputs**-0.5),
        normal(rows, hidden, scale=hidden**-0.5),
        normal(rows),
    )


def reference(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` in the type of its arguments."""
    x, h, c, weight_ih, weight_hh, bias = arguments
    weights = [weight_ih, weight_hh, bias, torch.zeros_like(bias)]
    out, h_after, c_after = torch.lstm(
        x, (h[None], c[None]), weights, True, 1, 0.0, True, False, False
    )
    return out, h_after[0], c_after[0]


def stepped_float32(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The stepped layer with products in float32, which shows its formulas without rounding."""
    out, h_after, c_after = SteppedLSTM.apply(*arguments)
    return out, h_after, c_after


def stepped_bfloat16(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The stepped layer as `recur` calls it for bfloat16."""
    x, *others = arguments
    return stepped_float32((x.to(torch.bfloat16), *others))


def fused_bfloat16(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` under autocast, gradients arriving in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return reference(arguments)


def results_and_gradients(
    layer: Layer, arguments: tuple[Tensor, ...], dtype: torch.dtype
) -> list[Tensor]:
    """Three results, then six gradients for one fixed gradient of the results, in float64."""
    leaves = tuple(part.detach().to(dtype, copy=True).requires_grad_() for part in arguments)
    results = layer(leaves)
    generator = torch.Generator().manual_seed(99)
    upstream = [torch.empty(part.shape).normal_(0.0, 1.0, generator=generator) for part in results]
    torch.autograd.backward(
        results, [grad.to(part.dtype) for grad, part in zip(upstream, results, strict=True)]
    )
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [part.detach().double() for part in (*results, *gradients)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Length of the difference over the length of the truth."""
    return float((value - truth).norm() / truth.norm())


@given(
    steps=st.integers(1, 9),
    lanes=st.integers(1, 5),
    inputs=st.integers(1, 9),
    hidden=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_in_float32_it_is_the_float64_lstm_to_rounding(
    steps: int, lanes: int, inputs: int, hidden: int, seed: int
) -> None:
    """In float32, results and all six gradients are those of `torch.lstm` in float64 to 1e-5."""
    arguments = draw(steps=steps, lanes=lanes, inputs=inputs, hidden=hidden, seed=seed)
    truth = results_and_gradients(reference, arguments, torch.float64)
    stepped = results_and_gradients(stepped_float32, arguments, torch.float32)
    for name, value, expected in zip(NAMES, stepped, truth, strict=True):
        assert torch.allclose(value, expected, rtol=2e-5, atol=2e-5), name


@pytest.mark.parametrize(("lanes", "inputs", "hidden"), [(16, 48, 64), (3, 67, 96), (32, 128, 128)])
def test_in_bfloat16_it_is_as_exact_as_the_fused_kernel(
    lanes: int, inputs: int, hidden: int
) -> None:
    """In bfloat16 every result and gradient is off by < 1 % and < 1.5 times the fused error."""
    arguments = draw(steps=40, lanes=lanes, inputs=inputs, hidden=hidden)
    truth = results_and_gradients(reference, arguments, torch.float64)
    stepped = results_and_gradients(stepped_bfloat16, arguments, torch.float32)
    fused = results_and_gradients(fused_bfloat16, arguments, torch.float32)
    for name, ours, theirs, expected in zip(NAMES, stepped, fused, truth, strict=True):
        error, known = relative_error(ours, expected), relative_error(theirs, expected)
        assert error < 0.01, f"{name} is off by {error}"
        assert error < 1.5 * known, f"{name} is off by {error}, the fused kernel by {known}"


def test_long_memory_survives_bfloat16() -> None:
    """A forget gate of 0.9991 keeps a cell over 200 steps, and its gradient, to 1 %."""
    arguments = list(draw(steps=200, lanes=4, inputs=8, hidden=16))
    bias = torch.zeros(4, 16)
    bias[0], bias[1] = -20.0, 7.0  # nothing is written, almost everything is kept
    arguments[3:] = [torch.zeros(64, 8), torch.zeros(64, 16), bias.flatten()]
    x, h, c, *weights = arguments
    c = c.requires_grad_()
    _, _, after = stepped_bfloat16((x, h, c, *weights))
    (grad,) = torch.autograd.grad(after.sum(), c)
    kept = torch.sigmoid(torch.tensor(7.0)) ** 200
    torch.testing.assert_close(after, c * kept, rtol=0.01, atol=0.0)
    torch.testing.assert_close(grad, kept.expand_as(c), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats_bit_for_bit(threads: int) -> None:
    """The same call with the same number of threads repeats every result and gradient exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = draw(steps=6, lanes=16, inputs=128, hidden=384)
        first = results_and_gradients(stepped_bfloat16, arguments, torch.float32)
        for _ in range(3):
            again = results_and_gradients(stepped_bfloat16, arguments, torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


def test_carried_state_equals_one_long_sequence() -> None:
    """Two halves with the state carried between them give what one sequence gives."""
    x, *others = draw(steps=12, lanes=8, inputs=32, hidden=64)
    h, c, *weights = others
    whole, h_whole, c_whole = stepped_bfloat16((x, h, c, *weights))
    first, h_half, c_half = stepped_bfloat16((x[:6], h, c, *weights))
    second, h_after, c_after = stepped_bfloat16((x[6:], h_half, c_half, *weights))
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(h_after, h_whole)
    assert torch.equal(c_after, c_whole)


def test_backward_twice_gives_the_same_gradients() -> None:
    """A graph that is kept can be walked again: nothing saved is overwritten on the way back."""
    x, h, c, weight_ih, weight_hh, bias = draw(steps=5, lanes=4, inputs=8, hidden=16)
    weight_hh.requires_grad_()
    out, _, _ = stepped_bfloat16((x, h, c, weight_ih, weight_hh, bias))
    first, second = (
        torch.autograd.grad(out.float().sum(), weight_hh, retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_mask_on_the_recurrent_weights_reaches_results_and_gradients() -> None:
    """Dropped recurrent weights change the output and get no gradient; kept ones get theirs."""
    x, h, c, weight_ih, weight_hh, bias = draw(steps=5, lanes=4, inputs=8, hidden=16)
    mask = torch.zeros_like(weight_hh)
    mask[:, ::2] = 2.0
    weight_hh.requires_grad_()
    out, _, _ = stepped_bfloat16((x, h, c, weight_ih, weight_hh * mask, bias))
    plain, _, _ = stepped_bfloat16((x, h, c, weight_ih, weight_hh, bias))
    assert not torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out.float().sum(), weight_hh)
    assert torch.equal(grad[:, 1::2], torch.zeros(64, 8))
    assert grad[:, ::2].abs().min() > 0


@pytest.mark.parametrize("stepping", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_path_has_one_shape(
    cell: Cell, precision: Arithmetic, stepping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever computes it: outputs (T, B, H) in the precision, state and gradients in float32."""
    monkeypatch.setattr(
        recurrence, "prefers_stepping", lambda *_, **__: stepping and precision == "bfloat16"
    )
    x, h, c, weight_ih, weight_hh, bias = draw(
        steps=3, lanes=2, inputs=5, hidden=7, gates=GATES[cell]
    )
    leaves = [part.requires_grad_() for part in (x, weight_ih, weight_hh, bias)]
    state = (h, c)[: STATE_PARTS[cell]]
    out, after = recur(cell, x, state, weight_ih, weight_hh, bias, bias, precision=precision)
    assert out.shape == (3, 2, 7)
    assert out.dtype == getattr(torch, precision)
    assert [part.shape for part in after] == [(2, 7)] * STATE_PARTS[cell]
    assert {part.dtype for part in after} == {torch.float32}
    gradients = torch.autograd.grad(out.float().sum() + after[-1].sum(), leaves)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_stepping_is_for_training_wide_lstms_in_bfloat16() -> None:
    """The rule: bfloat16, a processor, gradients wanted, and layers of the measured width."""
    x = torch.empty(2, 3, 4)
    assert prefers_stepping(x, hidden=640, precision="bfloat16")
    assert not prefers_stepping(x, hidden=639, precision="bfloat16")
    assert not prefers_stepping(x, hidden=640, precision="float32")
    assert not prefers_stepping(x.to("meta"), hidden=640, precision="bfloat16")
    with torch.no_grad():
        assert not prefers_stepping(x, hidden=640, precision="bfloat16")
