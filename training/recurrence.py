"""One recurrent layer over a whole sequence: PyTorch's fused kernels, and an LSTM for wide layers.

`recur` hands each layer to the fused kernel behind `nn.LSTM`, `nn.GRU` or `nn.RNN`, except where
`prefers_stepping` says that `SteppedLSTM` is faster: wide LSTM layers in bfloat16, up to 2.4 times.

The one idea: of the six matrix products that training spends on a layer, only two must go step by
step, the one that carries the hidden state forward and the one that carries its gradient back. The
other four are taken over all steps at once, at the full rate of a large product. The two stepped
ones come near that rate because their weights are put into oneDNN's blocked order once a sequence,
not at each product (32 x 512 x 2048 on 2 cores: 170 microseconds against 210-250 by `torch.mm`).

The trade-off: pre-activations are stored in bfloat16 and the gates computed from them again on the
way back. One more sigmoid a step (17 microseconds) is cheaper than writing its result to memory and
reading it back (94), and it keeps what rounding to bfloat16 would lose of a forget gate near 1.

Legend: T steps, B lanes, I inputs, H hidden size, N = T B rows, G = 4 H gate rows (input, forget,
candidate, output).
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from charloom.architecture import Cell

Arithmetic = Literal["float32", "bfloat16"]
"""What matrix products are computed in; states and gradients of parameters are always float32."""

_STEPPED_FROM_HIDDEN = 640


def recur(
    cell: Cell,
    x_TBI: Tensor,
    state: tuple[Tensor, ...],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    precision: Arithmetic,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs (T, B, H), of type `precision`, and the float32 state after the last step.

    `state` is (h, c) in an LSTM and (h,) elsewhere, each (B, H) and float32, as are the weights
    (G, I) and (G, H) and the biases (G,), whose gates are stacked in PyTorch's order. The same call
    with as many threads gives the same bits, outputs and gradients alike.
    """
    if cell == "lstm" and prefers_stepping(x_TBI, hidden=weight_hh.shape[1], precision=precision):
        bias = bias_ih + bias_hh
        out_TBH, h_BH, c_BH = SteppedLSTM.apply(  # type: ignore[no-untyped-call]  # torch's own signature
            x_TBI.to(torch.bfloat16), *state, weight_ih, weight_hh, bias
        )
        return out_TBH, (h_BH, c_BH)
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    before = [part.unsqueeze(0) for part in state]
    # biases, layers, dropout, training, bidirectional, batch first
    settings = (True, 1, 0.0, torch.is_grad_enabled(), False, False)
    device, low = x_TBI.device.type, precision == "bfloat16"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
        if cell == "lstm":
            out_TBH, *after = torch.lstm(x_TBI, before, weights, *settings)
        else:
            fused = torch.gru if cell == "gru" else torch.rnn_tanh
            out_TBH, *after = fused(x_TBI, before[0], weights, *settings)
    # Without a fused bfloat16 kernel (GRU, tanh RNN) autocast answers in float32.
    return out_TBH.to(torch.bfloat16 if low else torch.float32), tuple(
        part[0].float() for part in after
    )


def prefers_stepping(x_TBI: Tensor, *, hidden: int, precision: Arithmetic) -> bool:
    """Whether `SteppedLSTM` is faster here than the fused LSTM: a matter of speed alone.

    Milliseconds for one layer forward and backward in bfloat16 (PyTorch 2.13, 2 cores of an AMD
    EPYC with AVX512_BF16, freed memory kept, medians), and how many times faster stepping is:

        H x B x T       fused   stepped          H x B x T       fused   stepped
        256 x 32 x 64    19.0      29.3  0.65    768 x 32 x 64   184.7     174.0  1.06
        512 x 32 x 128  137.7     158.6  0.87    1024 x 4 x 64   140.4      62.1  2.26
        640 x 8 x 64     47.1      40.5  1.16    1024 x 16 x 64  274.5     157.0  1.75
        640 x 16 x 64    69.2      66.1  1.05    1024 x 32 x 64  387.5     283.4  1.37
        768 x 16 x 64   124.7      90.5  1.38

    The fused backward pass is what falls behind, probably since its sums of weight gradients, 8 H H
    float32 values, outgrow the caches. Its forward pass is the faster one at every width measured
    there, so without gradients it is always taken.
    """
    return (
        precision == "bfloat16"
        and x_TBI.device.type == "cpu"
        and torch.is_grad_enabled()
        and hidden >= _STEPPED_FROM_HIDDEN
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _BlockedWeight:
    """A weight (G, K) in oneDNN's blocked order, for many products with `rows` rows each.

    These are the operators that `torch.compile` calls for a linear layer with frozen weights.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`, rounded once."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocks, bias, "none", [], "")
        return product

    def times_plus(self, x: Tensor, other: Tensor) -> Tensor:
        """`x @ weight.T + other`, rounded once."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._blocks, None, "add"
        )
        return total


