"""Loss terms against what they are by hand."""

import pytest
import torch
from torch import nn

from cognexis.decoder.loss import causal_lm_loss
from cognexis.errors import InvalidConfigError
from cognexis.looping.value_head import attach_value_head
from cognexis.training.losses.auxiliary import (
    early_consistency,
    listed_depth,
    multi_depth_loss,
    router_balance,
    value_head_losses,
)
from cognexis.training.losses.watched_run import watched
from tests.batteries.tiny import tiny_config, tiny_model

IDS = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def run_of(model, num_loops, **inputs):
    with watched(model) as run:
        model(input_ids=IDS, num_loops=num_loops, use_cache=False, **inputs)
    return run


def test_watched_run_reads_each_loop_as_a_run_of_that_many_loops():
    model = tiny_model()
    run = run_of(model, 4)
    assert run.num_loops == 4
    for loop in (3, 1, 4, 2):
        expected = model(input_ids=IDS, num_loops=loop, use_cache=False).logits
        torch.testing.assert_close(model.lm_head(run.normed(loop)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", [None, 2])
def test_multi_depth_loss_is_the_weighted_sum_of_separate_runs(every):
    model = tiny_model().train()
    if every is not None:
        options = {"use_reentrant": False, "every_k_loops": every}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    weights = {2: 0.25, 4: 1.0}
    run = run_of(model, 4)
    loss = multi_depth_loss(run, weights, lambda h: causal_lm_loss(model.lm_head(h), IDS, 64))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    manual = sum(w * model(input_ids=IDS, labels=IDS, num_loops=n, use_cache=False).loss for n, w in weights.items())
    manual.backward()
    assert loss.item() == pytest.approx(manual.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_multi_depth_leaves_out_depths_that_the_run_does_not_reach():
    model = tiny_model()
    run = run_of(model, 2)
    loss = multi_depth_loss(run, {2: 0.5, 4: 1.0}, lambda h: h.new_tensor(3.0))
    assert loss.item() == 1.5
    with pytest.raises(InvalidConfigError, match="none of these depths is reached in 2 loops"):
        multi_depth_loss(run, {4: 1.0}, lambda h: h.sum())
    with pytest.raises(InvalidConfigError, match="weights must be 0 or more"):
        multi_depth_loss(run, {2: -1.0}, lambda h: h.sum())


def test_drawn_count_becomes_a_listed_depth():
    assert [listed_depth(drawn, (2, 4, 8)) for drawn in range(1, 10)] == [2, 2, 2, 4, 4, 4, 4, 8, 8]


def losses_of(model, run, targets):
    """``[B, T, L]``, computed without the code under test."""
    return torch.stack(
        [
            nn.functional.cross_entropy(model.lm_head(run.normed(n)).transpose(1, 2), targets, reduction="none")
            for n in range(1, run.num_loops + 1)
        ],
        dim=-1,
    )


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_value_loss_compares_the_head_with_measured_gains_and_leaves_the_trunk_alone(kind):
    model = tiny_model()
    head = attach_value_head(model, {"kind": kind, "features": ["relative_delta"]})
    targets = IDS.roll(-1, 1)
    is_target = torch.ones_like(IDS, dtype=torch.bool)
    is_target[:, -1] = False
    is_real = torch.ones_like(is_target)
    run = run_of(model, 3)
    value, further = value_head_losses(run, targets, is_target, is_real, horizon="next", huber_delta=100.0)
    losses = losses_of(model, run, targets)
    gains = (losses[..., :-1] - losses[..., 1:]).detach()
    states, before = run.states[:-1], [run.h0, run.states[0]]
    deltas = [(s - b).norm(dim=-1) / (b.norm(dim=-1) + 1e-6) for s, b in zip(states, before, strict=True)]
    read = [
        head(states[n].detach(), n + 1, is_real, {"relative_delta": deltas[n].detach()}) for n in range(len(states))
    ]
    predictions = torch.stack(read, dim=-1)
    if kind == "sequence":
        expected = (predictions - gains[:, :-1].mean(dim=1)).square().mean() / 2
    else:
        expected = (predictions - gains)[:, :-1].square().mean() / 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert further.item() == 0.0
    value.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient and all("value_head" in name for name in with_gradient)


def test_head_with_a_continue_logit_learns_the_decision():
    model = tiny_model()
    attach_value_head(model, {"kind": "token", "output_kind": "continue_logit"})
    run = run_of(model, 3)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    value, further = value_head_losses(run, IDS, mask, mask, gain_threshold=0.01)
    gains = -torch.diff(losses_of(model, run, IDS), dim=-1)
    best = torch.stack([gains[..., 0].maximum(gains.sum(-1)), gains[..., 1]], dim=-1)
    logits = torch.stack([model.model.value_head(s.detach(), n, mask) for n, s in enumerate(run.states[:-1], 1)], -1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, (best > 0.01).float())
    assert value.item() == 0.0 and further.item() == pytest.approx(expected.item(), rel=1e-4)


def test_one_loop_has_nothing_to_gain_and_the_head_still_takes_part():
    model = tiny_model()
    head = attach_value_head(model, {"kind": "token"})
    run = run_of(model, 1)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    value, _ = value_head_losses(run, IDS, mask, mask)
    value.backward()
    assert value.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_model_without_a_value_head_is_refused():
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with pytest.raises(InvalidConfigError, match="the model has no value head"):
        value_head_losses(run_of(tiny_model(), 2), IDS, mask, mask)


def test_consistency_is_the_relative_distance_to_the_last_state():
    run = run_of(tiny_model(), 4)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :4] = False
    early, full = run.states[1][mask], run.states[3][mask]
    expected = ((early - full).square().sum(-1) / full.square().sum(-1)).mean()
    assert early_consistency(run, 2, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    assert early_consistency(run, 9, mask).item() == 0.0


def test_router_balance_is_zero_only_where_experts_are_used_evenly():
    column = pytest.importorskip("cognexis.cortex_layers.blocks.column")
    router = column.GlobalContextRouter(8, 4, column_router_config())
    with torch.no_grad():
        router.keys.copy_(router.keys[:1].expand(4, -1))
    assert router_balance(router).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        router.w_q.weight.fill_(0.5)
        router.context.fill_(2.0)
        router.keys.normal_(generator=torch.Generator().manual_seed(0))
    loss = router_balance(router)
    assert 0 < loss.item() <= 3
    loss.backward()
    assert router.keys.grad.abs().sum() > 0


def column_router_config():
    from cognexis.cortex_layers.config import RouterConfig

    return RouterConfig()


def test_router_balance_of_a_model_without_columns_is_refused():
    with pytest.raises(InvalidConfigError, match="no Cortex column"):
        router_balance(tiny_model(tiny_config()))
