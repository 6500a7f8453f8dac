"""Losses of the learned halting signal.

    value       mean over real slots of huber(prediction - gain): e^2 / 2, or delta (|e| - delta / 2) where |e| > delta
    continue    mean binary cross-entropy of the logit against [gain > threshold]
    combined    L_lm + lambda_value L_value + lambda_continue L_continue
    halting     mean over slots of sum_{i >= min_loops} prod_{min_loops <= j <= i} p_j, the loops expected beyond the
                minimum when p_j is the probability to continue after loop j
    calibration mean over loops of (mean prediction - mean gain)^2
    consistency mean over real positions of ||h_early - h_full||^2 / ||h_full||^2, h_full without gradient

The head reads detached states unless told otherwise, so that predicting gains does not bend the trunk. The halting
penalty is there for ablations and its weight is 0 everywhere: trained with it, heads collapse to the smallest depth.
Masks are bool, True at slots that count; with none that counts a loss is 0 and still has a graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cognexis.errors import InvalidConfigError
from cognexis.looping.value_head import ValueHead


def huber_value_loss(predictions: Tensor, gains: Tensor, delta: float = 0.1, mask: Tensor | None = None) -> Tensor:
    """Mean Huber loss of predictions against measured gains of the same shape.

    Args:
        delta: error in nats beyond which the loss grows linearly, above 0.
    """
    if not 0 < delta < float("inf"):
        raise InvalidConfigError(f"delta={delta!r}: must be finite and positive", path="delta", value=delta)
    return masked_mean(nn.functional.huber_loss(predictions, gains, reduction="none", delta=delta), mask)


def continue_loss(logits: Tensor, gains: Tensor, threshold: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of ``logits`` against whether the gain of the same slot exceeds ``threshold``."""
    is_worth_it = (gains > threshold).to(logits.dtype)
    return masked_mean(nn.functional.binary_cross_entropy_with_logits(logits, is_worth_it, reduction="none"), mask)


def combined_loss(
    lm_loss: Tensor, value_loss: Any, continuing_loss: Any, *, lambda_value: float, lambda_continue: float
) -> Tensor:
    """The loss of the language model with those of the head beside it."""
    return lm_loss + lambda_value * value_loss + lambda_continue * continuing_loss


def head_values(
    head: ValueHead,
    states: list[Tensor],
    mask: Tensor | None = None,
    features: list[dict[str, Tensor]] | None = None,
    *,
    is_detached: bool = True,
) -> Tensor:
    """Uncalibrated values after each of the ``states`` of loops 1, 2, ...: ``[B, T, L]``, or ``[B, L]`` by sequence.

    Args:
        states: ``[B, T, H]`` each.
        mask: ``[B, T]`` bool, True at real tokens.
        features: signals by name for each loop.
        is_detached: send no gradient into the states.
    """
    values = []
    for index, state in enumerate(states):
        signals = features[index] if features is not None else None
        values.append(head(state.detach() if is_detached else state, index + 1, mask, signals))
    return torch.stack(values, dim=-1)


def halting_penalty(continue_probs: Tensor, min_loops: int = 1, mask: Tensor | None = None) -> Tensor:
    """Mean number of loops beyond ``min_loops`` that probabilities ``[..., L]`` to continue lead to."""
    if not 1 <= min_loops <= continue_probs.shape[-1]:
        raise InvalidConfigError(
            f"min_loops={min_loops}: must lie between 1 and {continue_probs.shape[-1]}", path="min_loops"
        )
    return masked_mean(continue_probs[..., min_loops - 1 :].cumprod(dim=-1).sum(dim=-1), mask)


def calibration_loss(predictions: Tensor, gains: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over loops of the squared bias of predictions ``[..., L]``; ``mask`` has their shape."""
    by_loop = (predictions - gains).flatten(end_dim=-2) if predictions.ndim > 1 else (predictions - gains)[None]
    keep = torch.ones_like(by_loop, dtype=torch.bool) if mask is None else mask.reshape(by_loop.shape)
    bias = torch.where(keep, by_loop, 0).sum(dim=0) / keep.sum(dim=0).clamp(min=1)
    return bias.square().mean()


def consistency_loss(early: Tensor, full: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean relative squared distance between states ``[B, T, H]`` that halted early and those of full depth."""
    full = full.detach()
    size = full.square().sum(dim=-1).clamp(min=torch.finfo(full.dtype).tiny)
    return masked_mean((early - full).square().sum(dim=-1) / size, mask)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` where ``mask`` of the same shape is True; 0 where it nowhere is."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
