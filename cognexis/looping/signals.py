"""What the loops are judged by: change of the state, and sureness and change of the prediction.

States, with h the state of one token after a loop and h' the one before:

    state_norm      ||h||_2
    hidden_delta    ||h - h'||_2
    relative_delta  hidden_delta / (||h'||_2 + eps)
    oscillation     cosine of the last two changes; -1 where the state jumps back and forth

Predictions, with p the probabilities of the next token and p' those before the loop:

    confidence         max p
    margin             largest minus second largest p
    entropy            -sum p ln p, in nats
    prediction_change  KL(p' || p) = sum p' (ln p' - ln p), in nats
    agreement          share of the loops that prefer the same token as the last

All are computed in at least float32. Predictions enter as :func:`log_probabilities`, taken once per loop; a token of
probability 0 (a logit of -inf) contributes 0 to the entropy. NaN stays NaN.

Letters: B batch, T time (tokens), H hidden width, V vocabulary, L loops.
Source: contract SCH-06, VAL-09.
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError

RELATIVE_DELTA_EPS = 1e-6


def state_norm(hidden_states: Tensor) -> Tensor:
    """Norm ``[B, T]`` of states ``[B, T, H]``."""
    return torch.linalg.vector_norm(_wide(hidden_states), dim=-1)


def hidden_delta(current: Tensor, previous: Tensor) -> Tensor:
    """Norm ``[B, T]`` of the change between two states ``[B, T, H]``."""
    return state_norm(_wide(current) - _wide(previous))


def relative_delta(current: Tensor, previous: Tensor, eps: float = RELATIVE_DELTA_EPS) -> Tensor:
    """Norm ``[B, T]`` of the change between two states ``[B, T, H]``, relative to that of ``previous``."""
    return hidden_delta(current, previous) / (state_norm(previous) + eps)


def oscillation(current: Tensor, previous: Tensor, before_previous: Tensor) -> Tensor:
    """Cosine ``[B, T]`` between the changes that lead through three successive states ``[B, T, H]``.

    It is 0 where one of the changes is 0.
    """
    first = _wide(previous) - _wide(before_previous)
    second = _wide(current) - _wide(previous)
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax of ``logits`` over the last axis, in at least float32."""
    return torch.log_softmax(_wide(logits), dim=-1)


def confidence(log_probs: Tensor) -> Tensor:
    """Probability ``[...]`` of the most likely token, from log-probabilities ``[..., V]``."""
    return log_probs.amax(-1).exp()


def margin(log_probs: Tensor) -> Tensor:
    """Probability ``[...]`` by which the most likely token leads, from log-probabilities ``[..., V]``, V above 1."""
    first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
    return first - second


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy ``[...]`` in nats, from log-probabilities ``[..., V]``."""
    finite = log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
    return -(log_probs.exp() * finite).sum(-1)


def prediction_change(previous_log_probs: Tensor | None, log_probs: Tensor) -> Tensor:
    """KL divergence ``[...]`` in nats from the earlier to the later log-probabilities, both ``[..., V]``.

    Infinite without an earlier prediction, and where a token was possible and is so no more. Rounding below 0 is cut
    off.
    """
    if previous_log_probs is None:
        return torch.full_like(log_probs[..., 0], torch.inf)
    before = previous_log_probs.exp()
    terms = before * (previous_log_probs - log_probs)
    return torch.where(before == 0, 0.0, terms).sum(-1).clamp_min(0)


def agreement(predictions: Tensor) -> Tensor:
    """Share ``[...]`` of the loops whose most likely token is that of the last loop, from token ids ``[L, ...]``."""
    return (predictions == predictions[-1]).to(torch.float32).mean(0)


def row_maximum(values: Tensor, is_real: Tensor | None = None) -> Tensor:
    """Largest value ``[B]`` of each row over its real tokens.

    A row reduced this way halts only when all its tokens would, for rules that halt below a threshold; where a rule
    halts above one, as with confidence, take ``-row_maximum(-values, is_real)``.

    Args:
        values: ``[B, T]``.
        is_real: ``[B, T]``, False at padding; None: no padding.

    Returns:
        -inf in a row of padding only; NaN where a real token is NaN.

    Raises:
        ShapeMismatchError: ``is_real`` has another shape.
    """
    if is_real is None:
        return values.amax(-1)
    if is_real.shape != values.shape:
        expected, actual = tuple(values.shape), tuple(is_real.shape)
        raise ShapeMismatchError(
            f"is_real: must have the shape {expected}, got {actual}", expected=expected, actual=actual
        )
    return values.masked_fill(~is_real.to(torch.bool), -torch.inf).amax(-1)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
