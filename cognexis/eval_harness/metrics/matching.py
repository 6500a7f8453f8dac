"""Right or wrong: accuracy, exact match and multiple choice.

Each function scores one example with 1.0 or 0.0; ``mean_score`` is the metric of a data set. Keep the single scores:
confidence intervals are drawn from them.
"""

import math
from collections.abc import Hashable, Sequence

from cognexis.errors import InvalidConfigError


def mean_score(scores: Sequence[float]) -> float:
    """Mean of ``[n]`` scores.

    Raises:
        InvalidConfigError: no scores, or one that is not finite.
    """
    if not scores:
        raise InvalidConfigError("scores: none given; a mean needs one or more examples")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise InvalidConfigError(f"scores[{index}]={score!r}: must be a finite number")
    return math.fsum(scores) / len(scores)


def accuracy(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """Share of predictions that equal their reference.

    Raises:
        InvalidConfigError: none given, or different numbers of both.
    """
    if len(predictions) != len(references):
        raise InvalidConfigError(
            f"predictions and references have {len(predictions)} and {len(references)} entries: must be equal"
        )
    return mean_score([float(got == want) for got, want in zip(predictions, references, strict=True)])


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both texts are equal without the white space around them."""
    return float(prediction.strip() == reference.strip())


def multiple_choice(scores: Sequence[float], answer: int) -> float:
    """1.0 if the right choice has the highest score; of equal scores the lowest index is chosen.

    Args:
        scores: ``[choices]``, such as summed or length-normalised log-likelihoods.
        answer: index of the right choice, from 0.

    Raises:
        InvalidConfigError: no choices, an index outside, or a score that is NaN.
    """
    if not 0 <= answer < len(scores):
        raise InvalidConfigError(f"answer={answer!r}: must be 0 to {len(scores) - 1}, one of {len(scores)} choices")
    for index, score in enumerate(scores):
        if math.isnan(score):
            raise InvalidConfigError(f"scores[{index}]={score!r}: must be a number")
    return float(max(range(len(scores)), key=lambda index: (scores[index], -index)) == answer)


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two scores."""
    count = len(scores)
    if count < 2:
        return None
    mean = math.fsum(scores) / count
    return math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1) / count)
