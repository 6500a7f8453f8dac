"""What watches the loops: finiteness flags, learned residual scales."""

import logging

import pytest
import torch

from cognexis.decoder.stability import all_finite, require_finite_states, residual_scale_report
from cognexis.errors import BackendError, NonFiniteError
from tests.batteries.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("flags", [None, [True], [True, True, True]])
def test_finite_states_pass(flags: list[bool] | None) -> None:
    require_finite_states(None if flags is None else torch.tensor(flags))


@pytest.mark.parametrize(
    "flags, place",
    [
        ([False, False, False], "entering the recurrent core"),
        ([True, False, False, False], "after loop 1"),
        ([True, True, False, False], "after loop 2"),
        ([True, True, True, False], "after loop 3"),
    ],
)
def test_first_loop_that_is_not_finite_is_named(flags: list[bool], place: str) -> None:
    with pytest.raises(NonFiniteError, match=f"{place} \\(of {len(flags) - 1} loops\\)") as caught:
        require_finite_states(torch.tensor(flags))
    assert isinstance(caught.value, BackendError) and isinstance(caught.value, RuntimeError)
    assert caught.value.code == "non_finite"


@pytest.mark.parametrize("mode", ["learned_scalar", "learned_vector"])
def test_report_holds_the_range_of_each_learned_scale(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    core = tiny_model(tiny_config(recurrent_residual_mode=mode)).model.recurrent
    with torch.no_grad():
        core.blocks[0].attention_residual_scale.fill_(0.5)[-1] = 1.5
        core.blocks[0].feed_forward_residual_scale.fill_(-0.25)
    low = 1.5 if mode == "learned_scalar" else 0.5
    with caplog.at_level(logging.WARNING, logger="cognexis"):
        report = residual_scale_report(core)
    assert report == {"blocks.0.attention": (low, 1.5), "blocks.0.feed_forward": (-0.25, -0.25)}
    assert caplog.records == []


@pytest.mark.parametrize("value", [2.5, -2.5])
def test_scale_beyond_the_limit_is_warned_about(value: float, caplog: pytest.LogCaptureFixture) -> None:
    core = tiny_model(tiny_config(recurrent_residual_mode="learned_vector")).model.recurrent
    with torch.no_grad():
        core.blocks[0].feed_forward_residual_scale[3] = value
    with caplog.at_level(logging.WARNING, logger="cognexis"):
        residual_scale_report(core)
        assert "blocks.0.feed_forward: residual scale 2.5 exceeds the limit 2.0" in caplog.text
        caplog.clear()
        residual_scale_report(core, limit=3.0)
    assert caplog.records == []


def test_fixed_scale_is_reported_without_a_range() -> None:
    core = tiny_model(tiny_config(recurrent_residual_mode="fixed", recurrent_residual_scale=0.5)).model.recurrent
    assert residual_scale_report(core) == dict.fromkeys(("blocks.0.attention", "blocks.0.feed_forward"), (0.5, 0.5))


def test_diagnostics_carry_the_learned_scales() -> None:
    ids = torch.randint(0, 64, (1, 4))
    for mode, present in (("learned_scalar", True), ("fixed", False)):
        model = tiny_model(tiny_config(recurrent_residual_mode=mode))
        diagnostics = model(ids, return_loop_stats=True).loop_diagnostics
        assert bool(diagnostics.residual_scales) == present


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_bad_value_anywhere_is_seen_and_extreme_ones_are_not(dtype):
    states = torch.randn(2, 5, 7).to(dtype)
    states[0, 0, 0], states[1, 1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(states) and all_finite(states[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = states.clone()
        bad[1, 4, 6] = value
        assert not all_finite(bad)
