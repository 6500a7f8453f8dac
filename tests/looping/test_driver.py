"""The loop over loops with a core that only counts: bounds, budgets and reasons hold against any scheduler."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis.errors import BudgetExceededError, InvalidConfigError, ShapeMismatchError
from cognexis.looping.budget import BudgetLimits, RequestBudget
from cognexis.looping.driver import LoopBounds, LoopTrace, run_loops
from cognexis.looping.schedulers.base import LoopDecision, LoopScheduler, reason_code, reason_name
from cognexis.looping.schedulers.fixed import FixedScheduler
from cognexis.looping.token_mask import HALT_DEPENDENCIES, HaltState
from tests.batteries.scripted_schedulers import ByTable, Rogue


class CountingCore:
    """Counts which tokens were computed in which loop.

    Args:
        is_broken: ``[L, B, T]``, tokens that are not finite after a loop; None: none ever.
        clock: moved by ``seconds`` of each loop.
    """

    waits = True

    def __init__(
        self,
        shape: tuple[int, int],
        is_broken: Tensor | None = None,
        clock: "Clock | None" = None,
        seconds: list[float] | None = None,
        runs_all_loops: bool = False,
    ) -> None:
        self.computed = torch.zeros(shape, dtype=torch.long)
        self.calls: list[int] = []
        self.is_broken, self.clock, self.seconds, self.runs_all_loops = is_broken, clock, seconds, runs_all_loops

    def advance(self, loop_index: int, active: Tensor) -> None:
        self.calls.append(loop_index)
        self.computed += active
        if self.clock is not None and self.seconds is not None:
            self.clock.now += self.seconds[loop_index]

    def measure(self, signals: frozenset[str], loop: int) -> dict[str, Tensor]:
        return {name: torch.full_like(self.computed, 1.0 / loop, dtype=torch.float32) for name in signals}

    def is_finite(self) -> Tensor:
        if self.is_broken is None:
            return torch.ones_like(self.computed, dtype=torch.bool)
        return ~self.is_broken[self.calls[-1]]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def table(*rows: list[int]) -> ByTable:
    return ByTable(torch.tensor(rows))


def run(core: Any, bounds: LoopBounds, scheduler: LoopScheduler | None = None, **kwargs: Any) -> HaltState:
    return run_loops(core, torch.ones(core.computed.shape, dtype=torch.bool), bounds, scheduler, **kwargs)


def reasons(state: HaltState) -> list[list[str | None]]:
    return [[reason_name(code) for code in row] for row in state.reasons.tolist()]


def test_without_a_scheduler_all_tokens_run_the_largest_number() -> None:
    core = CountingCore((2, 3))
    state = run(core, LoopBounds(1, 4))
    assert core.calls == [0, 1, 2, 3]
    assert state.loops.tolist() == core.computed.tolist() == [[4] * 3] * 2
    assert reasons(state) == [["max_loops"] * 3] * 2


def test_rows_may_have_limits_of_their_own() -> None:
    core = CountingCore((3, 2))
    state = run(core, LoopBounds(1, 4, torch.tensor([[1], [4], [2]])))
    assert core.computed.tolist() == [[1, 1], [4, 4], [2, 2]]
    assert reasons(state) == [["max_loops"] * 2] * 3


def test_a_scheduler_stops_tokens_and_the_run_ends_with_the_last() -> None:
    core = CountingCore((2, 3))
    state = run(core, LoopBounds(1, 8), table([1, 3, 2], [2, 2, 1]))
    assert core.calls == [0, 1, 2]
    assert core.computed.tolist() == state.loops.tolist() == [[1, 3, 2], [2, 2, 1]]
    assert reasons(state) == [["value_gain"] * 3] * 2


def test_below_the_smallest_number_the_scheduler_is_not_heard() -> None:
    state = run(CountingCore((1, 3)), LoopBounds(3, 5), table([1, 4, 9]))
    assert state.loops.tolist() == [[3, 4, 5]]
    assert reasons(state) == [["value_gain", "value_gain", "max_loops"]]


@pytest.mark.parametrize(
    "dependency, expected", [("token", [3, 1, 4, 2]), ("prefix", [3, 3, 4, 4]), ("row", [4, 4, 4, 4])]
)
def test_the_dependency_makes_tokens_wait(dependency: str, expected: list[int]) -> None:
    state = run(CountingCore((1, 4)), LoopBounds(1, 6), table([3, 1, 4, 2]), dependency=dependency)
    assert state.loops.tolist() == [expected]


@pytest.mark.parametrize("claim", ["max_loops", "forced", "budget", "safety", "error"])
def test_no_reason_that_a_scheduler_gives_frees_it_of_the_dependency(claim: str) -> None:
    class Claims(ByTable):
        def observe(self, observation: Any) -> LoopDecision:
            decision = super().observe(observation)
            return LoopDecision(decision.halt, torch.full_like(decision.reasons, reason_code(claim)))

    state = run(CountingCore((1, 2)), LoopBounds(1, 6), Claims(torch.tensor([[3, 1]])), dependency="prefix")
    assert state.loops.tolist() == [[3, 3]]
    assert reasons(state) == [["max_loops" if claim == "max_loops" else "forced"] * 2]


def test_padding_runs_nothing_and_holds_nobody_back() -> None:
    core = CountingCore((2, 3))
    takes_part = torch.tensor([[False, True, True], [True, True, False]])
    state = run_loops(core, takes_part, LoopBounds(1, 4), table([9, 2, 2], [1, 1, 9]), dependency="row")
    assert core.computed.tolist() == state.loops.tolist() == [[0, 2, 2], [1, 1, 0]]
    assert reasons(state) == [["forced", "value_gain", "value_gain"], ["value_gain", "value_gain", "forced"]]


def test_a_core_whose_deeper_keys_are_needed_runs_all_loops() -> None:
    core = CountingCore((1, 2), runs_all_loops=True)
    state = run(core, LoopBounds(1, 5), table([1, 2]))
    assert core.calls == [0, 1, 2, 3, 4]
    assert state.loops.tolist() == [[1, 2]]


def test_a_token_that_is_not_finite_stops_as_an_error_and_others_go_on() -> None:
    broken = torch.zeros(4, 1, 3, dtype=torch.bool)
    broken[1, 0, 1] = True
    state = run(CountingCore((1, 3), is_broken=broken), LoopBounds(3, 4), table([9, 9, 3]))
    assert state.loops.tolist() == [[4, 2, 3]]
    assert reasons(state) == [["max_loops", "error", "value_gain"]]


def test_a_token_that_is_not_finite_after_the_last_loop_is_an_error_too() -> None:
    broken = torch.zeros(2, 1, 2, dtype=torch.bool)
    broken[1, 0, 0] = True
    assert reasons(run(CountingCore((1, 2), is_broken=broken), LoopBounds(1, 2))) == [["error", "max_loops"]]


def budget_of(rows: int, clock: Any = None, max_loops: int | None = None, flops: float = 1.0, **limits: Any) -> Any:
    request = RequestBudget(BudgetLimits(**limits), clock or Clock())
    return request.begin_pass(rows, torch.device("cpu"), flops, max_loops)


# (risky, loops left, min_loops, scheduler's depth) -> loops, reason; the largest number is 4
PRECEDENCE = [
    ((True, 1, 1, 1), 1, "safety"),
    ((True, 9, 3, 9), 1, "safety"),  # below the minimum too
    ((False, 1, 1, 1), 1, "budget"),  # before the scheduler's own reason
    ((False, 4, 1, 9), 4, "budget"),  # before max_loops
    ((False, 9, 4, 1), 4, "max_loops"),  # before the scheduler's own reason
    ((False, 9, 2, 1), 2, "value_gain"),
]


@pytest.mark.parametrize("case, loops, reason", PRECEDENCE)
def test_hard_rules_come_in_their_order(case: tuple[bool, int, int, int], loops: int, reason: str) -> None:
    is_risky, left, min_loops, depth = case
    state = run(
        CountingCore((1, 1)),
        LoopBounds(min_loops, 4),
        table([depth]),
        budget=budget_of(1, max_total_loops=left),
        is_risky=torch.tensor([[is_risky]]),
    )
    assert state.loops.tolist() == [[loops]]
    assert reasons(state) == [[reason]]


def test_risk_stops_one_row_and_not_the_other() -> None:
    state = run(CountingCore((2, 2)), LoopBounds(2, 3), is_risky=torch.tensor([[True], [False]]))
    assert state.loops.tolist() == [[1, 1], [3, 3]]
    assert reasons(state) == [["safety"] * 2, ["max_loops"] * 2]


@pytest.mark.parametrize("requests", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_budgets_and_schedulers_that_keep_to_no_rule_pass_no_bound(requests: int) -> None:
    """Requests of up to three passes; what they used is counted by the core, not by the driver."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    seen: Counter[str] = Counter()
    for case in range(requests):
        rows, min_loops = draw(1, 3), draw(1, 3)
        bounds_max = draw(min_loops, 6)
        flops, limits = draw(1, 9), {}
        if draw(0, 2):
            limits["max_total_loops"] = draw(1, 12)
        if draw(0, 1):
            limits["max_recurrent_flops"] = draw(1, 60) * flops / draw(1, 3)
        request = RequestBudget(BudgetLimits(**limits), Clock())
        scheduler = Rogue(case, by_token=bool(draw(0, 3)))
        used = torch.zeros(rows, dtype=torch.long)
        flops_used = torch.zeros(rows, dtype=torch.long)
        for _ in range(draw(1, 3)):
            length, room = draw(1, 3), (draw(1, 6) if draw(0, 3) == 0 else None)
            takes_part = torch.rand(rows, length, generator=generator) < 0.8
            core = CountingCore((rows, length))
            row_limits = torch.randint(min_loops, bounds_max + 1, (rows, 1), generator=generator)
            bounds = LoopBounds(min_loops, bounds_max, row_limits if draw(0, 2) == 0 else None)
            dependency = HALT_DEPENDENCIES[draw(0, 2)]
            budget = request.begin_pass(rows, used.device, flops, room)
            try:
                state = run_loops(core, takes_part, bounds, scheduler, dependency=dependency, budget=budget)
            except BudgetExceededError:
                seen["refused"] += 1
                assert not core.calls, "a refused pass must run nothing"
                step = min_loops * takes_part.sum(dim=1)
                is_short = (step > 0) & (
                    (used + min_loops > limits.get("max_total_loops", 99))
                    | (flops_used + step * flops > limits.get("max_recurrent_flops", 1e9))
                    | (room is not None and room < min_loops)
                )
                assert is_short.any(), "refused although every row has room for the smallest number of loops"
                break
            loops = core.computed
            assert torch.equal(loops, state.loops)
            assert not state.active.any()
            assert (loops[~takes_part] == 0).all()
            assert (loops[takes_part] >= min_loops).all()
            assert (loops <= (bounds_max if bounds.limits is None else bounds.limits)).all()
            assert room is None or (loops <= room).all()
            used += loops.amax(dim=1)
            flops_used += loops.sum(dim=1) * flops
            assert (used <= limits.get("max_total_loops", 99)).all()
            assert (flops_used <= limits.get("max_recurrent_flops", 1e9)).all()
            assert torch.equal(request.loops_used, used)
            assert torch.equal(request.flops_used.long(), flops_used)
            seen.update(name for row in reasons(state) for name in row if name is not None)
        assert all(o.min_loops == min_loops and o.max_loops == bounds_max for o in scheduler.shown)
    assert set(seen) == {"refused", "budget", "max_loops", "forced", "min_delta", "confidence", "value_gain"}
    assert min(seen.values()) > requests / 50, f"some outcome is hardly tested: {seen}"


