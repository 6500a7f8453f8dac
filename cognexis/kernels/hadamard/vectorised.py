"""The transform of a block of length a b as two small products: Had_ab vec(X) = vec(Had_a X Had_b)."""

import functools

import torch
from torch import Tensor

from cognexis.kernels.hadamard.blocks import hadamard_blocks


def hadamard_vectorised(x: Tensor, normalize: bool) -> Tensor:
    """See ``hadamard_transform``."""
    parts = [_transform(x[..., start : start + length], normalize) for start, length in hadamard_blocks(x.shape[-1])]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _transform(x: Tensor, normalize: bool) -> Tensor:
    length = x.shape[-1]
    exponent = length.bit_length() - 1
    left, right = exponent // 2, exponent - exponent // 2
    grid = x.reshape(*x.shape[:-1], 1 << left, 1 << right)
    y = _sylvester(left, normalize).to(x) @ (grid @ _sylvester(right, normalize).to(x))
    return y.reshape(x.shape)


@functools.lru_cache(maxsize=64)
def _sylvester(exponent: int, normalize: bool) -> Tensor:
    """Hadamard matrix of side 2^exponent in natural order, in float64."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(exponent):
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / 2 ** (exponent / 2) if normalize else matrix
