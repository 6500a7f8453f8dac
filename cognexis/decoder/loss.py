"""Next-token cross-entropy.

    loss = sum_t w_t * -log softmax(logits_t)[label_{t+1}] / sum_t w_t

over the positions whose label is not -100; w is 1 or the given loss mask. With ``num_items_in_batch`` (gradient
accumulation) the sum is divided by that number instead. A batch without any target gives a zero that still has a
graph. Computed in at least float32 through log-sum-exp, so large logits stay finite.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cognexis.decoder.norm import compute_dtype
from cognexis.errors import InvalidConfigError, InvalidTokenIdError, ShapeMismatchError

IGNORED_LABEL = -100


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mean next-token loss.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, the token ids themselves (they are shifted here); -100 takes a position out.
        vocab_size: V; larger labels are errors.
        num_items_in_batch: number of targets over all accumulated batches, or None for the mean of this one.
        shift_labels: ``[B, T]``, already shifted; then ``labels`` is not read.
        loss_mask: ``[B, T]``, a weight of 0 or more for each label.

    Raises:
        ShapeMismatchError: a shape differs from that of the labels.
        InvalidTokenIdError: a label outside the vocabulary other than -100 (checked for labels in host memory).
        InvalidConfigError: a loss mask with negative or NaN weights (in host memory).
    """
    targets = shift_labels if shift_labels is not None else labels
    if targets is None or tuple(targets.shape) != tuple(logits.shape[:2]):
        got = None if targets is None else tuple(targets.shape)
        raise ShapeMismatchError(
            f"labels must have shape {tuple(logits.shape[:2])} like the logits, got {got}",
            expected=tuple(logits.shape[:2]),
            actual=got,
        )
    check_labels(targets, vocab_size)
    weights = None if loss_mask is None else checked_loss_mask(loss_mask, targets)
    if shift_labels is None:
        targets = nn.functional.pad(targets, (0, 1), value=IGNORED_LABEL)[:, 1:]
        weights = None if weights is None else nn.functional.pad(weights, (0, 1))[:, 1:]
    targets = targets.to(logits.device)
    if weights is not None:
        targets = targets.masked_fill(weights.to(targets.device) == 0, IGNORED_LABEL)
    losses = nn.functional.cross_entropy(
        logits.to(compute_dtype(logits.dtype)).flatten(0, 1),
        targets.flatten().long(),
        ignore_index=IGNORED_LABEL,
        reduction="none" if weights is not None else "sum",
    )
    active = targets.flatten() != IGNORED_LABEL
    if weights is not None:
        row_weights = weights.to(device=losses.device, dtype=losses.dtype).flatten() * active
        total, count = (losses * row_weights).sum(), row_weights.sum()
    else:
        total, count = losses, active.sum()
    if num_items_in_batch is not None:
        count = torch.as_tensor(num_items_in_batch, device=total.device)
    return total / torch.where(count > 0, count, 1)


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise if a label in host memory is neither -100 nor in [0, ``vocab_size``)."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or labels.numel() == 0:
        return
    bad = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab_size))]
    if bad.numel():
        raise InvalidTokenIdError(
            f"labels: id {int(bad[0])} is neither {IGNORED_LABEL} nor in the vocabulary, 0 to {vocab_size - 1}",
            token_id=int(bad[0]),
        )


def checked_loss_mask(loss_mask: Tensor, labels: Tensor) -> Tensor:
    """Return ``loss_mask`` if it fits ``labels`` ``[B, T]`` and holds finite weights of 0 or more."""
    if tuple(loss_mask.shape) != tuple(labels.shape):
        raise ShapeMismatchError(
            f"loss_mask must have shape {tuple(labels.shape)} like the labels, got {tuple(loss_mask.shape)}",
            expected=tuple(labels.shape),
            actual=tuple(loss_mask.shape),
        )
    on_host = loss_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not bool((torch.isfinite(loss_mask) & (loss_mask >= 0)).all()):
        raise InvalidConfigError("loss_mask: weights must be finite and 0 or more", path="loss_mask")
    return loss_mask