def test_the_deadline_is_passed_by_one_loop_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    outcomes: Counter[str] = Counter()
    for case in range(200):
        seconds = (0.001 + 0.05 * torch.rand(8, generator=generator)).tolist()
        wall = 0.001 + 0.3 * float(torch.rand((), generator=generator))
        clock = Clock()
        core = CountingCore((2, 2), clock=clock, seconds=seconds)
        budget = budget_of(2, clock, max_wall_time_ms=wall * 1000)
        start, min_loops = clock.now, 1 + case % 2
        try:
            state = run(core, LoopBounds(min_loops, 8), budget=budget)
        except BudgetExceededError:
            assert len(core.calls) < min_loops
            outcomes["refused"] += 1
        else:
            assert (state.loops >= min_loops).all()
            outcomes.update({str(reasons(state)[0][0])})
        assert clock.now - start <= wall + seconds[core.calls[-1]]
    assert set(outcomes) == {"refused", "budget", "max_loops"} and min(outcomes.values()) > 10


def test_time_that_ends_below_the_minimum_is_an_error_that_says_so() -> None:
    clock = Clock()
    core = CountingCore((1, 1), clock=clock, seconds=[1.0] * 8)
    with pytest.raises(BudgetExceededError, match="max_wall_time_ms: exhausted before min_loops=3"):
        run(core, LoopBounds(3, 8), budget=budget_of(1, clock, max_wall_time_ms=1500))
    assert core.calls == [0]


