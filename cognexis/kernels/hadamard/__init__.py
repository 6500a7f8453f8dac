"""A fixed orthogonal mixing of channels: random signs, a permutation, a Walsh-Hadamard transform.

    y = Had (signs * x[perm])

Had is block-diagonal over the binary digits of H, the longest block first, each block the Sylvester matrix
(-1)^popcount(i AND j) divided by the square root of its length. So it is orthogonal and symmetric at every H, and for
a power of two it is the usual transform. With ``normalize=False`` blocks keep entries of 1 and -1.

Letters: B batch, T time, H hidden. Source: Ailon and Chazelle 2006, without the subsampling; the blocks are ours.
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.dispatch import choose
from cognexis.kernels.hadamard.reference import hadamard_reference
from cognexis.kernels.hadamard.vectorised import hadamard_vectorised
from cognexis.kernels.precision import no_autocast

_FORMS = {"reference": hadamard_reference, "vectorised": hadamard_vectorised}


def hadamard_transform(x: Tensor, *, normalize: bool = True, form: str | None = None) -> Tensor:
    """Had x along the last axis, in at least float32 inside; of any shape."""
    if not x.numel():
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    chosen = choose("hadamard_transform", x, form=form).form
    with no_autocast(x):
        return _FORMS[chosen](wide, normalize).to(x.dtype)


def srht_pytorch(
    x_btd: Tensor, signs_h: Tensor, perm_h: Tensor | None, *, normalize: bool = True, form: str | None = None
) -> Tensor:
    """Signs, permutation and transform of ``[B, T, H]``; ``perm_h=None`` leaves the order.

    Raises:
        ShapeMismatchError: signs or permutation are not ``[H]``.
    """
    for name, value in (("signs_h", signs_h), ("perm_h", perm_h)):
        if value is not None and value.shape != x_btd.shape[-1:]:
            raise ShapeMismatchError(f"srht: {name} of shape {list(value.shape)}, expected [{x_btd.shape[-1]}]")
    mixed = x_btd if perm_h is None else x_btd.index_select(-1, perm_h)
    return hadamard_transform(mixed * signs_h.to(x_btd.dtype), normalize=normalize, form=form)


__all__ = ["hadamard_transform", "srht_pytorch"]
