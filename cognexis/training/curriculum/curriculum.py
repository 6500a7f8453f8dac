"""The loop curriculum of a training run: what to run at a step, what was run, and its state in a checkpoint.

A draw follows from (seed, step), so the state carries no generator. What it does carry is remembered, not needed to
draw: the histogram, the draws of the current stratification window, and a ceiling that non-finite states lowered. That
ceiling is the one part of the state which changes later draws.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.training.curriculum.ramps import maximum_at, ramp_progress
from cognexis.training.curriculum.sampling import draw_loops
from cognexis.training.curriculum.settings import CurriculumSettings

STATE_VERSION = 1


@dataclass(frozen=True)
class LoopSample:
    """What one optimizer step runs: ``min_loops <= sampled_loops <= max_loops``.

    Attributes:
        min_loops: lower bound of the step.
        max_loops: upper bound; covers a draw beyond the current maximum.
        sampled_loops: loops to run.
        retain_intermediate: losses of earlier loops are wanted too.
    """

    min_loops: int
    max_loops: int
    sampled_loops: int
    retain_intermediate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.min_loops <= self.sampled_loops <= self.max_loops:
            raise InvalidConfigError(
                f"sampled_loops={self.sampled_loops}: must lie between min_loops={self.min_loops} (at least 1) and "
                f"max_loops={self.max_loops}",
                path="sampled_loops",
                value=self.sampled_loops,
            )


class LoopCurriculum:
    """Draws loop counts and keeps the books.

    Args:
        settings: bounds and distribution.
        seed: of the draws, below 2**64.
        retain_intermediate: copied into each sample.
    """

    def __init__(self, settings: CurriculumSettings, seed: int = 0, retain_intermediate: bool = False) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise InvalidConfigError(f"seed={seed!r}: must be in [0, 2**64)", path="seed", value=seed)
        self.settings = settings
        self.seed = seed
        self.retain_intermediate = retain_intermediate
        self.draws = 0
        self.last_step: int | None = None
        self.ceiling = settings.ceiling
        self.histogram: Counter[int] = Counter()
        self.window_counts: Counter[int] = Counter()

    def current_max(self, step: int) -> int:
        """Largest count of the distribution at ``step``."""
        return min(maximum_at(self.settings, step), self.ceiling)

    def sample(self, step: int, tag: str | None = None) -> LoopSample:
        """What ``step`` runs; asking changes nothing.

        Args:
            tag: what the batch is about; the same on every process.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InvalidConfigError(f"step={step!r}: must be a whole number of 0 or more", path="step", value=step)
        loops = draw_loops(self.settings, self.seed, step, self.ceiling, tag)
        most = max(self.current_max(step), loops)
        return LoopSample(self.settings.min_loops, most, loops, self.retain_intermediate)

    def record(self, step: int, loops: int) -> None:
        """Note that the optimizer step ``step`` ran ``loops`` loops."""
        window = self.settings.window
        if self.last_step is None or step // window != self.last_step // window:
            self.window_counts.clear()
        self.draws += 1
        self.last_step = step
        self.histogram[loops] += 1
        self.window_counts[loops] += 1

    def lower_below(self, loops: int) -> bool:
        """Draw only counts below ``loops`` from now on; False where the minimum does not allow it."""
        lowered = max(self.settings.min_loops, loops - 1)
        changed = lowered < self.ceiling
        self.ceiling = min(self.ceiling, lowered)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON data."""
        step = 0 if self.last_step is None else self.last_step
        return {
            "schema_version": STATE_VERSION,
            "settings": self.settings.document(),
            "seed": self.seed,
            "draws": self.draws,
            "last_step": self.last_step,
            "current_max": self.current_max(step),
            "ramp_progress": ramp_progress(self.settings, step),
            "ceiling": self.ceiling,
            "histogram": _plain(self.histogram),
            "window_counts": _plain(self.window_counts),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_other_settings: bool = False) -> None:
        """Take over a state; nothing is changed when it is refused.

        Args:
            allow_other_settings: accept a state of another seed or other settings.

        Raises:
            InvalidConfigError: the state is damaged, lies outside the bounds, or belongs to other settings.
        """
        values = _checked(state, self.settings)
        if not allow_other_settings and (differences := self.differences(state)):
            listed = "; ".join(f"{name}: saved {old!r}, now {new!r}" for name, (old, new) in differences.items())
            raise InvalidConfigError(f"curriculum: the state belongs to other settings: {listed}", path="curriculum")
        self.draws, self.last_step, self.ceiling = values["draws"], values["last_step"], values["ceiling"]
        self.histogram, self.window_counts = values["histogram"], values["window_counts"]

    def differences(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings in which a state differs from this curriculum: name -> (saved, now)."""
        now = {"seed": self.seed, **self.settings.document()}
        saved = {"seed": state.get("seed"), **state.get("settings", {})}
        return {name: (saved.get(name), now[name]) for name in now if saved.get(name) != now[name]}


def _plain(counts: Counter[int]) -> dict[str, int]:
    return {str(loops): counts[loops] for loops in sorted(counts)}


def _checked(state: Any, settings: CurriculumSettings) -> dict[str, Any]:
    def refuse(name: str, value: Any, reason: str) -> InvalidConfigError:
        return InvalidConfigError(f"curriculum.{name}={value!r}: {reason}", path=f"curriculum.{name}", value=value)

    version = state.get("schema_version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise refuse("schema_version", version, f"must be {STATE_VERSION}")
    draws, last_step, ceiling = state.get("draws"), state.get("last_step"), state.get("ceiling")
    if type(draws) is not int or draws < 0:
        raise refuse("draws", draws, "must be a count")
    if last_step is not None and (type(last_step) is not int or last_step < 0):
        raise refuse("last_step", last_step, "must be an optimizer step or null")
    low, high = settings.min_loops, settings.ceiling
    if type(ceiling) is not int or not low <= ceiling <= high:
        raise refuse("ceiling", ceiling, f"must lie between {low} and {high}")
    counters = {}
    for name in ("histogram", "window_counts"):
        counts = state.get(name)
        if not isinstance(counts, dict) or not all(
            str(key).isdecimal() and type(value) is int and value > 0 for key, value in counts.items()
        ):
            raise refuse(name, counts, "must map loop counts to numbers of steps")
        counters[name] = Counter({int(loops): steps for loops, steps in counts.items()})
        if outside := sorted(loops for loops in counters[name] if not low <= loops <= high):
            raise refuse(name, outside, f"loop counts must lie between {low} and {high}")
    if sum(counters["histogram"].values()) != draws:
        raise refuse("draws", draws, f"the histogram holds {sum(counters['histogram'].values())} draws")
    return {"draws": draws, "last_step": last_step, "ceiling": ceiling, **counters}
