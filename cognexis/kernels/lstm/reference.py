"""LSTM and GRU token by token from their equations; the truth for the other forms."""

import torch
from torch import Tensor, nn

from cognexis.kernels.precision import wide_dtype


def rnn_reference(
    net: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...], resets: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the layers one after another.

    Args:
        states: ``(h, c)`` for an LSTM, ``(h,)`` for a GRU, each ``[B, L, H]``.
    """
    wide = wide_dtype(x, *net.parameters())
    step = _lstm_step if net.mode == "LSTM" else _gru_step
    inputs = x.to(wide)
    finals = []
    for layer in range(net.num_layers):
        weights = [getattr(net, f"weight_{kind}_l{layer}").to(wide) for kind in ("ih", "hh")]
        biases = [getattr(net, f"bias_{kind}_l{layer}").to(wide) if net.bias else 0.0 for kind in ("ih", "hh")]
        held = tuple(state[:, layer].to(wide) for state in states)
        outputs = []
        for t in range(x.shape[1]):
            if resets is not None:
                held = tuple(torch.where(resets[:, t, None], 0, state) for state in held)
            from_input = inputs[:, t] @ weights[0].T + biases[0]
            held = step(from_input, held[0] @ weights[1].T + biases[1], held)
            outputs.append(held[0])
        finals.append(held)
        inputs = torch.stack(outputs, 1)
        if net.training and layer + 1 < net.num_layers:
            inputs = nn.functional.dropout(inputs, net.dropout)
    last = tuple(
        torch.stack(layers, 1).to(given.dtype) for layers, given in zip(zip(*finals, strict=True), states, strict=True)
    )
    return inputs.to(x.dtype), last


def _lstm_step(from_input: Tensor, from_state: Tensor, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (from_input + from_state).chunk(4, -1)
    c = f.sigmoid() * held[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(from_input: Tensor, from_state: Tensor, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (r_x, z_x, n_x), (r_h, z_h, n_h) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    z = (z_x + z_h).sigmoid()
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return ((1 - z) * n + z * held[0],)