# Factors of the gate rows, explained in `SteppedLSTM`. Powers of two are exact in every type.
_FORWARD = (1.0, 1.0, 2.0, 1.0)
_BACKWARD = (1.0, 0.5, 4.0, 1.0)

# A tensor and chosen overloads: converting a Python number and choosing cost microseconds a step.
_MINUS_ONE = torch.tensor(-1.0)
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def _scale_gates(stacked: Tensor, factors: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """`stacked` (G, ...) with each gate's rows multiplied by its factor."""
    factor_of_gate = torch.tensor(factors).view(4, *(1,) * stacked.ndim)
    gates = stacked.view(4, -1, *stacked.shape[1:])
    return (gates * factor_of_gate).view(stacked.shape).to(dtype)


def _twice_less_one(x: Tensor, out: Tensor) -> Tensor:
    """`2 x - 1`, which makes tanh(z) of sigmoid(2 z)."""
    return torch.add(_MINUS_ONE, x, alpha=2, out=out)


class SteppedLSTM(Function):
    """An LSTM layer, stepped here (Hochreiter and Schmidhuber, 1997; Gers et al., 2000).

    Forward, with z_t = W_ih x_t + W_hh h_(t-1) + b and s the logistic function:

        i, f, o = s(z_i), s(z_f), s(z_o)      g = tanh(z_g)
        c_t = f c_(t-1) + i g                 h_t = o tanh(c_t)

    Backward, where dh_t already holds what the output and step t+1 ask of h_t, and dc likewise:

        dc  += dh o (1 - tanh(c_t)^2)
        dz_i = dc g i(1 - i)      dz_f = dc c_(t-1) f(1 - f)
        dz_g = dc i (1 - g^2)     dz_o = dh tanh(c_t) o(1 - o)
        dh_(t-1) = dz W_hh + (gradient of output t-1)      dc_(t-1) = dc f

    and, over all steps at once, dx = dz W_ih, dW_ih = dz^T x, dW_hh = dz^T h_(t-1), db = sum of dz.

    Each step takes few passes over a few kilobytes, thanks to two changes of scale that cost
    nothing. tanh(a) = 2 s(2a) - 1, so the candidate's weights are doubled and one sigmoid serves
    all four gates; and the cell is kept doubled, C = 2c, so that tanh(c) = 2 s(C) - 1. Backward,
    one `sigmoid_backward` then multiplies all four gates by s(1 - s):

        e_i = dc g i(1 - i)     e_f = dc C_(t-1) f(1 - f)     e_g = dc i s(1 - s)     e_o = dz_o

    where s = s(2 z_g), so that 1 - g^2 = 4 s(1 - s). Hence dz is e with the forget rows halved and
    the candidate rows taken four times: factors put on the weights and on the sums over steps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TBI: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs (T, B, H) of x's type, and h (B, H) and c (B, H) after the last step, float32."""
        (steps, lanes, _), hidden, dtype = x_TBI.shape, h_BH.shape[1], x_TBI.dtype
        weight_x = _BlockedWeight(_scale_gates(weight_ih, _FORWARD, dtype), steps * lanes)
        weight_h = _BlockedWeight(_scale_gates(weight_hh, _FORWARD, dtype), lanes)
        # What the inputs contribute; each step adds what the hidden state does.
        z_NG = weight_x.times(x_TBI.reshape(steps * lanes, -1), _scale_gates(bias, _FORWARD, dtype))
        z_TBG = z_NG.view(steps, lanes, -1)
        h_SBH = x_TBI.new_empty(steps + 1, lanes, hidden)
        C_SBH = c_BH.new_empty(steps + 1, lanes, hidden)
        h_SBH[0] = h_BH
        torch.add(c_BH, c_BH, out=C_SBH[0])
        gates_BG = c_BH.new_empty(lanes, 4 * hidden)
        i, f, g, o = gates_BG.view(lanes, 4, hidden).unbind(1)
        tanh_c = torch.empty_like(c_BH)
        h, C = h_SBH.unbind(), C_SBH.unbind()
        for t, z_BG in enumerate(z_TBG.unbind()):
            z_BG.copy_(weight_h.times_plus(h[t], z_BG))
            gates_BG.copy_(z_BG).sigmoid_()
            _twice_less_one(g, out=g)
            torch.mul(f, C[t], out=C[t + 1]).addcmul_(i, g, value=2)
            _twice_less_one(torch.sigmoid(C[t + 1], out=tanh_c), out=tanh_c)
            h[t + 1].copy_(tanh_c.mul_(o))
        ctx.save_for_backward(x_TBI, h_SBH, C_SBH, z_TBG, weight_ih, weight_hh)
        return h_SBH[1:], h[-1].float(), C[-1] * 0.5

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out_TBH: Tensor, grad_h_BH: Tensor, grad_c_BH: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the six arguments of `forward`."""
        x_TBI, h_SBH, C_SBH, z_TBG, weight_ih, weight_hh = ctx.saved_tensors
        steps, lanes, hidden, dtype = *grad_out_TBH.shape, x_TBI.dtype
        weight_h = _BlockedWeight(_scale_gates(weight_hh, _BACKWARD, dtype).t(), lanes)
        e_TBG = torch.empty_like(z_TBG)
        gates_BG = grad_c_BH.new_empty(lanes, 4 * hidden)
        e_BG = torch.empty_like(gates_BG)
        i, f, s, o = gates_BG.view(lanes, 4, hidden).unbind(1)
        e_i, e_f, e_g, e_o = e_BG.view(lanes, 4, hidden).unbind(1)
        g, tanh_c, through_c = (torch.empty_like(grad_c_BH) for _ in range(3))
        z, C, e, grad_out = (
            z_TBG.unbind(),
            C_SBH.unbind(),
            e_TBG.unbind(),
            grad_out_TBH.contiguous(),
        )
        dc = grad_c_BH.clone()
        dh = grad_out[-1] + grad_h_BH
        for t in reversed(range(steps)):
            gates_BG.copy_(z[t]).sigmoid_()
            _twice_less_one(s, out=g)
            _twice_less_one(torch.sigmoid(C[t + 1], out=tanh_c), out=tanh_c)
            torch.mul(dh, o, out=through_c)
            dc += _tanh_backward(through_c, tanh_c, grad_input=through_c)
            torch.mul(dc, g, out=e_i)
            torch.mul(dc, C[t], out=e_f)
            torch.mul(dc, i, out=e_g)
            torch.mul(dh, tanh_c, out=e_o)
            _sigmoid_backward(e_BG, gates_BG, grad_input=e_BG)
            e[t].copy_(e_BG)
            dc *= f
            dh.copy_(weight_h.times_plus(e[t], grad_out[t - 1]) if t else weight_h.times(e[t]))
        e_NG = e_TBG.view(steps * lanes, -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (e_NG @ _scale_gates(weight_ih, _BACKWARD, dtype)).view_as(x_TBI)
        sums = (
            e_NG.t() @ x_TBI.reshape(steps * lanes, -1),
            e_NG.t() @ h_SBH[:-1].view(steps * lanes, -1),
            (e_NG.new_ones(1, steps * lanes) @ e_NG)[0],
        )
        return grad_x, dh, dc, *(_scale_gates(part, _BACKWARD, torch.float32) for part in sums)
