"""Probabilities of the loop counts low .. high.

With n = high - low + 1 counts and i = count - low,

    fixed              all on high
    uniform            1 / n
    geometric          (1 - c) c^i, and c^(n-1) for the last one
    truncated_normal   in proportion to Phi((count + 1/2 - mu) / std) - Phi((count - 1/2 - mu) / std)
    lognormal_poisson  low + Poisson(lambda), ln lambda ~ Normal(ln(mean - low) - sigma^2 / 2, sigma); the rest on the
                       largest count
    stratified         1 / n; within a window each count occurs its share of times (``sampling``)

and by the profile of a task: shallow is the geometric one, deep its mirror image, medium a normal one around the
middle with a quarter of the range as deviation. The Poisson mixture is integrated over 33 Gauss-Hermite nodes.
Source of lognormal_poisson: Geiping et al. 2025, arXiv 2502.05171, section 3.3.
"""

import math
from collections.abc import Callable

import numpy as np

from cognexis.training.curriculum.settings import CurriculumSettings

Pmf = np.ndarray


def fixed(low: int, high: int, settings: CurriculumSettings) -> Pmf:
    """All on the largest count."""
    return np.eye(high - low + 1)[-1]


def uniform(low: int, high: int, settings: CurriculumSettings) -> Pmf:
    """The same for all."""
    return np.full(high - low + 1, 1.0 / (high - low + 1))


def geometric(low: int, high: int, settings: CurriculumSettings) -> Pmf:
    """Each further loop happens with the continue probability."""
    return _geometric(low, high, settings.continue_probability)


def truncated_normal(low: int, high: int, settings: CurriculumSettings) -> Pmf:
    """A rounded normal distribution, cut at both ends."""
    mean = (low + high) / 2 if settings.mean is None else settings.mean
    return _normal(low, high, mean, settings.std)


def lognormal_poisson(low: int, high: int, settings: CurriculumSettings) -> Pmf:
    """A Poisson distribution whose rate is log-normal; the cap takes what lies above it."""
    top = high if settings.cap is None else min(high, max(settings.cap, low))
    mean = (low + high) / 2 if settings.mean is None else settings.mean
    pmf = np.zeros(high - low + 1)
    if mean <= low or top == low:
        pmf[0] = 1.0
        return pmf
    nodes, weights = np.polynomial.hermite_e.hermegauss(33)
    rates = np.exp(math.log(mean - low) - settings.sigma**2 / 2 + settings.sigma * nodes)
    weights = weights / weights.sum()
    counts = np.arange(top - low)
    log_factorials = np.array([math.lgamma(count + 1) for count in counts])
    below = np.exp(counts[:, None] * np.log(rates) - rates - log_factorials[:, None]) @ weights
    pmf[: top - low] = below
    pmf[top - low] = max(0.0, 1.0 - below.sum())
    return pmf


def _geometric(low: int, high: int, continue_probability: float) -> Pmf:
    powers = continue_probability ** np.arange(high - low + 1)
    return np.append(powers[:-1] * (1.0 - continue_probability), powers[-1])


def _normal(low: int, high: int, mean: float, std: float) -> Pmf:
    edges = (np.arange(low, high + 2) - 0.5 - mean) / (std * math.sqrt(2.0))
    shares = np.diff([math.erf(edge) for edge in edges])
    if shares.sum() < 1e-12:  # the mean lies far outside: the nearest count takes all
        shares = np.zeros(high - low + 1)
        shares[0 if mean < low else -1] = 1.0
    return shares / shares.sum()


PMFS: dict[str, Callable[[int, int, CurriculumSettings], Pmf]] = {
    "fixed": fixed,
    "uniform": uniform,
    "geometric": geometric,
    "truncated_normal": truncated_normal,
    "stratified": uniform,
    "lognormal_poisson": lognormal_poisson,
}
PROFILE_PMFS: dict[str, Callable[[int, int], Pmf]] = {
    "shallow": lambda low, high: _geometric(low, high, 0.5),
    "medium": lambda low, high: _normal(low, high, (low + high) / 2, max(0.5, (high - low) / 4)),
    "deep": lambda low, high: _geometric(low, high, 0.5)[::-1],
}
