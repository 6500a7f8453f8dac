"""Causal convolution over time with a carried window and resets.

    y_t = sum_k weight[:, :, k] * window_t[k] + bias

window_t holds the last K inputs up to x_t, oldest first; what lies before the start or before the last reset is zero.
weight is that of ``torch.nn.Conv1d``, ``[F, F / groups, K]``: depthwise for groups = F, dense for groups = 1. The
window after the last token is the new state, so a sequence may be cut anywhere.

Letters: B batch, T time, F features, K taps.
"""

import torch
from torch import Tensor, nn

from cognexis.kernels.conv.reference import causal_conv_reference
from cognexis.kernels.conv.vectorised import causal_conv_vectorised
from cognexis.kernels.dispatch import choose

_FORMS = {"reference": causal_conv_reference, "vectorised": causal_conv_vectorised}


def causal_conv(
    x: Tensor,
    window: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    resets: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve ``x [B, T, F]`` behind ``window [B, K, F]``.

    Args:
        resets: bool ``[B, T]``.
        form: "reference" or "vectorised"; None lets ``dispatch`` choose.

    Returns:
        y ``[B, T, F]`` in x's dtype and the new window ``[B, K, F]`` in the window's.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.dim() != 3 or weight.dim() != 3:
        raise ValueError(f"causal_conv: x {list(x.shape)} and weight {list(weight.shape)} must have three axes")
    rows, length, width = x.shape
    if weight.shape[0] != width or width % weight.shape[1]:
        raise ValueError(f"causal_conv: weight of shape {list(weight.shape)}, expected [{width}, {width} / groups, K]")
    if window.shape != (rows, weight.shape[2], width):
        raise ValueError(
            f"causal_conv: window of shape {list(window.shape)}, expected {[rows, weight.shape[2], width]}"
        )
    if resets is not None and resets.shape != (rows, length):
        raise ValueError(f"causal_conv: resets of shape {list(resets.shape)}, expected [{rows}, {length}]")
    if not length:
        return x, window
    return _FORMS[choose("causal_conv", x, form=form).form](x, window, weight, bias, resets)


def causal_conv1d_pytorch(
    conv_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    pad: int | None = None,
    conv: nn.Module | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv` under another set of names; ``pad`` and ``conv`` are accepted and not needed.

    Args:
        conv_state: ``[B, K, F]``.
        resets: ``[B, T]``, or ``[B]`` for the first token, in any dtype.

    Raises:
        ValueError: ``groups`` or a shape contradicts the weight.
    """
    if weight.shape[0] != groups * weight.shape[1]:
        raise ValueError(f"groups={groups}: contradicts the weight of shape {list(weight.shape)}")
    if resets is not None:
        resets = resets != 0
        if resets.dim() == 1:
            resets = resets[:, None] & (torch.arange(x.shape[1], device=x.device) == 0)
    return causal_conv(x, conv_state, weight, bias, resets)


__all__ = ["causal_conv", "causal_conv1d_pytorch"]
