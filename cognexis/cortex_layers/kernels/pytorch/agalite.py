"""Discounted sum over a sequence."""

from cognexis.kernels.discount import discounted_sum_pytorch

__all__ = ["discounted_sum_pytorch"]
