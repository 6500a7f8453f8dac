"""Next-token loss of a linear head that never holds the logits of all positions.

    loss = sum_n w_n (logsumexp(z_n) - z_n[target_n]) / count,      z = hidden W^T + b
    dz_n = w_n (softmax(z_n) - onehot(target_n)) / count
    dhidden = dz W,   dW = dz^T hidden,   db = sum_n dz_n

Positions are taken in chunks; each chunk's logits live until its gradients are added up, which happens in the forward
pass, so the backward pass only scales; there they take the memory of the logits. Memory is that of one chunk instead
of ``[B, T, V]``. Logits are computed in the dtype of the states (that of autocast where it is on), the softmax and all
sums in at least float32. Second derivatives do not exist.
Letters: B rows, T tokens, H hidden width, V vocabulary, N positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cognexis.decoder.loss import IGNORED_LABEL, check_labels, checked_loss_mask
from cognexis.decoder.norm import compute_dtype
from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.kernels.cross_entropy import cross_entropy_
from cognexis.kernels.precision import no_autocast

CHUNK_ELEMENTS = 2**27
"""Logits of one chunk: 256 MiB in bfloat16."""


def chunked_causal_lm_loss(
    hidden_states: Tensor,
    head: nn.Linear,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The value and gradients of ``causal_lm_loss(head(hidden_states), labels)``.

    Args:
        hidden_states: ``[B, T, H]``, what the head consumes.
        head: the language-model head; its weight may be tied.
        labels: ``[B, T]`` token ids, -100 where no loss is wanted; they are shifted here.
        num_items_in_batch: number of targets over all accumulated batches, or None for the mean of this one.
        shift_labels: ``[B, T]``, already shifted; then ``labels`` is not read.
        loss_mask: ``[B, T]``, a weight of 0 or more for each label.
        chunk_size: positions computed together; None bounds the logits of a chunk.

    Raises:
        ShapeMismatchError, InvalidTokenIdError, InvalidConfigError: as ``causal_lm_loss``, or a bad ``chunk_size``.
    """
    targets, weights = shifted_targets(hidden_states.shape[:2], head.out_features, labels, shift_labels, loss_mask)
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise InvalidConfigError(f"chunk_size={chunk_size!r}: must be a positive integer", path="chunk_size")
    targets, weights = targets.to(hidden_states.device), weights.to(hidden_states.device)
    size = chunk_size or max(1, CHUNK_ELEMENTS // head.out_features)
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    else:
        dtype = hidden_states.dtype
    total: Any = _ChunkedLoss.apply(
        hidden_states.flatten(0, 1).to(dtype),
        head.weight.to(dtype),
        None if head.bias is None else head.bias.to(dtype),
        targets.flatten(),
        weights.flatten(),
        size,
    )
    count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / torch.where(count > 0, count, 1)


def shifted_targets(
    shape: Any, vocab_size: int, labels: Tensor | None, shift_labels: Tensor | None, loss_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets ``[B, T]`` (0 where none is) and their weights ``[B, T]`` in float32 (0 there).

    Raises:
        ShapeMismatchError, InvalidTokenIdError, InvalidConfigError: see ``causal_lm_loss``.
    """
    targets = shift_labels if shift_labels is not None else labels
    if targets is None or tuple(targets.shape) != tuple(shape):
        got = None if targets is None else tuple(targets.shape)
        raise ShapeMismatchError(
            f"labels must have shape {tuple(shape)} like the states, got {got}", expected=tuple(shape), actual=got
        )
    check_labels(targets, vocab_size)
    weights = torch.ones(targets.shape, device=targets.device)
    if loss_mask is not None:
        weights = checked_loss_mask(loss_mask, targets).to(device=targets.device, dtype=torch.float32)
    if shift_labels is None:
        targets = nn.functional.pad(targets, (0, 1), value=IGNORED_LABEL)[:, 1:]
        weights = nn.functional.pad(weights, (0, 1))[:, 1:]
    is_target = targets != IGNORED_LABEL
    return torch.where(is_target, targets, 0).long(), torch.where(is_target, weights, 0.0)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the weighted losses; see the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, size: int
    ) -> Tensor:
        """Args: hidden ``[N, H]``, weight ``[V, H]``, bias ``[V]``, targets and weights ``[N]``, size of a chunk."""
        wide = compute_dtype(hidden.dtype)
        needs = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if needs[2] and bias is not None else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with no_autocast(hidden):  # the caller has chosen the dtype
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                logits = nn.functional.linear(hidden[part], weight, bias)
                total += cross_entropy_(logits, targets[part], weights[part], with_gradient=any(needs)).sum()
                if d_hidden is not None:
                    d_hidden[part] = logits @ weight
                if d_weight is not None:
                    _add_product(d_weight, logits.T, hidden[part])
                if d_bias is not None:
                    d_bias += logits.sum(dim=0, dtype=wide)
        saved = (d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), d_bias)
        ctx.save_for_backward(*saved)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        scaled = [None if saved is None else saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; on a GPU the product is not rounded in between."""
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
