"""The token-wise state: what stops stays stopped, padding never starts, dependencies decide who may stop."""

import pytest
import torch
from torch import Tensor

from cognexis.looping.schedulers.base import reason_code, reason_name
from cognexis.looping.token_mask import HaltState, may_halt


def bools(text: str) -> Tensor:
    """``[rows, T]``; "x" is True, rows are separated by blanks."""
    return torch.tensor([[letter == "x" for letter in row] for row in text.split()])


def codes(name: str, like: Tensor) -> Tensor:
    return torch.full(like.shape, reason_code(name), dtype=torch.int8)


def names(state: HaltState) -> list[list[str | None]]:
    return [[reason_name(code) for code in row] for row in state.reasons.tolist()]


def test_golden_of_a_schedule_with_padding() -> None:
    schedule, state = torch.tensor([[1, 3, 0]]), HaltState.begin(bools("xx."))
    assert (state.active.dtype, state.loops.dtype, state.reasons.dtype) == (torch.bool, torch.int64, torch.int8)
    assert state.loops.tolist() == [[0, 0, 0]]
    assert names(state) == [[None, None, "forced"]]
    state.count()
    state.halt(state.loops >= schedule, codes("max_loops", schedule))
    assert state.loops.tolist() == [[1, 1, 0]]
    assert state.active.tolist() == [[False, True, False]]
    assert names(state) == [["max_loops", None, "forced"]]
    state.halt(bools(".x."), codes("value_gain", schedule))
    assert not state.active.any()
    assert int(state.loops.max()) == 1
    assert names(state) == [["max_loops", "value_gain", "forced"]]


@pytest.mark.parametrize("seed", range(20))
def test_a_stopped_token_never_starts_again_and_keeps_its_loops_and_reason(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state = HaltState.begin(torch.rand(3, 5, generator=generator) < 0.8)
    for _ in range(12):
        before = (state.active, state.loops, state.reasons)
        state.count()
        where = torch.rand(3, 5, generator=generator) < 0.2
        state.halt(where, torch.randint(1, 11, (3, 5), generator=generator))
        assert not (state.active & ~before[0]).any()
        assert torch.equal(state.loops, before[1] + before[0])
        assert torch.equal(state.reasons[~before[0]], before[2][~before[0]])
        assert ((state.reasons == 0) == state.active).all()
        assert torch.equal(before[0] & where, before[0] & ~state.active)


def test_halting_broadcasts_over_the_tokens_of_a_row() -> None:
    state = HaltState.begin(bools("xx .x"))
    state.halt(torch.tensor([[True], [False]]), torch.tensor([[reason_code("safety")], [0]]))
    assert names(state) == [["safety", "safety"], ["forced", None]]


# settled tokens, active tokens, and who may stop; padding and stopped tokens are not active
BY_HAND = {
    "token": [("x.x", "xxx", "x.x"), ("...", "xxx", "..."), ("xxx", "x.x", "xxx")],
    "prefix": [
        ("x.x", "xxx", "x.."),  # the third waits for the second
        ("x.x", "x.x", "xxx"),  # the second has stopped
        (".xx", "xxx", "..."),
        (".xx", ".xx", "xxx"),  # padding on the left does not hold anybody back
        ("xx.x", "xxx.", "xx.."),
        ("xxx", "xxx", "xxx"),
    ],
    "row": [
        ("x.x", "xxx", "..."),
        ("x.x", "x.x", "xxx"),
        ("xx.", "xxx", "..."),  # the first two wait for a later one
        ("xx.", "xx.", "xxx"),  # padding on the right does not count
        ("xxx", "xxx", "xxx"),
    ],
}


@pytest.mark.parametrize("dependency, case", [(d, c) for d, cases in BY_HAND.items() for c in cases], ids=str)
def test_whose_agreement_a_token_needs(dependency: str, case: tuple[str, str, str]) -> None:
    settled, active, expected = map(bools, case)
    assert torch.equal(may_halt(settled, active, dependency)[settled], expected[settled])
    stops = settled & may_halt(settled, active, dependency)
    assert torch.equal(stops & active, expected & settled & active)


def test_rows_do_not_wait_for_each_other() -> None:
    settled, active = bools("xx. xxx"), bools("xxx xxx")
    assert may_halt(settled, active, "row").tolist() == [[False] * 3, [True] * 3]
    assert may_halt(settled, active, "prefix").tolist() == [[True, True, False], [True] * 3]


def test_the_prefix_rule_never_stops_a_token_before_an_earlier_one() -> None:
    active, generator = torch.ones(4, 9, dtype=torch.bool), torch.Generator().manual_seed(0)
    for _ in range(30):
        settled = torch.rand(4, 9, generator=generator) < 0.7
        active = active & ~(settled & may_halt(settled, active, "prefix"))
        assert not (active[:, :-1] & ~active[:, 1:]).any()
