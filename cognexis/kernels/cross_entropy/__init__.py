"""Loss and gradient of a softmax over logits, in one go and in the logits' own memory.

    loss_n = w_n (logsumexp(z_n) - z_n[target_n])
    dz_n = w_n (softmax(z_n) - onehot(target_n)),   written over z_n

A position of weight 0 has a loss and a gradient of 0, whatever its logits are. Inside, values are float32 at least.
The Triton form reads the logits twice and writes them once; the vectorised one keeps a wide copy of them.
Letters: N positions, V vocabulary. Source: Hsu et al. 2024, "Liger Kernel", section 3.2 (gradients over the logits).
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.cross_entropy.vectorised import cross_entropy_vectorised
from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import wide_dtype


def cross_entropy_(
    logits: Tensor, targets: Tensor, weights: Tensor, *, with_gradient: bool = True, form: str | None = None
) -> Tensor:
    """Loss of each position; the gradient takes the place of ``logits``.

    Args:
        logits: ``[N, V]``, changed in place unless ``with_gradient`` is False; without a graph.
        targets: ``[N]``, each in [0, V).
        weights: ``[N]`` of 0 or more.
        form: see ``COGNEXIS_KERNELS``; the reference is the vectorised form, since nothing here runs over time.

    Returns:
        ``[N]`` in float32 or wider.

    Raises:
        ShapeMismatchError: targets or weights are not ``[N]``.
    """
    for name, value in (("targets", targets), ("weights", weights)):
        if value.shape != logits.shape[:1]:
            raise ShapeMismatchError(f"cross_entropy_: {name} of shape {list(value.shape)}, expected [{len(logits)}]")
    refusal = "float64 is wider than it computes" if logits.dtype == torch.float64 else None
    if refusal is None and logits.stride(-1) != 1:
        refusal = "the logits of a position are not adjacent"
    chosen = choose("cross_entropy_", logits, refusal, form).form
    arguments = (logits, targets, weights.to(wide_dtype(logits)), with_gradient)
    if chosen == "triton":
        from cognexis.kernels.cross_entropy.triton_kernel import cross_entropy_triton

        return cross_entropy_triton(*arguments)
    return cross_entropy_vectorised(*arguments)


__all__ = ["cross_entropy_"]
