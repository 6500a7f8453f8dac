"""The oracle: the best loop in hindsight, only where losses may be known."""

import math

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.oracle import OracleScheduler
from tests.batteries.observations import context, observation

LOSSES = torch.tensor([[1.0, 1.0, 3.0], [0.8, 1.0, 2.0], [0.85, 1.0, 1.0], [0.79, 1.0, 1.5]])  # [L, B]


def depths(scheduler, slots=3, low=1, high=8):
    """The loop after which each slot halts first."""
    scheduler.begin_request(context(is_analysis=True))
    found = torch.zeros(slots, dtype=torch.long)
    for loops in range(1, high + 1):
        seen = observation(loops, min_loops=low, max_loops=high, is_active=torch.ones(slots, dtype=torch.bool))
        found = torch.where((found == 0) & scheduler.observe(seen).halt, loops, found)
    return found.tolist()


def test_halts_where_no_later_loop_improves():
    assert depths(OracleScheduler(LOSSES)) == [4, 1, 3]


def test_tolerance_forgoes_small_improvements():
    assert depths(OracleScheduler(LOSSES, tolerance=0.05)) == [2, 1, 3]
    assert depths(OracleScheduler(torch.tensor([[1.0], [0.5]]), tolerance=0.5), slots=1) == [1]  # not more than


def test_loops_that_cannot_be_reached_do_not_count():
    assert depths(OracleScheduler(LOSSES), high=3) == [2, 1, 3]
    assert depths(OracleScheduler(LOSSES), low=2) == [4, 2, 3]


def test_depths_are_the_best_of_a_search():
    losses = torch.rand(6, 50)
    best = [min(i for i in range(6) if losses[i, s] <= losses[i:, s].min()) + 1 for s in range(50)]
    assert depths(OracleScheduler(losses), slots=50) == best


def test_nan_losses_never_halt_early():
    assert depths(OracleScheduler(torch.tensor([[1.0], [math.nan], [1.0]])), slots=1) == [3]


def test_reason_is_the_missing_gain():
    scheduler = OracleScheduler(torch.tensor([1.0, 2.0]))
    scheduler.begin_request(context(is_analysis=True))
    assert scheduler.observe(observation(0)).action == "continue"
    assert scheduler.observe(observation(1)).halt_reason == "value_gain"


def test_selected_rows_keep_their_losses_until_the_next_request():
    scheduler = OracleScheduler(LOSSES)
    scheduler.begin_request(context(is_analysis=True))
    scheduler.select(torch.tensor([2]))
    assert scheduler.observe(observation(3, is_active=[True])).halt.tolist() == [True]
    assert depths(scheduler) == [4, 1, 3]


def test_only_an_analysis_may_use_it():
    scheduler = OracleScheduler(LOSSES)
    with pytest.raises(InvalidConfigError, match="'oracle' sees true losses.*is_analysis=True"):
        scheduler.begin_request(context())
    with pytest.raises(InvalidConfigError, match="'oracle' sees true losses"):
        scheduler.observe(observation(1))
    scheduler.begin_request(context(is_analysis=True))
    scheduler.finish()
    with pytest.raises(InvalidConfigError, match="'oracle' sees true losses"):
        scheduler.observe(observation(1))


def test_a_refused_request_leaves_no_permission():
    scheduler = OracleScheduler(LOSSES)
    scheduler.begin_request(context(is_analysis=True))
    with pytest.raises(InvalidConfigError, match="is_analysis"):
        scheduler.begin_request(context())
    with pytest.raises(InvalidConfigError, match="is_analysis"):
        scheduler.observe(observation(1))


@pytest.mark.parametrize(
    "losses", [torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(2, dtype=torch.long), "abc", [[1], [1, 2]]]
)
def test_losses_are_checked(losses):
    with pytest.raises(InvalidConfigError, match="losses=.*must be"):
        OracleScheduler(losses)


def test_tolerance_is_checked():
    with pytest.raises(InvalidConfigError, match="tolerance=-1"):
        OracleScheduler(LOSSES, tolerance=-1)
