"""The phases in which a scheduler is learned.

    sample_depths -> collect_traces -> fit_scheduler -> adaptive_fine_tune -> validate

Each phase needs what the one before produced: traces need a model that ran at several depths, fitting needs traces,
and adaptive halting needs a head that was fitted and calibrated. Going back is always allowed and throws away what the
later phases produced.
"""

from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError

PHASES = ("sample_depths", "collect_traces", "fit_scheduler", "adaptive_fine_tune", "validate")
# What a phase must leave behind before the next one may start.
_PRODUCTS = {
    "sample_depths": "steps at two depths or more",
    "collect_traces": "traces",
    "fit_scheduler": "a fitted and calibrated head",
    "adaptive_fine_tune": "a fine-tuned model",
}


class SchedulerPhases:
    """Where the learning of a scheduler stands."""

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self.completed: set[str] = set()

    def complete(self) -> None:
        """Note that the current phase has produced what the next one needs."""
        self.completed.add(self.phase)

    def enter(self, phase: str) -> None:
        """Go to ``phase``.

        Raises:
            InvalidConfigError: there is no such phase, or a phase before it is not complete.
        """
        if phase not in PHASES:
            reason = f"must be one of {', '.join(PHASES)}{nearest_name(str(phase), PHASES)}"
            raise InvalidConfigError(f"phase={phase!r}: {reason}", path="phase", value=phase, reason=reason)
        place = PHASES.index(phase)
        for earlier in PHASES[:place]:
            if earlier not in self.completed:
                reason = f"{earlier} must leave {_PRODUCTS[earlier]} first"
                raise InvalidConfigError(f"phase={phase!r}: {reason}", path="phase", value=phase, reason=reason)
        self.completed -= set(PHASES[place:])
        self.phase = phase

    @property
    def halts_adaptively(self) -> bool:
        """Whether training and evaluation of this phase may stop tokens early."""
        return PHASES.index(self.phase) >= PHASES.index("adaptive_fine_tune")

    def state_dict(self) -> dict[str, Any]:
        """The phase and what is complete, as JSON data."""
        return {"phase": self.phase, "completed": [phase for phase in PHASES if phase in self.completed]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            InvalidConfigError: it names an unknown phase, or one whose predecessors are not complete.
        """
        completed, phase = state.get("completed"), state.get("phase")
        if not isinstance(completed, list) or not set(completed) <= set(PHASES):
            raise InvalidConfigError(f"completed={completed!r}: must list phases", path="completed", value=completed)
        checked = SchedulerPhases()
        checked.completed = set(completed)
        checked.enter(str(phase))
        self.phase, self.completed = checked.phase, set(completed)
