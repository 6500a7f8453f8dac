"""The settings of a loop curriculum, and their rules.

1 <= min_loops <= initial_max_loops <= target_max_loops <= architecture_max_loops
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cognexis.configuration_rules import config_error, nearest_name
from cognexis.errors import ConfigFault

MODES = ("fixed", "ramp_then_sample")
RAMPS = ("linear", "cosine", "exponential", "milestone")
DISTRIBUTIONS = ("fixed", "uniform", "geometric", "truncated_normal", "stratified", "lognormal_poisson")
PROFILES = ("shallow", "medium", "deep")
TASK_PROFILES = {
    "classification": "shallow",
    "summarisation": "medium",
    "summarization": "medium",
    "math": "deep",
    "code": "deep",
}


@dataclass(frozen=True)
class CurriculumSettings:
    """Which loop counts a step may draw, and how; the names are those of ``training.loop_curriculum``.

    Raises:
        InvalidConfigError: lists every broken rule.
    """

    target_max_loops: int = 8
    """Maximum after the ramp."""
    initial_max_loops: int = 2
    """Maximum during the warm-up."""
    min_loops: int = 1
    """Smallest count that is drawn."""
    architecture_max_loops: int | None = None
    """Largest count that the model allows; None: the target."""
    mode: str = "ramp_then_sample"
    """"fixed": every step runs the target; otherwise the maximum grows and counts are drawn below it."""
    warmup_steps: int = 0
    """Optimizer steps at the initial maximum."""
    ramp_steps: int = 0
    """Optimizer steps from the initial to the target maximum; 0: at once."""
    ramp: str = "linear"
    exponential_base: float = 64.0
    """B of the exponential ramp, above 1."""
    milestones: Mapping[int, int] = field(default_factory=dict, hash=False)
    """Optimizer step -> maximum, for the milestone ramp; both ascend."""
    sampling_distribution: str = "geometric"
    continue_probability: float = 0.5
    """Of the geometric distribution, between 0 and 1."""
    mean: float | None = None
    """Of truncated_normal and lognormal_poisson; None: half-way between the minimum and the current maximum."""
    std: float = 1.0
    """Of truncated_normal, above 0."""
    sigma: float = 0.5
    """Of lognormal_poisson, above 0."""
    cap: int | None = None
    """Largest count of lognormal_poisson; None: the current maximum, which bounds it in any case."""
    window: int = 100
    """Steps in which stratified meets every depth its share of times."""
    high_depth_fraction: float = 0.0
    """Share of steps between the current maximum and the target, 0 to 1."""
    task_profiles: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Tag of a batch -> "shallow", "medium" or "deep"; other tags use the distribution above."""
    lower_on_nonfinite: bool = False
    """A depth at which the state became NaN or infinite lowers the maximum to the depth below it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", {int(step): int(n) for step, n in dict(self.milestones).items()})
        object.__setattr__(self, "task_profiles", dict(self.task_profiles))
        if faults := [*self._choice_faults(), *self._number_faults(), *self._order_faults()]:
            raise config_error(faults)

    @property
    def ceiling(self) -> int:
        """Largest count that can ever be drawn."""
        return self.target_max_loops

    def document(self) -> dict[str, Any]:
        """The settings as JSON data."""
        return {**asdict(self), "milestones": {str(step): n for step, n in self.milestones.items()}}

    @classmethod
    def from_section(cls, section: Any, architecture_max_loops: int) -> "CurriculumSettings":
        """The settings of a resolved ``training.loop_curriculum``.

        Args:
            architecture_max_loops: ``trained_max_loops`` of the model.
        """
        shared = {name: getattr(section, name) for name in cls.__dataclass_fields__ if hasattr(section, name)}
        return cls(**shared, architecture_max_loops=architecture_max_loops)

    def _choice_faults(self) -> list[ConfigFault]:
        choices = {"mode": MODES, "ramp": RAMPS, "sampling_distribution": DISTRIBUTIONS}
        faults = [
            ConfigFault(name, value, f"must be one of {', '.join(allowed)}{nearest_name(str(value), allowed)}")
            for name, allowed in choices.items()
            if (value := getattr(self, name)) not in allowed
        ]
        return faults + [
            ConfigFault(f"task_profiles[{tag!r}]", profile, f"must be one of {', '.join(PROFILES)}")
            for tag, profile in self.task_profiles.items()
            if profile not in PROFILES
        ]

    def _number_faults(self) -> list[ConfigFault]:
        rules = {
            "warmup_steps": (_is_count(self.warmup_steps, 0), "must be a whole number of 0 or more"),
            "ramp_steps": (_is_count(self.ramp_steps, 0), "must be a whole number of 0 or more"),
            "window": (_is_count(self.window, 1), "must be a whole number of 1 or more"),
            "exponential_base": (1 < self.exponential_base < math.inf, "must be finite and above 1"),
            "continue_probability": (0 < self.continue_probability < 1, "must lie between 0 and 1"),
            "std": (0 < self.std < math.inf, "must be finite and positive"),
            "sigma": (0 < self.sigma < math.inf, "must be finite and positive"),
            "mean": (self.mean is None or 0 < self.mean < math.inf, "must be finite and positive"),
            "high_depth_fraction": (0 <= self.high_depth_fraction <= 1, "must lie in [0, 1]"),
        }
        return [ConfigFault(name, getattr(self, name), why) for name, (is_valid, why) in rules.items() if not is_valid]

    def _order_faults(self) -> list[ConfigFault]:
        bounds = {name: getattr(self, name) for name in ("min_loops", "initial_max_loops", "target_max_loops")}
        faults = [
            ConfigFault(name, value, "must be a whole number of 1 or more")
            for name, value in bounds.items()
            if not _is_count(value, 1)
        ]
        if faults:
            return faults
        pairs = [("min_loops", "initial_max_loops"), ("initial_max_loops", "target_max_loops")]
        if self.mode == "fixed":
            pairs = [("min_loops", "target_max_loops")]
        for low, high in pairs:
            if bounds[low] > bounds[high]:
                faults.append(ConfigFault(low, bounds[low], f"must not exceed {high}={bounds[high]}"))
        most = self.architecture_max_loops
        if most is not None and self.target_max_loops > most:
            faults.append(ConfigFault("target_max_loops", self.target_max_loops, f"the model allows at most {most}"))
        if self.cap is not None and not _is_count(self.cap, self.min_loops):
            faults.append(ConfigFault("cap", self.cap, f"must be at least min_loops={self.min_loops}"))
        return faults + self._milestone_faults()

    def _milestone_faults(self) -> list[ConfigFault]:
        shown = dict(self.milestones)
        if bool(shown) != (self.ramp == "milestone"):
            return [ConfigFault("milestones", shown, "goes with ramp='milestone' and only with it")]
        counts = [shown[step] for step in sorted(shown)]
        if counts != sorted(counts) or any(step < 0 for step in shown):
            return [ConfigFault("milestones", shown, "steps and loop counts must ascend from 0")]
        if counts and not self.min_loops <= counts[0] <= counts[-1] <= self.target_max_loops:
            bounds = f"min_loops={self.min_loops} and target_max_loops={self.target_max_loops}"
            return [ConfigFault("milestones", shown, f"loop counts must lie between {bounds}")]
        return []


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
