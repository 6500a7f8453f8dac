"""Columns: what the router, the mixer and top-k do."""

import pytest
import torch

from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.column.routers import GlobalContextRouter, active_experts, gate_weights
from cognexis.cortex_layers.blocks.registry import build_block_at_width
from cognexis.cortex_layers.config import (
    ColumnBlockConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
)
from tests.batteries.cell_properties import PROPERTIES, Unit, randomised
from tests.batteries.leaky_cell import LeakyCell, LeakyCellConfig

WIDTH = 6


def expert(decay):
    return PassThroughBlockConfig(cell=LeakyCellConfig(decay=decay))


EXPERTS = [expert(0.9), PostUpBlockConfig(cell=LeakyCellConfig()), PreUpBlockConfig(cell=LeakyCellConfig())]


def column(experts=EXPERTS, **settings):
    alpha = {"alpha_init": settings.pop("alpha_init")} if "alpha_init" in settings else {}
    config = ColumnBlockConfig(experts=experts, router=RouterConfig(**settings), **alpha)
    return build_block_at_width(config, WIDTH)


ROUTERS = {
    "all": {},
    "no refinement": {"whisper_lambda": 0.0},
    "top 1": {"top_k": 1},
    "top 2": {"top_k": 2},
    "top 2 per token": {"top_k": 2, "restrict_to_topk": False},
}


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["all", "top 2 per token"])
def test_column_keeps_the_shared_rules(name, holds):
    # Routes are chosen by comparison: a token whose scores lie close may take another one in 16 bits.
    holds(Unit(randomised(column(**ROUTERS[name])), coarse=0.08 if name == "all" else 1.0))


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_column_starts_near_the_identity(settings):
    x = torch.randn(4, 8, WIDTH)
    block = column(**settings)
    assert (block(x, None)[0] - x).norm() / x.norm() < 0.03
    still = column(alpha_init=0.0, **settings)
    assert torch.equal(still(x, None)[0], x)


def test_column_computes_its_formula():
    block = randomised(column(d_key=5, temperature=0.7, whisper_lambda=0.3)).double()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    u = x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt() * block.boundary_norm.weight
    outputs = [each(u, None)[0] for each in block.experts]
    deltas = [y - u for y in outputs]
    router, refiner, mixer = block.router, block.refiner, block.e_mixer
    prior = (router.keys @ router.w_k.weight.T) @ (router.w_q.weight @ router.context) / 5**0.5 / 0.7
    p = (u @ refiner.w_t.weight.T) @ refiner.keys.T / 5**0.5
    a = (prior + 0.3 * (p - p.mean(-1, keepdim=True))).softmax(-1)
    mixed = []
    for i, delta in enumerate(deltas):
        q = u @ mixer.w_q.weight.T + mixer.q_bias[i]
        scores = torch.stack([(q * (other @ mixer.w_k.weight.T)).sum(-1) for other in deltas], -1) / 5**0.5
        seen = sum(scores.softmax(-1)[..., j, None] * (other @ mixer.w_v.weight.T) for j, other in enumerate(deltas))
        mixed.append(delta + seen @ mixer.w_o.weight.T)
    m = sum(a[..., i, None] * mixed[i] for i in range(3)) + u - x
    expected = x + block.alpha_main * m + block.alpha_col * block.head(m)
    torch.testing.assert_close(block(x, None)[0], expected)


def test_one_expert_alone_is_the_column():
    block = column([expert(0.9)])
    x = torch.randn(2, 4, WIDTH)
    assert torch.equal(block(x, None)[0], block.experts[0](x, None)[0])
    assert [name.split(".")[0] for name, _ in block.named_parameters()] == ["experts"]
    assert block.router is block.refiner is block.e_mixer is block.head is block.boundary_norm is None
    assert block.alpha_main is None and block.alpha_col is None


def test_state_has_an_entry_per_expert():
    _, state = column()(torch.randn(2, WIDTH), None)
    assert list(state.keys()) == ["expert_PassThroughBlock_0", "expert_PostUpBlock_1", "expert_PreUpBlock_2"]


@pytest.mark.parametrize("settings", ROUTERS.values(), ids=ROUTERS)
def test_router_and_mixer_have_gradients_within_three_optimizer_steps(settings):
    """Both projections of the router at zero, or a top-k outside the graph, would leave it without any."""
    block = column(**settings)
    generator = torch.Generator().manual_seed(5)
    x, target = (torch.randn(4, 6, WIDTH, generator=generator) for _ in range(2))
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)
    seen: dict[str, float] = {}
    for _ in range(4):
        optimizer.zero_grad()
        (block(x, None)[0] - target).pow(2).mean().backward()
        for name, parameter in block.named_parameters():
            if parameter.grad is not None:
                seen[name] = max(seen.get(name, 0.0), parameter.grad.abs().max().item())
        optimizer.step()
    parts = ["router", "refiner", "head", "boundary_norm", "alpha_main", "alpha_col"]
    # With one active expert the mixer attends to that expert alone, which leaves nothing to learn for q and k.
    parts += ["e_mixer.w_v", "e_mixer.w_o"] if settings.get("top_k") == 1 else ["e_mixer"]
    names = [name for name, _ in block.named_parameters() if name.startswith(tuple(parts))]
    assert names and not [name for name in names if seen.get(name, 0.0) == 0.0]


