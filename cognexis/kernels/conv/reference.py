"""Causal convolution token by token; the truth for the other forms."""

import torch
from torch import Tensor

from cognexis.kernels.precision import wide_dtype


def causal_conv_reference(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`cognexis.kernels.conv.causal_conv`."""
    wide = wide_dtype(x, weight)
    rows, length, width = x.shape
    groups = width // weight.shape[1]
    taps = weight.to(wide).view(groups, width // groups, weight.shape[1], -1)  # [G, out, in, K]
    held = window.to(wide)
    outputs = []
    for t in range(length):
        if resets is not None:
            held = torch.where(resets[:, t, None, None], 0, held)
        held = torch.cat([held[:, 1:], x[:, t, None].to(wide)], 1)
        y = torch.einsum("bkgi,goik->bgo", held.view(rows, -1, groups, weight.shape[1]), taps).reshape(rows, width)
        outputs.append(y if bias is None else y + bias)
    return torch.stack(outputs, 1).to(x.dtype), held.to(window.dtype)
