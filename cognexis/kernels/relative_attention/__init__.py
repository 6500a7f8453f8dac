"""Attention with relative positions over a memory and the present sequence.

    score(t, j) = scale ((q_t + u) k_j + (q_t + v_bias) r_{(M + t) - j})
    y_t = sum_j softmax_j(score(t, j)) v_j   over j <= M + t of the same segment, at most ``window`` back

Keys 0..M-1 are the memory, M + t is token t itself. A key of segment -1 is an empty slot, which nobody attends to; a
reset begins a new segment. Scores and their softmax are computed in at least float32.

Letters: B batch, T time, N heads, D head width, L = M + T keys. Source: Dai et al. 2019, Transformer-XL, section 3.3;
segments and the band are added.
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import no_autocast
from cognexis.kernels.relative_attention.inputs import RelativeInputs
from cognexis.kernels.relative_attention.reference import relative_attention_reference
from cognexis.kernels.relative_attention.vectorised import relative_attention_vectorised

_FORMS = {"reference": relative_attention_reference, "vectorised": relative_attention_vectorised}


def attend_relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    seg_full: Tensor,
    u: Tensor,
    v_bias: Tensor,
    M: int,
    scale: float,
    *,
    window: int | None = None,
    dropout: float = 0.0,
    form: str | None = None,
) -> Tensor:
    """Attend.

    Args:
        q: ``[B, N, T, D]``.
        k, v: ``[B, N, L, D]``.
        r: codes of the distances L - 1 down to 0, ``[N, L, D]``.
        seg_full: segment of every key, ``[B, L]``.
        u, v_bias: ``[N, D]``.
        M: how many keys are memory.
        scale: factor of the scores.
        window: how far back a query sees; None: all.
        dropout: part of the weights that is dropped.

    Returns:
        ``[B, N, T, D]`` in q's dtype.

    Raises:
        ShapeMismatchError: shapes do not fit.
    """
    B, N, T, D = q.shape
    L = M + T
    wanted = {"k": (k, (B, N, L, D)), "v": (v, (B, N, L, D)), "r": (r, (N, L, D)), "seg_full": (seg_full, (B, L))}
    for name, (value, shape) in {**wanted, "u": (u, (N, D)), "v_bias": (v_bias, (N, D))}.items():
        if tuple(value.shape) != shape:
            raise ShapeMismatchError(f"attend_relative: {name} of shape {list(value.shape)}, expected {list(shape)}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    chosen = choose("attend_relative", q, form=form).form
    inputs = RelativeInputs(*(value.to(dtype) for value in (q, k, v, r, u, v_bias)))
    with no_autocast(q):
        y = _FORMS[chosen](inputs, seg_full, M, scale, window, dropout)
    return y.to(q.dtype)


def txl_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    seg_full: Tensor,
    u: Tensor,
    v_bias: Tensor,
    M: int,
    scale: float,
) -> Tensor:
    """``attend_relative`` without a band and without dropout."""
    return attend_relative(q, k, v, r, seg_full, u, v_bias, M, scale)


__all__ = ["attend_relative", "txl_pytorch"]
