"""The transform as a dense matrix product, entry by entry (-1)^popcount(i AND j)."""

import torch
from torch import Tensor

from cognexis.kernels.hadamard.blocks import hadamard_blocks


def hadamard_reference(x: Tensor, normalize: bool) -> Tensor:
    """See ``hadamard_transform``."""
    size = x.shape[-1]
    matrix = torch.zeros(size, size, dtype=x.dtype)
    for start, length in hadamard_blocks(size):
        for i in range(length):
            for j in range(length):
                sign = -1.0 if (i & j).bit_count() % 2 else 1.0
                matrix[start + i, start + j] = sign / length**0.5 if normalize else sign
    return x @ matrix.to(x.device)