def test_a_core_that_runs_all_loops_is_charged_with_all_of_them() -> None:
    scheduler = table([1, 2], [2, 2])
    flops = 10.0 * 2 * 4  # two tokens of four loops
    budget = budget_of(2, flops=10.0, max_total_loops=4, max_recurrent_flops=flops)
    state = run(CountingCore((2, 2), runs_all_loops=True), LoopBounds(1, 4), scheduler, budget=budget)
    assert state.loops.tolist() == [[1, 2], [2, 2]]
    assert budget.request.loops_used.tolist() == [4, 4] and budget.request.flops_used.tolist() == [flops] * 2


@pytest.mark.parametrize("limits", [{"max_total_loops": 3}, {"max_recurrent_flops": 79.0}])
def test_a_core_that_runs_all_loops_is_not_begun_without_room_for_them(limits: dict[str, Any]) -> None:
    core = CountingCore((2, 2), runs_all_loops=True)
    with pytest.raises(BudgetExceededError, match="no room left for 4 more loops"):
        run(core, LoopBounds(1, 4), table([1, 2], [2, 2]), budget=budget_of(2, flops=10.0, **limits))
    assert core.calls == []


def test_a_core_that_runs_all_loops_yields_nothing_when_time_ends_in_between() -> None:
    clock = Clock()
    core = CountingCore((1, 1), clock=clock, seconds=[1.0] * 8, runs_all_loops=True)
    with pytest.raises(BudgetExceededError, match="exhausted before all loops of several core blocks"):
        run(core, LoopBounds(1, 8), table([1]), budget=budget_of(1, clock, max_wall_time_ms=3500))
    assert core.calls == [0, 1, 2]


