"""Norms, clipping and balance of gradients."""

import pytest
import torch
from torch import nn

from cognexis.errors import BackendError, InvalidConfigError
from cognexis.training.callbacks.gradients import (
    clip_by_norm,
    clip_each,
    divide_core_gradients,
    require_core_gradients,
    stage_norms,
    stage_of,
)
from tests.batteries.tiny import tiny_model

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def parameter(*gradient):
    p = nn.Parameter(torch.zeros(len(gradient)))
    p.grad = torch.tensor(gradient)
    return p


def test_common_norm_is_cut_and_the_norm_before_is_returned():
    p = parameter(3.0, 4.0)
    assert clip_by_norm([p], 1.0).item() == 5.0
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    with pytest.raises(InvalidConfigError, match="max_norm=0: must be positive"):
        clip_by_norm([p], 0)


def test_each_parameter_is_cut_by_itself():
    large, small, none = parameter(3.0, 4.0), parameter(0.3, 0.4), nn.Parameter(torch.zeros(2))
    clip_each([large, small, none], 1.0)
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert torch.equal(small.grad, torch.tensor([0.3, 0.4]))


def test_norms_by_stage_add_up_to_the_whole():
    model = tiny_model().train()
    model(input_ids=IDS, labels=IDS, num_loops=2, use_cache=False).loss.backward()
    norms = stage_norms(model)
    assert set(norms) == {"embedding", "prelude", "core", "coda", "head"}
    whole = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum()
    assert sum(norm.square() for norm in norms.values()).item() == pytest.approx(whole.item(), rel=1e-5)
    assert stage_of("module.base_model.model.model.recurrent.blocks.0.x") == "core"
    assert stage_of("score.weight") == "other"


def test_core_gradients_are_divided_by_the_loops_and_no_others():
    model = tiny_model().train()
    model(input_ids=IDS, labels=IDS, num_loops=4, use_cache=False).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    divide_core_gradients(model.model.recurrent, 4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] / (4 if ".recurrent." in name else 1))


def test_core_without_any_gradient_is_an_error_unless_it_is_frozen():
    model = tiny_model().train()
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS, num_loops=2, use_cache=False)
    with pytest.raises(BackendError, match=r"no gradient reached the \d+ trainable parameters of the recurrent core"):
        require_core_gradients(model.model.recurrent)
    model.model.recurrent.requires_grad_(False)
    require_core_gradients(model.model.recurrent)
