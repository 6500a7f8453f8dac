"""Draws that are functions of (seed, step) and of nothing else.

Random numbers come from the counter-based generator Philox with the seed and the purpose as key and the step as
counter, so every process computes the same ones, in any order, without a state that could be lost.
Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from functools import lru_cache

import numpy as np

from cognexis.training.curriculum.distributions import PMFS, PROFILE_PMFS
from cognexis.training.curriculum.ramps import maximum_at
from cognexis.training.curriculum.settings import CurriculumSettings

_HIGH, _DEPTH, _ORDER, _EARLY = range(4)  # purposes


def random_stream(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Random numbers that belong to one purpose at one counter; both are below 2**64."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, counter, 0, 0]))


def draw_loops(settings: CurriculumSettings, seed: int, step: int, ceiling: int, tag: str | None = None) -> int:
    """The loop count of an optimizer step.

    Args:
        ceiling: no larger count is drawn; at least ``min_loops``.
        tag: what the batch is about; see ``CurriculumSettings.task_profiles``.
    """
    low, target = settings.min_loops, min(settings.target_max_loops, ceiling)
    high = min(maximum_at(settings, step), ceiling)
    if settings.mode == "fixed":
        return high
    chance, place = random_stream(seed, _HIGH, step).random(2)
    if high < target and chance < settings.high_depth_fraction:
        return high + 1 + int(place * (target - high))
    if (profile := settings.task_profiles.get(tag or "")) is not None:
        return low + _inverse(_profile_cumulative(profile, low, high), seed, step)
    if settings.sampling_distribution == "stratified":
        return min(stratified_loops(settings, seed, step), high)
    return low + _inverse(_cumulative(low, high, settings), seed, step)


def _inverse(cumulative: np.ndarray, seed: int, step: int) -> int:
    """The place whose share of [0, 1) holds this step's random number."""
    point = random_stream(seed, _DEPTH, step).random() * cumulative[-1]
    return int(np.searchsorted(cumulative, point, side="right"))


@lru_cache(maxsize=256)
def _cumulative(low: int, high: int, settings: CurriculumSettings) -> np.ndarray:
    return np.cumsum(PMFS[settings.sampling_distribution](low, high, settings))


@lru_cache(maxsize=256)
def _profile_cumulative(profile: str, low: int, high: int) -> np.ndarray:
    return np.cumsum(PROFILE_PMFS[profile](low, high))


def stratified_loops(settings: CurriculumSettings, seed: int, step: int) -> int:
    """The entry of this step in its window: all counts up to the maximum at the window's start, equally often.

    Where the window is no multiple of their number, the remaining entries go to other counts in each window.
    """
    window, place = divmod(step, settings.window)
    low, high = settings.min_loops, maximum_at(settings, window * settings.window)
    counts = np.arange(settings.window) % (high - low + 1)
    counts = (counts + window * settings.window) % (high - low + 1)
    order = random_stream(seed, _ORDER, window).permutation(settings.window)
    return low + int(counts[order[place]])


def early_loop(seed: int, step: int, num_loops: int) -> int:
    """A loop before the last one, all equally likely; 1 where there is only one."""
    return 1 + int(random_stream(seed, _EARLY, step).random() * max(1, num_loops - 1))