def test_router_learns_to_prefer_the_better_expert():
    torch.manual_seed(0)
    block = column([expert(0.0), expert(0.95)], alpha_init=1.0)
    x = torch.randn(8, 12, WIDTH)
    target = block.experts[1](block.boundary_norm(x), None)[0].detach()
    optimizer = torch.optim.AdamW([*block.router.parameters()], lr=3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (block(x, None)[0] - target).pow(2).mean().backward()
        optimizer.step()
    assert block.router()[1] > 0.9


def test_router_gate_is_uniform_at_the_start():
    router = GlobalContextRouter(WIDTH, 4, RouterConfig())
    torch.testing.assert_close(router(None), torch.full((4,), 0.25))
    logits = GlobalContextRouter(WIDTH, 4, RouterConfig(top_k=2)).global_logits(restrict_topk=True)
    assert logits.isinf().tolist() == [False, False, True, True]


def test_router_that_could_never_learn_is_refused():
    with pytest.raises(ValueError, match="init_scale_wk=0"):
        RouterConfig(init_scale_wk=0)


def test_active_experts_are_exactly_k_and_ties_go_to_the_lowest_index():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 3.0, 2.0], [0.0, 1.0, 1.0, 1.0]])
    assert active_experts(scores, 2).nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [2, 1], [2, 2]]
    assert (active_experts(torch.zeros(3, 64), 7).sum(-1) == 7).all()


def test_gate_of_one_expert_is_one_and_learns_from_its_share():
    scores = torch.tensor([0.3, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    weights = gate_weights(scores, active_experts(scores, 1), 1)
    assert weights.tolist() == [0.0, 1.0, 0.0]
    (2 * weights[1] + 5 * weights[0]).backward()
    other = scores.detach().clone().requires_grad_()
    (2 * other.softmax(-1)[1]).backward()
    torch.testing.assert_close(scores.grad, other.grad)


def test_gate_of_several_experts_is_differentiable():
    scores = torch.tensor([0.3, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    weights = gate_weights(scores, active_experts(scores, 2), 2)
    torch.testing.assert_close(weights[:2], scores[:2].softmax(-1))
    assert weights[2] == 0
    weights[0].backward()
    assert scores.grad[0] > 0 and scores.grad[1] < 0 and scores.grad[2] == 0


@pytest.mark.parametrize("restrict", [True, False])
def test_top_k_holds_with_and_without_restriction(restrict):
    block = randomised(column(top_k=2, restrict_to_topk=restrict, whisper_lambda=5.0))
    u = torch.randn(3, 20, WIDTH)
    weights, active = block.route(u)
    assert ((weights > 0).sum(-1) == 2).all()
    assert (weights[~active.expand(weights.shape)] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 20))
    routes = {tuple(route) for route in (weights > 0).flatten(0, 1).tolist()}
    if restrict:
        assert routes == {tuple((block.router() > 0).tolist())}
    else:
        assert len(routes) > 1, "refinement chooses per token"


@pytest.mark.parametrize("restrict", [True, False])
def test_inactive_experts_have_no_influence_no_gradient_and_a_state_that_advances(restrict):
    block = randomised(column(top_k=2, restrict_to_topk=restrict, whisper_lambda=0.0))
    inactive = (block.router() == 0).nonzero().item()
    x = torch.randn(2, 5, WIDTH)
    y, state = block(x, None)
    y.sum().backward()
    for i, each in enumerate(block.experts):
        used = any(parameter.grad is not None and parameter.grad.any() for parameter in each.parameters())
        assert used is (i != inactive)
    with torch.no_grad():
        for parameter in block.experts[inactive].parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(block(x, None)[0], y)
    assert (state[block.expert_keys[inactive]].get(("LeakyCell", "count")) == 6).all()


def test_top_k_of_all_experts_is_no_restriction():
    assert column(top_k=3).top_k is None
    with pytest.raises(ValueError, match="top_k=4"):
        column(top_k=4)


def test_column_without_experts_and_with_a_cell_is_refused():
    with pytest.raises(ValueError, match="experts"):
        ColumnBlockConfig(experts=[])
    cell = LeakyCell(LeakyCellConfig(hidden_size=WIDTH))
    with pytest.raises(ValueError, match="takes no cell"):
        ColumnBlock(config=ColumnBlockConfig(experts=EXPERTS), d_hidden=WIDTH, cell=cell)
