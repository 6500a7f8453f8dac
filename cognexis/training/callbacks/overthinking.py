"""Signs that a model thinks too long, read from its states and predictions loop by loop.

    metric_drop      first depth whose metric is worse than the one before it by more than a tolerance
    oscillation      mean cosine of successive changes of the state below a limit: it jumps back and forth
    repetition       share of adjacent loops whose predictions equal those of two loops before but not one before
    overconfidence   confidence rises while the loss of the same positions rises too

Letters: L loops; leading axes are free.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.looping.signals import oscillation


@dataclass(frozen=True)
class OverthinkingSigns:
    """What was found.

    Attributes:
        first_harmful_depth: loops of the metric drop; None without one.
        oscillation: mean cosine of successive changes, from -1; NaN with fewer than three states.
        oscillates: whether it lies below the limit.
        repetition: share of predictions that go back and forth, 0 to 1.
        overconfidence: share of loops at which confidence and loss rose together, 0 to 1.
    """

    first_harmful_depth: int | None
    oscillation: float
    oscillates: bool
    repetition: float
    overconfidence: float


@torch.no_grad()
def overthinking_signs(
    states: list[Tensor],
    losses: Tensor,
    confidences: Tensor | None = None,
    predictions: Tensor | None = None,
    *,
    tolerance: float = 0.0,
    oscillation_limit: float = -0.5,
) -> OverthinkingSigns:
    """Look for the signs of the module docstring.

    Args:
        states: ``[B, T, H]`` after loops 1 .. L.
        losses: ``[L]``, the metric at each depth; lower is better.
        confidences: ``[L]``, mean largest probability.
        predictions: ``[..., L]`` ids.
        tolerance: rise of the loss that does not count.
        oscillation_limit: mean cosine below which the state oscillates.

    Raises:
        ShapeMismatchError: the arguments speak of different numbers of loops.
    """
    loops = losses.shape[-1]
    for name, count in (
        ("states", len(states)),
        ("confidences", loops if confidences is None else confidences.shape[-1]),
        ("predictions", loops if predictions is None else predictions.shape[-1]),
    ):
        if count != loops:
            raise ShapeMismatchError(f"{name}: {count} loops, losses has {loops}", expected=loops, actual=count)
    rises = torch.diff(losses) > tolerance
    harmful = rises.nonzero().flatten()
    triples = zip(states[2:], states[1:-1], states[:-2], strict=True)
    cosines = [oscillation(*triple).mean() for triple in triples]
    mean = torch.stack(cosines).mean().item() if cosines else float("nan")
    repetition = overconfidence = 0.0
    if predictions is not None and loops > 2:
        back = (predictions[..., 2:] == predictions[..., :-2]) & (predictions[..., 2:] != predictions[..., 1:-1])
        repetition = back.float().mean().item()
    if confidences is not None and loops > 1:
        overconfidence = ((torch.diff(confidences) > 0) & rises).float().mean().item()
    first = int(harmful[0]) + 2 if len(harmful) else None
    return OverthinkingSigns(first, mean, mean < oscillation_limit, repetition, overconfidence)
