"""Likelihood of text: what a language model pays per token, and per byte.

    negative_log_likelihood = mean over tokens of -log softmax(logits)[target]     nats per token
    perplexity              = exp(negative_log_likelihood)
    bits_per_byte           = total nats / (ln 2 * bytes of the text)              comparable between tokenizers

Logits are ``[..., V]`` and already aligned: the logits of a position belong to its target. Targets of ``ignore_index``
do not count. The sum is taken in float64.
"""

import math

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError, InvalidTokenIdError, NonFiniteError, ShapeMismatchError

IGNORE_INDEX = -100


def token_losses(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Nats of every counted token, ``[n]`` in float64.

    Raises:
        ShapeMismatchError: ``targets`` do not have the shape of ``logits`` without its last axis.
        InvalidConfigError: no target counts.
        InvalidTokenIdError: a target lies outside the vocabulary.
        NonFiniteError: a counted logit is NaN, or a loss is not finite.
    """
    if targets.shape != logits.shape[:-1]:
        raise ShapeMismatchError(
            f"targets have the shape {list(targets.shape)}: must be {list(logits.shape[:-1])}, one per row of logits",
            expected=tuple(logits.shape[:-1]),
            actual=tuple(targets.shape),
        )
    counted = targets != ignore_index
    if not counted.any():
        raise InvalidConfigError(f"targets: none of {targets.numel()} counts; a likelihood needs one or more tokens")
    rows, wanted = logits[counted].double(), targets[counted].long()
    outside = (wanted < 0) | (wanted >= logits.shape[-1])
    if outside.any():
        wrong = int(wanted[outside][0])
        raise InvalidTokenIdError(f"targets: id {wrong} must be 0 to {logits.shape[-1] - 1}", token_id=wrong)
    losses = torch.nn.functional.cross_entropy(rows, wanted, reduction="none")
    if not losses.isfinite().all():
        raise NonFiniteError(f"logits: {int((~losses.isfinite()).sum())} of {len(losses)} tokens have no finite loss")
    return losses


def negative_log_likelihood(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> float:
    """Mean nats per counted token; raises what ``token_losses`` raises."""
    return float(token_losses(logits, targets, ignore_index).mean())


def perplexity(negative_log_likelihood: float) -> float:
    """exp of the mean nats per token.

    Raises:
        InvalidConfigError: the loss is negative, not finite, or too large for a float.
    """
    if not 0 <= negative_log_likelihood <= 709:
        raise InvalidConfigError(f"negative_log_likelihood={negative_log_likelihood!r}: must be 0 to 709 nats")
    return math.exp(negative_log_likelihood)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits per byte of the text that cost ``total_nats``.

    Raises:
        InvalidConfigError: no bytes, or nats that are negative or not finite.
    """
    if num_bytes < 1:
        raise InvalidConfigError(f"num_bytes={num_bytes!r}: must be 1 or more")
    if not (math.isfinite(total_nats) and total_nats >= 0):
        raise InvalidConfigError(f"total_nats={total_nats!r}: must be a finite number of 0 or more")
    return total_nats / (math.log(2) * num_bytes)
