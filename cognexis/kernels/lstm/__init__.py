"""LSTM and GRU over a sequence with carried states and resets, on the weights of torch.nn.LSTM and torch.nn.GRU.

LSTM, per layer, with s(.) the logistic function:

    i, f, g, o = s, s, tanh, s of (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    c_t = f * c_{t-1} + i * g,   h_t = o * tanh(c_t)

GRU, per layer:

    r, z = s(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
    n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn)),   h_t = (1 - z) * n + z * h_{t-1}

A reset at t sets h_{t-1} and c_{t-1} of a row to zero in every layer. 16-bit weights and inputs are computed in
float32. Sources: Hochreiter & Schmidhuber 1997; Gers et al. 2000; Cho et al. 2014 (with the reset gate behind the
matrix, as torch and cuDNN have it).

Letters: B batch, T time, H hidden, L layers.
"""

import torch
from torch import Tensor, nn

from cognexis.kernels.dispatch import choose
from cognexis.kernels.lstm.reference import rnn_reference
from cognexis.kernels.lstm.vectorised import rnn_vectorised

_FORMS = {"reference": rnn_reference, "vectorised": rnn_vectorised}


def lstm_sequence(
    net: nn.LSTM, x: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None, form: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM over ``x [B, T, H]`` from ``h`` and ``c [B, L, H]``.

    Args:
        resets: bool ``[B, T]``.

    Returns:
        y ``[B, T, H]`` in x's dtype, and the last h and c ``[B, L, H]`` in their own dtypes.

    Raises:
        ValueError: shapes that do not belong together.
    """
    y, last = _run("lstm_sequence", net, x, (h, c), resets, form)
    return y, last[0], last[1]


def gru_sequence(
    net: nn.GRU, x: Tensor, h: Tensor, resets: Tensor | None = None, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run a GRU over ``x [B, T, H]`` from ``h [B, L, H]``; as :func:`lstm_sequence`."""
    y, last = _run("gru_sequence", net, x, (h,), resets, form)
    return y, last[0]


def _run(
    op: str, net: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...], resets: Tensor | None, form: str | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if net.bidirectional or net.proj_size:
        raise ValueError(f"{op}: a bidirectional or projecting {type(net).__name__} is not supported")
    if x.dim() != 3 or x.shape[2] != net.input_size:
        raise ValueError(f"{op}: x of shape {list(x.shape)}, expected [B, T, {net.input_size}]")
    expected = (x.shape[0], net.num_layers, net.hidden_size)
    for name, state in zip("hc", states, strict=False):
        if state.shape != expected:
            raise ValueError(f"{op}: {name} of shape {list(state.shape)}, expected {list(expected)}")
    if resets is not None and resets.shape != x.shape[:2]:
        raise ValueError(f"{op}: resets of shape {list(resets.shape)}, expected {list(x.shape[:2])}")
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], 0, net.hidden_size), states
    return _FORMS[choose(op, x, form=form).form](net, x, states, resets)


def lstm_sequence_pytorch(
    *, lstm: nn.LSTM, x_seq: Tensor, h0_bf: Tensor, c0_bf: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lstm_sequence` under another set of names; ``resets`` ``[B, T]``, or ``[B]`` for the first token."""
    if resets is not None:
        resets = resets != 0
        if resets.dim() == 1 and x_seq.dim() == 3:
            resets = resets[:, None] & (torch.arange(x_seq.shape[1], device=x_seq.device) == 0)
    return lstm_sequence(lstm, x_seq, h0_bf, c0_bf, resets)


__all__ = ["gru_sequence", "lstm_sequence", "lstm_sequence_pytorch"]
