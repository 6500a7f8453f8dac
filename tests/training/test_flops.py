"""Operations by formula against torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cognexis.training.flops import forward_flops, step_flops
from tests.batteries.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("overrides", [{}, {"recurrent_gating": False, "input_injection": "none"}])
def test_operations_of_forward_and_backward_match_the_counter(overrides):
    model = tiny_model(tiny_config(**overrides)).train()
    model.set_attn_implementation("eager")
    ids = torch.randint(4, 60, (2, 24))
    for num_loops in (1, 4):
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids, labels=ids, num_loops=num_loops, use_cache=False).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        expected = forward_flops(model.config, ids.numel(), 24, num_loops)
        assert forward.get_total_flops() == pytest.approx(expected, rel=0.02)
        both = forward.get_total_flops() + backward.get_total_flops()
        assert both == pytest.approx(step_flops(model.config, ids.numel(), 24, num_loops), rel=0.02)


def test_truncated_backpropagation_costs_the_backward_of_its_last_loops():
    config = tiny_config(backprop_loops=1)
    full, truncated = tiny_config(), step_flops(config, 48, 24, 4)
    assert truncated == forward_flops(full, 48, 24, 4) + 2 * forward_flops(full, 48, 24, 1)
