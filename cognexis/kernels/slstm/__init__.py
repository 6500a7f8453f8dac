"""The sLSTM recurrence: a scalar memory per channel, exponential gates, and a recurrent matrix per head.

For each gate g in i, f, z, o (in this order), within each head:

    a_g = wx_g + R_g y_{t-1} + b_g
    l   = m_{t-1} + log sigmoid(a_f)
    m_t = a_i where n_{t-1} = 0 or a_i >= l, else l
    I   = exp(min(0, a_i - m_t)),   F = exp(min(0, l - m_t))
    c_t = F c_{t-1} + I tanh(a_z),  n_t = F n_{t-1} + I
    y_t = sigmoid(a_o) c_t / (n_t + 1e-6)

A fresh state, and a reset at t in place of what stands at t-1, is y = c = n = m = 0. Everything is computed in at
least float32, and autocast is off inside.

Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 8-17 and appendix A.2; the small number in the
denominator and the resets are ours.
Letters: B batch, T time, N heads, D head width.
"""

import torch
from torch import Tensor

from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import no_autocast
from cognexis.kernels.slstm.reference import slstm_reference
from cognexis.kernels.slstm.vectorised import slstm_vectorised

_FORMS = {"reference": slstm_reference, "vectorised": slstm_vectorised}


def slstm_sequence(
    wx: Tensor, r: Tensor, b: Tensor, state: Tensor, resets: Tensor | None = None, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        wx: what the input gives to the gates, ``[B, T, 4, N, D]``.
        r: recurrent matrices ``[4, N, D, D]``, of which the last axis is summed with y.
        b: biases ``[4, N, D]``.
        state: y, c, n, m as ``[4, B, N, D]``.
        resets: bool ``[B, T]``.

    Returns:
        y ``[B, T, N, D]`` in wx's dtype, and c, n, m at every token, ``[3, T, B, N, D]`` in at least float32.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if wx.dim() != 5:
        raise ValueError(f"slstm_sequence: wx of shape {list(wx.shape)}, expected [B, T, 4, N, D]")
    rows, length, _, heads, width = wx.shape
    expected = {
        "wx": (wx, (rows, length, 4, heads, width)),
        "r": (r, (4, heads, width, width)),
        "b": (b, (4, heads, width)),
        "state": (state, (4, rows, heads, width)),
    }
    if resets is not None:
        expected["resets"] = (resets, (rows, length))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"slstm_sequence: {name} of shape {list(tensor.shape)}, expected {list(shape)}")
    if not length:
        return wx[:, :, 0], state.new_zeros(3, 0, rows, heads, width)
    run = _FORMS[choose("slstm_sequence", wx, form=form).form]
    with no_autocast(wx):
        return run(wx, r, b, state, resets)


def slstm_sequence_pytorch(
    *, Wx: Tensor, R: Tensor, b: Tensor, initial_states: Tensor, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`slstm_sequence` under another set of names.

    Args:
        resets: ``[B, T]``, or ``[B]`` for the first token, in any dtype.

    Returns:
        y, c, n, m at every token ``[T, 4, B, N, D]``, and at the last one ``[4, B, N, D]``.
    """
    if resets is not None:
        resets = resets != 0
        if resets.dim() == 1:
            resets = resets[:, None] & (torch.arange(Wx.shape[1], device=Wx.device) == 0)
    y, others = slstm_sequence(Wx, R, b, initial_states, resets)
    states = torch.cat([y.transpose(0, 1)[:, None], others.transpose(0, 1)], 1)
    return states, states[-1] if Wx.shape[1] else initial_states


__all__ = ["slstm_sequence", "slstm_sequence_pytorch"]
