"""The order in which a scheduler is learned."""

import pytest

from cognexis.errors import InvalidConfigError
from cognexis.training.curriculum import PHASES, SchedulerPhases


def test_phases_follow_one_another_when_each_is_complete():
    phases = SchedulerPhases()
    for phase in PHASES:
        phases.enter(phase)
        assert phases.phase == phase
        assert phases.halts_adaptively == (phase in ("adaptive_fine_tune", "validate"))
        phases.complete()


def test_adaptive_halting_needs_a_fitted_head():
    phases = SchedulerPhases()
    phases.complete()
    phases.enter("collect_traces")
    phases.complete()
    with pytest.raises(InvalidConfigError, match="fit_scheduler must leave a fitted and calibrated head first"):
        phases.enter("adaptive_fine_tune")
    assert phases.phase == "collect_traces"


def test_unknown_phase_is_refused_with_the_nearest_name():
    with pytest.raises(InvalidConfigError, match="did you mean 'validate'"):
        SchedulerPhases().enter("validation")


def test_going_back_throws_away_what_later_phases_produced():
    phases = SchedulerPhases()
    for phase in PHASES[:4]:
        phases.enter(phase)
        phases.complete()
    phases.enter("collect_traces")
    with pytest.raises(InvalidConfigError, match="collect_traces must leave traces first"):
        phases.enter("fit_scheduler")


def test_state_survives_and_a_contradictory_one_is_refused():
    phases = SchedulerPhases()
    phases.complete()
    phases.enter("collect_traces")
    other = SchedulerPhases()
    other.load_state_dict(phases.state_dict())
    assert other.state_dict() == {"phase": "collect_traces", "completed": ["sample_depths"]}
    with pytest.raises(InvalidConfigError, match="sample_depths must leave"):
        other.load_state_dict({"phase": "validate", "completed": []})
    with pytest.raises(InvalidConfigError, match="must list phases"):
        other.load_state_dict({"phase": "validate", "completed": ["x"]})
    assert other.phase == "collect_traces"
