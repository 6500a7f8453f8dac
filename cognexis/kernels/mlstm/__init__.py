"""The mLSTM recurrence: a matrix memory per head with exponential gates and a running maximum.

With lf = log sigmoid(f), k scaled by 1 / sqrt(D), and i, f one number per head and token:

    m_t = max(lf_t + m_{t-1}, i_t),   F = exp(lf_t + m_{t-1} - m_t),   I = exp(i_t - m_t)
    C_t = F C_{t-1} + I k_t v_t^T,    n_t = F n_{t-1} + I k_t
    h_t = q_t^T C_t / (max(|q_t^T n_t|, exp(-m_t)) + eps)

A fresh state, and a reset at t in place of what stands at t-1, is C = n = m = 0. The exponent -m_t is held below 80,
so that gates which only forget give zero and not an overflow. Gates and sums are computed in at least float32, and
autocast is off inside.

Chunk form, over C tokens, with b_t the sum of lf up to t in the chunk, C0 n0 m0 the state before it, and A_ts true
if s <= t and no reset lies in (s, t]:

    D_ts = b_t - b_s + i_s where A_ts, else -inf
    r_t = sum of lf_s over A_ts, and + m0 if there is no reset up to t
    S_t = max(max_s D_ts, r_t)
    num_t = sum_s exp(D_ts - S_t) (q_t k_s) v_s + [no reset up to t] exp(r_t - S_t) q_t^T C0,   den_t likewise with n

S_t equals m_t, so both forms agree in outputs, states and gradients. The state after the chunk is that of t = C.

Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", eq. 19-27; eps, resets and the bound are ours.
Letters: B batch, T time, N heads, D head width, C chunk length (in shapes G chunks of C).
"""

from typing import Any

import torch
from torch import Tensor

from cognexis.kernels.dispatch import choose
from cognexis.kernels.mlstm.reference import mlstm_reference
from cognexis.kernels.mlstm.step import mlstm_step
from cognexis.kernels.mlstm.vectorised import mlstm_vectorised
from cognexis.kernels.precision import no_autocast

_FORMS = {"reference": mlstm_reference, "vectorised": mlstm_vectorised}


def mlstm_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    resets: Tensor | None = None,
    chunk_size: int = 64,
    eps: float = 1e-6,
    form: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Run the recurrence.

    Args:
        q, k, v: ``[B, N, T, D]``; k unscaled.
        i, f: ``[B, N, T]``, before the exponential and the sigmoid.
        c, n, m: ``[B, N, D, D]``, ``[B, N, D]``, ``[B, N]``.
        resets: bool ``[B, T]``.

    Returns:
        h ``[B, N, T, D]`` in v's dtype, and the new c, n, m in their own dtypes.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if q.dim() != 4:
        raise ValueError(f"mlstm_sequence: q of shape {list(q.shape)}, expected [B, N, T, D]")
    rows, heads, length, width = q.shape
    expected = {
        "k": (k, q.shape),
        "v": (v, q.shape),
        "i": (i, (rows, heads, length)),
        "f": (f, (rows, heads, length)),
        "c": (c, (rows, heads, width, width)),
        "n": (n, (rows, heads, width)),
        "m": (m, (rows, heads)),
    }
    if resets is not None:
        expected["resets"] = (resets, (rows, length))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"mlstm_sequence: {name} of shape {list(tensor.shape)}, expected {list(shape)}")
    if chunk_size < 1:
        raise ValueError(f"mlstm_sequence: chunk_size={chunk_size}: must be at least 1")
    if not length:
        return v, (c, n, m)
    run = _FORMS[choose("mlstm_sequence", q, form=form).form]
    with no_autocast(q):
        return run(q, k, v, i, f, (c, n, m), resets, chunk_size, eps)


def mlstm_recurrent_step_stabilized_simple(
    c_state: Tensor,
    n_state: Tensor,
    m_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    reset_mask: Tensor | None = None,
    eps: float = 1e-6,
    **unused: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One step under another set of names.

    Args:
        c_state, n_state, m_state: ``[B, N, D, D]``, ``[B, N, D, 1]``, ``[B, N, 1, 1]``.
        q, k, v: ``[B, N, 1, D]``.
        igate_preact, fgate_preact: ``[B, N, 1, 1]``.
        reset_mask: ``[B]``.
    """
    resets = None if reset_mask is None else (reset_mask != 0).reshape(-1, 1)
    state = (c_state, n_state[..., 0], m_state[..., 0, 0])
    h, (c, n, m) = mlstm_sequence(
        q, k, v, igate_preact[..., 0], fgate_preact[..., 0], *state, resets=resets, chunk_size=1, eps=eps
    )
    return h, (c, n[..., None], m[..., None, None])


def mlstm_chunkwise_simple(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    igate_preact: Tensor,
    fgate_preact: Tensor,
    initial_C: Tensor | None = None,
    initial_n: Tensor | None = None,
    initial_m: Tensor | None = None,
    reset_mask: Tensor | None = None,
    chunk_size: int = 64,
    return_last_state: bool = False,
    eps: float = 1e-6,
    **unused: Any,
) -> Any:
    """A sequence under another set of names.

    Args:
        initial_n: ``[B, N, D]`` or ``[B, N, D, 1]``.
        initial_m: ``[B, N]`` with any number of trailing axes of length one.
        reset_mask: ``[B, T]`` in any dtype.

    Returns:
        h, or h and (C, n ``[B, N, D, 1]``, m ``[B, N, 1, 1]``) with ``return_last_state``.
    """
    rows, heads, _, width = queries.shape
    wide = torch.promote_types(queries.dtype, torch.float32)
    c = queries.new_zeros(rows, heads, width, width, dtype=wide) if initial_C is None else initial_C
    n = queries.new_zeros(rows, heads, width, dtype=wide) if initial_n is None else initial_n.view(rows, heads, width)
    m = queries.new_zeros(rows, heads, dtype=wide) if initial_m is None else initial_m.view(rows, heads)
    h, (c, n, m) = mlstm_sequence(
        queries,
        keys,
        values,
        igate_preact,
        fgate_preact,
        c,
        n,
        m,
        resets=None if reset_mask is None else reset_mask != 0,
        chunk_size=chunk_size,
        eps=eps,
    )
    return (h, (c, n[..., None], m[..., None, None])) if return_last_state else h


__all__ = [
    "mlstm_chunkwise_simple",
    "mlstm_recurrent_step_stabilized_simple",
    "mlstm_sequence",
    "mlstm_step",
]
