"""Hard limits: what a limit may be, what fits, and what a pass is charged."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.looping.budget import BUDGET_KEYWORDS, BudgetLimits, PassBudget, RequestBudget

WHOLE = ("max_total_loops", "max_loops_per_token", "max_cache_memory_bytes")
CPU = torch.device("cpu")


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def request(clock: Any = None, **limits: Any) -> RequestBudget:
    return RequestBudget(BudgetLimits(**limits), clock or Clock())


def begin(budget: RequestBudget, rows: int, flops: float = 1.0, max_loops: int | None = None) -> PassBudget:
    return budget.begin_pass(rows, CPU, flops, max_loops)


def remaining(budget: PassBudget, loops: list[list[int]], active: list[list[int]] | None = None) -> list[int] | None:
    counts = torch.tensor(loops)
    left = budget.remaining_loops(counts, counts >= 0 if active is None else torch.tensor(active).bool())
    assert left is None or left.shape == (len(loops), 1)
    return None if left is None else left[:, 0].tolist()


@pytest.mark.parametrize("name", BUDGET_KEYWORDS)
@pytest.mark.parametrize("value", [0, -1, True, False, math.nan, math.inf, -math.inf, "5", [3]], ids=str)
def test_a_limit_that_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidConfigError, match=f"{name}=.*above 0, or None") as caught:
        BudgetLimits(**{name: value})
    assert caught.value.path == name


@pytest.mark.parametrize("name", WHOLE)
def test_counts_are_whole_numbers(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{name}=2.0: must be an integer"):
        BudgetLimits(**{name: 2.0})
    assert getattr(BudgetLimits(**{name: 2}), name) == 2


@pytest.mark.parametrize("name", ["max_recurrent_flops", "max_wall_time_ms"])
def test_operations_and_time_may_be_broken_numbers(name: str) -> None:
    assert getattr(BudgetLimits(**{name: 0.5}), name) == 0.5
    assert getattr(BudgetLimits(**{name: 3}), name) == 3


@pytest.mark.parametrize("name", BUDGET_KEYWORDS)
def test_only_loops_per_token_limit_nothing_beyond_the_token(name: str) -> None:
    assert not BudgetLimits().is_limiting
    assert BudgetLimits(**{name: 3}).is_limiting is (name != "max_loops_per_token")


def test_without_limits_everything_fits() -> None:
    budget = request(max_loops_per_token=1)
    assert remaining(begin(budget, 2), [[3], [4]]) is None
    assert budget.affords(10**9, 1e30).tolist() == [True, True]
    assert not budget.is_late(10**9)
    assert budget.remaining_ms is None


def test_what_a_row_may_still_start_is_counted_from_its_deepest_token() -> None:
    budget = begin(request(max_total_loops=10), 2)
    assert remaining(budget, [[1, 4, 2], [0, 0, 0]]) == [6, 10]
    budget.charge(torch.tensor([[1, 4, 2], [0, 0, 0]]))
    assert budget.request.loops_used.tolist() == [4, 0]
    assert remaining(begin(budget.request, 2), [[7, 1, 0], [2, 3, 3]]) == [-1, 7]


def test_the_cache_limits_the_loops_of_a_pass_and_not_those_of_the_request() -> None:
    budget = begin(request(), 1, max_loops=3)
    assert remaining(budget, [[1, 0]]) == [2]
    budget.charge(torch.tensor([[3, 1]]))
    assert remaining(begin(budget.request, 1, max_loops=3), [[1, 0]]) == [2]


def test_operations_are_shared_by_the_tokens_that_still_run() -> None:
    budget = begin(request(max_recurrent_flops=100.0), 3, flops=7.0)
    # 100 - 7 * 4 = 72 left; a loop of three tokens takes 21, of one 7, of none (a row that ended) is not asked for
    loops = [[1, 1, 2]] * 3
    assert remaining(budget, loops, [[1, 1, 1], [0, 0, 1], [0, 0, 0]]) == [3, 10, 10]
    budget.charge(torch.tensor(loops))
    assert budget.request.flops_used.tolist() == [28.0] * 3


@pytest.mark.parametrize("flops", [7.0, 12.5])
def test_a_loop_that_fits_exactly_is_allowed(flops: float) -> None:
    budget = begin(request(max_recurrent_flops=4 * flops), 1, flops=flops)
    assert remaining(budget, [[0, 0]]) == [2]
    assert remaining(begin(request(max_recurrent_flops=math.nextafter(4 * flops, 0)), 1, flops=flops), [[0, 0]]) == [1]


def test_the_tightest_limit_holds() -> None:
    budget = begin(request(max_total_loops=9, max_recurrent_flops=1e6), 1, flops=1.0, max_loops=4)
    assert remaining(budget, [[1]]) == [3]
    assert remaining(begin(request(max_total_loops=9, max_recurrent_flops=5.0), 1, max_loops=7), [[1]]) == [4]


def used(budget: RequestBudget, loops: list[int], flops: list[float]) -> RequestBudget:
    budget.loops_used, budget.flops_used = torch.tensor(loops), torch.tensor(flops, dtype=torch.float64)
    return budget


def test_a_row_affords_what_it_has_left() -> None:
    budget = used(request(max_total_loops=10), [0, 7, 8, 10], [0.0] * 4)
    assert budget.affords(3, 1e9).tolist() == [True, True, False, False]
    budget = used(request(max_recurrent_flops=10.0), [0] * 3, [0.0, 4.0, 4.5])
    assert budget.affords(3, 2.0).tolist() == [True, True, False]


def test_beams_that_appear_continue_with_what_was_used_most() -> None:
    budget = used(request(max_total_loops=10), [2, 5], [3.0, 1.0])
    assert begin(budget, 4).request.loops_used.tolist() == [5] * 4
    assert budget.flops_used.tolist() == [3.0] * 4
    begin(budget, 4)
    assert budget.loops_used.tolist() == [5] * 4


def test_time_is_late_when_the_next_loops_would_end_after_the_deadline() -> None:
    clock = Clock()
    budget = request(clock, max_wall_time_ms=2000)
    assert budget.remaining_ms == 2000.0
    clock.now += 1.5
    assert budget.remaining_ms == pytest.approx(500.0)
    assert not budget.is_late(100)  # nothing is known about loops yet
    budget.time_loop(0.2)
    assert not budget.is_late(2) and budget.is_late(3)
    clock.now += 0.5
    assert budget.is_late(0)


def test_the_time_of_a_loop_is_a_moving_average_between_the_measurements() -> None:
    budget, seen = request(max_wall_time_ms=1), []
    for seconds in (1.0, 3.0, 3.0, 3.0):
        budget.time_loop(seconds)
        seen.append(budget.loop_seconds)
    assert seen[0] == 1.0
    assert seen == sorted(seen) and seen[1] < seen[-1] < 3.0


def test_charges_add_up_over_passes() -> None:
    budget, generator = request(), torch.Generator().manual_seed(0)
    loops_used, flops_used = torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.float64)
    for length in (4, 1, 1, 2):
        loops: Tensor = torch.randint(0, 6, (3, length), generator=generator)
        begin(budget, 3, flops=10.0 * length).charge(loops)
        loops_used += torch.tensor([max(row) for row in loops.tolist()])
        flops_used += torch.tensor([sum(row) * 10.0 * length for row in loops.tolist()])
    assert torch.equal(budget.loops_used, loops_used)
    assert torch.equal(budget.flops_used, flops_used)


def test_rows_that_may_continue_each_other_are_all_charged_the_dearest() -> None:
    budget = request()
    budget.is_shared = True
    begin(budget, 3, flops=2.0).charge(torch.tensor([[1, 1], [0, 4], [3, 3]]))
    assert budget.loops_used.tolist() == [4] * 3
    assert budget.flops_used.tolist() == [12.0] * 3
