"""The record of the loops that a generation and a forward really ran."""

import copy

import torch

from cognexis.looping.schedulers.base import reason_code
from cognexis.looping.trace import LoopRecorder


def codes(*names: str) -> torch.Tensor:
    return torch.tensor([reason_code(name) for name in names], dtype=torch.int8)


OWN = torch.tensor([[0, 0], [1, 1]])  # each row computed its own tokens


def recorder_of_two_rows() -> LoopRecorder:
    """A prompt in two chunks, then two tokens; the second row ends after its first token."""
    recorder = LoopRecorder()
    for _ in range(2):
        recorder.begin_pass(2, 8)
    tokens = torch.tensor([[4, 3], [1, 2]])
    recorder.append(tokens, torch.stack((codes("max_loops", "min_delta"), codes("min_delta", "value_gain"))))
    recorder.begin_pass(2, 8)
    recorder.append(torch.tensor([[5], [0]]), codes("confidence", "forced")[:, None])
    return recorder


def test_where_rows_differ_the_last_token_of_a_pass_stands_for_the_new_one() -> None:
    recorder = recorder_of_two_rows()
    assert recorder.mixes_depths
    assert recorder.token_loops(OWN).tolist() == [[3, 5], [2, 0]]
    assert recorder.halt_reasons(OWN, [2, 1]) == [["min_delta", "confidence"], ["value_gain"]]


def test_a_pass_counts_with_its_deepest_token() -> None:
    recorder = recorder_of_two_rows()
    assert [p.tolist() for p in recorder.passes] == [[8, 8], [4, 2], [5, 0]]
    assert recorder.total_loops(OWN, [2, 1]).tolist() == [17, 10]


def test_phases_are_apart_and_ended_rows_do_not_count() -> None:
    phases = recorder_of_two_rows().by_phase()
    assert phases == {
        "prefill": {"passes": 2, "mean_loops": 5.5, "max_loops": 8},
        "decode": {"passes": 1, "mean_loops": 5.0, "max_loops": 5},
    }


def test_at_equal_depths_a_row_is_charged_up_to_its_last_token() -> None:
    recorder = LoopRecorder()
    for _ in range(3):
        recorder.begin_pass(2, 4)
        recorder.append(torch.tensor([4, 4]))
    assert not recorder.mixes_depths
    own = torch.tensor([[0] * 3, [1] * 3])
    assert recorder.total_loops(own, [3, 1]).tolist() == [12, 4]
    assert recorder.halt_reasons(own, [3, 1]) == [["max_loops"] * 3, ["max_loops"]]


def test_a_draft_counts_its_passes_with_the_request_and_keeps_its_tokens_to_itself() -> None:
    recorder = LoopRecorder()
    draft = copy.deepcopy(recorder)
    draft.begin_pass(1, 2)
    draft.append(torch.tensor([2]))
    assert len(recorder.passes) == 1 and not recorder.steps


def test_a_beam_is_charged_for_the_rows_that_it_came_through() -> None:
    recorder = LoopRecorder()
    for loops, reason in (([3, 3], "max_loops"), ([1, 5], "min_delta"), ([2, 4], "confidence")):
        recorder.begin_pass(2, 8)
        recorder.append(torch.tensor(loops), codes(reason, "value_gain"))
    origins = torch.tensor([[0, 1, 0], [0, 0, 1]])
    assert recorder.token_loops(origins).tolist() == [[3, 5, 2], [3, 1, 4]]
    assert recorder.total_loops(origins, [3, 2]).tolist() == [10, 4]
    assert recorder.halt_reasons(origins, [3, 2]) == [
        ["max_loops", "value_gain", "confidence"],
        ["max_loops", "min_delta"],
    ]


def test_a_pass_without_a_token_is_forgotten() -> None:
    recorder = recorder_of_two_rows()
    recorder.begin_pass(2, 8)
    recorder.abandon_pass()
    assert len(recorder.passes) == 3
    empty = LoopRecorder()
    empty.begin_pass(2, 8)
    empty.abandon_pass()
    assert not empty.passes
