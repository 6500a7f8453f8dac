"""Fixed depth: exactly n loops, moved into the bounds and the budget."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.fixed import FixedScheduler
from tests.batteries.observations import answers, observation


def loops_of(num_loops, low, high, budget=None):
    """Loops until the scheduler halts, and why."""
    scheduler = FixedScheduler(num_loops)
    for loops in range(1, 100):
        left = None if budget is None else budget - loops
        decision = scheduler.observe(observation(loops, min_loops=low, max_loops=high, remaining_loops=left))
        if decision.action == "halt":
            return loops, decision.halt_reason
    raise AssertionError("never halts")


@pytest.mark.parametrize(
    ("num_loops", "low", "high", "budget", "expected"),
    [
        (12, 2, 8, 5, (5, "budget")),
        (12, 2, 8, None, (8, "max_loops")),
        (5, 2, 8, None, (5, "max_loops")),
        (1, 2, 8, None, (2, "max_loops")),
        (4, 3, 8, 2, (2, "budget")),  # a budget below the minimum stops the request
        (None, 1, 6, None, (6, "max_loops")),
    ],
)
def test_depth_is_moved_into_bounds_and_budget(num_loops, low, high, budget, expected):
    assert loops_of(num_loops, low, high, budget) == expected


def test_all_slots_halt_together():
    seen = [observation(loops, confidence=torch.zeros(2, 3)) for loops in (1, 2)]
    first, second = map(FixedScheduler(2).observe, seen)
    assert not first.halt.any() and second.halt.all() and second.halt.shape == (2, 3)


def test_depth_needs_no_signal():
    assert FixedScheduler(2).signals == frozenset()
    assert answers(FixedScheduler(2), observation(1), observation(2)) == [("continue", None), ("halt", "max_loops")]


@pytest.mark.parametrize("num_loops", [0, -1, 1.0, True, "3"])
def test_depth_must_be_a_count(num_loops):
    with pytest.raises(InvalidConfigError, match="num_loops=.*must be an integer of at least 1"):
        FixedScheduler(num_loops)
