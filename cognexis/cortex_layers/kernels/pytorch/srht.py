"""Signs, permutation and Hadamard transform."""

from cognexis.kernels.hadamard import srht_pytorch

__all__ = ["srht_pytorch"]
