"""Causal convolution that mixes channels, with a reset per token."""

from torch import Tensor

from cognexis.cortex_layers.kernels.triton.announcement import announce
from cognexis.kernels.conv import causal_conv1d_pytorch


def causal_conv1d_triton(
    conv_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``causal_conv1d_pytorch`` for ``groups=1`` and resets ``[B, T]``.

    Raises:
        ValueError: other groups or resets.
    """
    if groups != 1:
        raise ValueError(f"causal_conv1d_triton: supports groups=1 only, got groups={groups}")
    if resets is None or resets.dim() != 2:
        raise ValueError("causal_conv1d_triton: requires per-timestep resets of shape [B, T]")
    announce("causal_conv1d_triton")
    return causal_conv1d_pytorch(conv_state, x, weight, bias, groups, resets=resets)


__all__ = ["causal_conv1d_triton"]
