"""Attention with relative positions."""

from cognexis.kernels.relative_attention import txl_pytorch

__all__ = ["txl_pytorch"]