def test_a_loop_that_would_end_after_the_deadline_is_not_begun() -> None:
    clock = Clock()
    core = CountingCore((1, 1), clock=clock, seconds=[1.0] * 8)
    state = run(core, LoopBounds(1, 8), budget=budget_of(1, clock, max_wall_time_ms=3500))
    assert state.loops.tolist() == [[3]]
    assert reasons(state) == [["budget"]]
    assert clock.now == 103.0


def test_the_scheduler_sees_bounds_budget_and_what_still_runs() -> None:
    scheduler = Rogue(0)
    takes_part = torch.tensor([[False, True], [True, True]])
    budget = budget_of(2, max_total_loops=7, max_loops=5)
    run_loops(
        CountingCore((2, 2)), takes_part, LoopBounds(4, 5), scheduler, budget=budget, quality_tier="fast",
        is_risky=torch.tensor([[False], [True]]),
    )  # fmt: skip
    first, second = scheduler.shown[:2]
    assert [o.loops for o in scheduler.shown[:4]] == [1, 2, 3, 4]
    assert (first.min_loops, first.max_loops, first.preference) == (4, 5, "fast")
    assert first.shape == (2, 2) and isinstance(first.remaining_loops, Tensor) and first.is_active is not None
    assert first.remaining_loops.tolist() == [[4, 4], [4, 4]]
    assert first.is_active.tolist() == takes_part.tolist()
    assert second.is_active is not None and second.is_active.tolist() == [[False, True], [False, False]]
    assert first.hidden_delta is not None and first.confidence is None


