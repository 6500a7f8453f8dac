"""Causal convolution over a sequence."""

from cognexis.kernels.conv import causal_conv1d_pytorch

__all__ = ["causal_conv1d_pytorch"]
