"""The cost of the head against its savings, with a clock that the test winds."""

import pytest
import torch

from cognexis.looping.value_head import attach_value_head
from cognexis.training.scheduler.overhead import Overhead, decide, measure_overhead
from tests.batteries.tiny import tiny_model

VALUE, RULE = {"type": "value_head", "gain_threshold": 0.01}, {"type": "rule_based", "min_delta": 0.1}


def overhead(head_seconds: float, signal_seconds: float = 0.0) -> Overhead:
    return Overhead(1.0, head_seconds, signal_seconds, num_rows=1, length=1, device="cpu")


def decided(measured: Overhead, mean_loops: float = 4.0):
    return decide(measured, mean_loops=mean_loops, full_loops=8, value_scheduler=VALUE, rule_scheduler=RULE)


def test_head_that_saves_more_than_it_costs_is_kept():
    found = decided(overhead(0.5))
    assert not found.falls_back and found.scheduler == VALUE
    assert (found.cost_seconds, found.saved_seconds) == (2.0, 4.0) and "so it pays" in found.reason


@pytest.mark.parametrize(
    "measured, mean_loops",
    [(overhead(1.0), 4.0), (overhead(0.5, 0.5), 4.0), (overhead(2.0), 4.0), (overhead(1e-9), 8.0)],
    ids=["as much", "with its signals", "more", "saves nothing"],
)
def test_head_that_costs_what_it_saves_gives_way_to_the_rule(measured, mean_loops):
    found = decided(measured, mean_loops)
    assert found.falls_back and found.scheduler == RULE and "falls back to rule_based" in found.reason


def test_measured_seconds_are_differences_of_the_clock():
    model = tiny_model()
    work = {"core": 0.0}
    model.model.recurrent.loop_state.register_forward_hook(lambda *_: work.update(core=work["core"] + 3.0))
    head = attach_value_head(model, {"kind": "token", "bottleneck_size": 4, "features": ["entropy"]})
    head.register_forward_hook(lambda *_: work.update(core=work["core"] + 0.5))
    model.lm_head.register_forward_hook(lambda *_: work.update(core=work["core"] + 0.25))
    ids = torch.randint(0, 64, (2, 5))
    found = measure_overhead(model, ids, clock=lambda: work["core"])
    assert (found.core_seconds, found.head_seconds, found.signal_seconds) == (3.0, 0.5, 0.25)
    assert (found.num_rows, found.length, found.device) == (2, 5, "cpu")
    attach_value_head(model, {"kind": "token", "bottleneck_size": 4, "features": ["relative_delta"]})
    assert measure_overhead(model, ids, repeats=1, clock=lambda: work["core"]).signal_seconds == 0.0
    real = measure_overhead(model, ids, repeats=3)
    assert real.core_seconds >= 0 and real.head_seconds > 0