def test_only_wanted_signals_are_measured() -> None:
    asked: list[frozenset[str]] = []

    class Core(CountingCore):
        def measure(self, signals: frozenset[str], loop: int) -> dict[str, Tensor]:
            asked.append(signals)
            return super().measure(signals, loop)

    run(Core((1, 1)), LoopBounds(1, 2))
    run(Core((1, 1)), LoopBounds(1, 2), table([2]))
    assert asked == [frozenset(), frozenset(), frozenset({"hidden_delta"}), frozenset({"hidden_delta"})]


def test_a_scheduler_without_signals_decides_by_row() -> None:
    state = run(CountingCore((2, 3)), LoopBounds(1, 4), FixedScheduler(2), dependency="row")
    assert state.loops.tolist() == [[2] * 3] * 2
    assert reasons(state) == [["max_loops"] * 3] * 2


class Answers(LoopScheduler):
    name = "answers"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def observe(self, observation: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "answer, error",
    [
        (None, InvalidConfigError),
        (True, InvalidConfigError),
        (LoopDecision(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int8)), InvalidConfigError),
        (LoopDecision(torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.int8)), ShapeMismatchError),
    ],
)
def test_an_answer_that_is_no_decision_is_a_typed_error(answer: Any, error: type[Exception]) -> None:
    core = CountingCore((2, 2))
    with pytest.raises(error, match="scheduler returned"):
        run_loops(core, torch.ones(2, 2, dtype=torch.bool), LoopBounds(1, 3), Answers(answer), is_risky=torch.zeros(
            2, 1, dtype=torch.bool))  # fmt: skip


def test_a_trace_counts_the_tokens_of_every_loop_and_averages_their_signals() -> None:
    class Core(CountingCore):
        def measure(self, signals: frozenset[str], loop: int) -> dict[str, Tensor]:
            return {"hidden_delta": torch.tensor([[1.0, 2.0, float("nan")]]) * loop}

    trace = LoopTrace()
    takes_part = torch.tensor([[True, True, False]])
    run_loops(Core((1, 3)), takes_part, LoopBounds(1, 3), table([1, 3, 1]), trace=trace)
    assert [int(n) for n in trace.active] == [2, 1, 1]
    assert [float(x) for x in trace.signals["hidden_delta"]] == [1.5, 4.0, 6.0]


@pytest.mark.gpu
def test_on_a_device_the_run_ends_one_loop_late_at_most() -> None:
    class Core(CountingCore):
        waits = False

    core = Core((1, 2))
    core.computed = core.computed.cuda()
    depths = ByTable(torch.tensor([[2, 3]], device="cuda"))
    takes_part = torch.ones(1, 2, dtype=torch.bool, device="cuda")
    state = run_loops(core, takes_part, LoopBounds(1, 8), depths)
    assert state.loops.tolist() == [[2, 3]]
    assert core.calls == [0, 1, 2, 3]
