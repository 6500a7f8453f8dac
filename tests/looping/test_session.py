"""What a request remembers: passes, sequences, room in the cache, rows that are spent."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cognexis import CognexisCache
from cognexis.looping.budget import BudgetLimits, RequestBudget
from cognexis.looping.cost import core_flops_per_token, token_bytes
from cognexis.looping.session import LoopSession
from cognexis.looping.trace import LoopRecorder
from tests.batteries.tiny import tiny_config


def session(clock: Any = lambda: 0.0, **limits: Any) -> LoopSession:
    return LoopSession(budget=RequestBudget(BudgetLimits(**limits), clock))


def with_use(each: LoopSession, loops: list[int], flops: list[float]) -> LoopSession:
    assert each.budget is not None
    each.budget.loops_used, each.budget.flops_used = torch.tensor(loops), torch.tensor(flops, dtype=torch.float64)
    return each


def test_sequences_are_kept_only_once_there_are_new_tokens() -> None:
    each = LoopSession()
    prompt = torch.zeros(2, 5, dtype=torch.long)
    longer = torch.ones(2, 6, dtype=torch.long)
    for ids, kept in ((prompt, None), (prompt, None), (longer, longer)):
        each.begin_pass(ids, None)
        assert each.sequences is kept
    assert each.num_passes == 3 and not each.is_first_pass


def test_the_first_pass_is_the_first() -> None:
    each = LoopSession()
    each.begin_pass(torch.zeros(1, 2, dtype=torch.long), None)
    assert each.is_first_pass


def test_a_session_reports_the_bytes_of_its_cache() -> None:
    each = LoopSession()
    assert each.cache_bytes is None
    each.begin_pass(torch.zeros(1, 2, dtype=torch.long), CognexisCache(tiny_config()))
    assert each.cache_bytes == 0
    each.begin_pass(torch.zeros(1, 3, dtype=torch.long), object())
    assert each.cache_bytes is None


@pytest.mark.parametrize("rows, tokens", [(1, 1), (3, 2)])
@pytest.mark.parametrize("loops", [0, 1, 3])
def test_loops_fit_up_to_the_byte(rows: int, tokens: int, loops: int) -> None:
    config, held = tiny_config(), 1000
    cache = SimpleNamespace(memory_bytes=lambda: held)
    needed = held + rows * tokens * token_bytes(config, loops, 4)
    for limit, expected in ((needed, loops), (needed - 1, max(0, loops - 1))):
        each = session(max_cache_memory_bytes=limit)
        assert each.loops_that_fit(config, cache, rows, tokens, 4) == expected


def test_without_a_limit_or_a_cache_nothing_is_said_about_room() -> None:
    config, cache = tiny_config(), CognexisCache(tiny_config())
    assert LoopSession().loops_that_fit(config, cache, 1, 1, 4) is None
    assert session(max_total_loops=3).loops_that_fit(config, cache, 1, 1, 4) is None
    assert session(max_cache_memory_bytes=3).loops_that_fit(config, None, 1, 1, 4) is None


def test_with_several_core_blocks_all_loops_fit_or_none() -> None:
    config = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)
    cache = CognexisCache(config, mixed_depth=True)
    needed = token_bytes(config, 2, 4)  # three loops without a frozen entry
    each = session(max_cache_memory_bytes=needed)
    assert each.loops_that_fit(config, cache, 1, 1, 4) is None  # no loop count is known yet
    cache.bind_mixed(3, "depth_indexed")
    assert each.loops_that_fit(config, cache, 1, 1, 4) == 3
    assert session(max_cache_memory_bytes=needed - 1).loops_that_fit(config, cache, 1, 1, 4) == 0


def test_rows_are_spent_one_by_one() -> None:
    config = tiny_config()
    each = with_use(session(max_total_loops=6), [3, 4, 5], [0.0] * 3)
    spent = each.is_spent(config, 2, 9)
    assert spent is not None and spent.tolist() == [False, False, True]
    assert LoopSession().is_spent(config, 2, 9) is None


def test_with_several_core_blocks_the_next_token_needs_all_loops_of_the_cache() -> None:
    config = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)
    cache = CognexisCache(config, mixed_depth=True)
    cache.bind_mixed(3, "depth_indexed")
    each = with_use(session(max_total_loops=6), [3, 4], [0.0] * 2)
    each.begin_pass(torch.zeros(2, 4, dtype=torch.long), cache)
    spent = each.is_spent(config, 1, 9)
    assert spent is not None and spent.tolist() == [False, True]


@pytest.mark.parametrize("has_cache", [True, False])
def test_without_a_cache_the_next_token_costs_the_whole_sequence(has_cache: bool) -> None:
    config = tiny_config()
    needed = 2 * core_flops_per_token(config, 9) * (1 if has_cache else 9)
    each = with_use(session(max_recurrent_flops=100 + needed), [0, 0], [100.0, 101.0])
    each.begin_pass(torch.zeros(2, 8, dtype=torch.long), CognexisCache(config) if has_cache else None)
    spent = each.is_spent(config, 2, 9)
    assert spent is not None and spent.tolist() == [False, True]


def test_time_and_room_end_all_rows() -> None:
    config, now = tiny_config(), [0.0]
    each = with_use(session(lambda: now[0], max_wall_time_ms=1000), [0, 0], [0.0, 0.0])
    assert each.budget is not None
    each.budget.time_loop(0.25)
    now[0] = 0.4
    for loops, expected in ((2, False), (3, True)):
        spent = each.is_spent(config, loops, 4)
        assert spent is not None and spent.tolist() == [expected] * 2


def test_spent_rows_are_remembered_for_the_report() -> None:
    each = LoopSession()
    assert not each.was_spent(0)
    each.note_spent(torch.tensor([False, True]))
    each.note_spent(torch.tensor([False, False]))
    assert [each.was_spent(row) for row in range(2)] == [False, True]


def test_of_beams_the_best_are_kept_and_the_budget_is_shared() -> None:
    each = session(max_total_loops=3)
    assert each.kept_rows is None
    each.begin_pass(torch.zeros(6, 2, dtype=torch.long), None)
    each.begin_pass(torch.zeros(6, 3, dtype=torch.long), None)
    assert each.kept_rows is not None and each.kept_rows.tolist() == list(range(6))
    each.share_among_beams(3, 2)
    assert each.kept_rows.tolist() == [0, 1, 3, 4]
    assert each.budget is not None and each.budget.is_shared


def test_a_pass_that_is_abandoned_ends_all_rows() -> None:
    each, recorder = session(max_total_loops=3), LoopRecorder()
    each.abandon_pass(recorder)
    assert each.spent is None
    each.begin_pass(torch.zeros(2, 2, dtype=torch.long), None)
    each.begin_pass(torch.zeros(2, 3, dtype=torch.long), None)
    recorder.begin_pass(2, 4)
    each.abandon_pass(recorder)
    assert each.was_spent(0) and each.was_spent(1) and not recorder.passes
