"""The loops: recurrence, gate, injection, retention, truncated gradients, random start."""

import copy
import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis import CognexisForCausalLM
from cognexis.decoder.recurrent_core import CoreOutput, RecurrentCore, loop_embedding, position_noise
from cognexis.decoder.rope import CognexisRotaryEmbedding
from cognexis.errors import InvalidConfigError
from tests.batteries.tiny import tiny_config, tiny_model

INJECTIONS = ("none", "residual", "concat_project", "gate_condition", "attention_memory")


def core_of(dtype: torch.dtype = torch.float32, **overrides: Any) -> RecurrentCore:
    """The core of a random tiny model, in eval mode."""
    return tiny_model(tiny_config(**overrides)).to(dtype).model.recurrent


def start(length: int = 5, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """A prelude output."""
    return torch.randn(rows, length, 32, dtype=dtype)


def surroundings(core: RecurrentCore, h0: Tensor) -> dict[str, Any]:
    """Causal masks (over the memory too), angles and positions for ``h0``."""
    length = h0.shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    if core.memory_norm is not None:
        causal = torch.cat((causal, causal), dim=-1)
    positions = torch.arange(length)[None]
    return {
        "masks": dict.fromkeys(("full_attention", "sliding_attention"), causal),
        "position_embeddings": CognexisRotaryEmbedding(core.config)(h0, positions),
        "position_ids": positions,
    }


def run(core: RecurrentCore, h0: Tensor, loops: int, record: bool = False) -> CoreOutput:
    return core(h0, loops, record=record, **surroundings(core, h0))


def block_stage(core: RecurrentCore, x: Tensor, h0: Tensor, loop_index: int) -> Tensor:
    """R(x): all core blocks once."""
    around = surroundings(core, h0)
    turn = around["position_embeddings"]
    for block, kind in zip(core.blocks, core.layer_types, strict=True):
        memory = None
        if core.memory_norm is not None:
            memory = block.attention.project_memory(core.memory_norm(h0), turn, None)
        x = block(x, turn, around["masks"][kind], loop_index=loop_index, memory=memory)
    return x


def gate_of(core: RecurrentCore, state: Tensor, h0: Tensor, loop_index: int) -> Tensor:
    """sigmoid(W_g norm(h) + b_g [+ W_0 h_0] [+ e_t])."""
    logit = core.gate.proj(core.gate.norm(state))
    if core.config.input_injection == "gate_condition":
        logit = logit + core.gate.condition_proj(h0)
    if core.config.gate_loop_embedding:
        logit = logit + core.gate.loop_proj(loop_embedding(loop_index + 1, state))
    return torch.sigmoid(logit)


def by_hand(core: RecurrentCore, h0: Tensor, loops: int, state: Tensor | None = None, first: int = 0) -> list[Tensor]:
    """The states after each loop, from the equations of the module's docstring."""
    config, state, states = core.config, h0 if state is None else state, []

    def inject(h: Tensor) -> Tensor:
        if config.input_injection == "residual":
            source = h0 @ core.injection_proj.weight.T if config.injection_projection == "linear" else h0
            return h + config.injection_scale * source
        if config.input_injection == "concat_project":
            return torch.cat((h, h0), dim=-1) @ core.injection_proj.weight.T
        return h

    for loop_index in range(first, first + loops):
        if config.injection_site == "pre":
            update = block_stage(core, inject(state), h0, loop_index)
        else:
            update = inject(block_stage(core, state, h0, loop_index))
        if config.recurrent_gating:
            gate = gate_of(core, state, h0, loop_index)
            update = gate * update + (1 - gate) * state
        state = update if core.closing_norm is None else core.closing_norm(update)
        states.append(state)
    return states


# -- the recurrence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("norm", ["none", "closing", "sandwich"])
def test_loops_equal_as_many_applications_by_hand(injection: str, site: str, norm: str) -> None:
    core = core_of(
        torch.float64,
        input_injection=injection,
        injection_site=site,
        recurrent_norm=norm,
        gate_loop_embedding=True,
        state_retention="all",
    )
    h0 = start(dtype=torch.float64)
    # The matrix products of the injection are written out by hand: float64 rounding over four loops.
    torch.testing.assert_close(list(run(core, h0, 4).states), by_hand(core, h0, 4), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "injection, gating",
    [pair for pair in itertools.product(INJECTIONS, [True, False]) if pair != ("gate_condition", False)],
)
def test_n_loops_are_n_single_applications_bit_by_bit(injection: str, gating: bool) -> None:
    core = core_of(input_injection=injection, recurrent_gating=gating, injection_projection="identity")
    h0 = start()
    around = surroundings(core, h0)
    positions = around.pop("position_ids")
    memories = core.memories(h0, around["position_embeddings"], None)
    state = h0
    for loop_index in range(4):
        state, _ = core.loop(state, h0, loop_index, memories=memories, position_ids=positions, **around)
        assert torch.equal(run(core, h0, loop_index + 1).hidden_states, state)


def test_two_loops_are_one_and_one_more_without_injection() -> None:
    core, h0 = core_of(input_injection="none"), start()
    once = run(core, h0, 1).hidden_states
    assert torch.equal(run(core, h0, 2).hidden_states, run(core, once, 1).hidden_states)
    assert torch.equal(run(core, h0, 4).hidden_states, run(core, run(core, h0, 3).hidden_states, 1).hidden_states)


def test_several_core_blocks_run_in_order_within_each_loop() -> None:
    core = core_of(torch.float64, num_recurrent_blocks=3, experimental_multi_block=True)
    h0, order = start(dtype=torch.float64), []
    for index, block in enumerate(core.blocks):
        block.register_forward_hook(lambda *_, index=index: order.append(index))
    got = run(core, h0, 2).hidden_states
    assert order == [0, 1, 2] * 2
    torch.testing.assert_close(got, by_hand(core, h0, 2)[-1], rtol=1e-11, atol=1e-11)  # as above


def test_loop_uses_the_site_of_its_number_and_further_loops_add_sites() -> None:
    core, used = core_of(kv_slots=2), []
    keys = set(core.state_dict())
    run(core, start(), 5)
    sites = core.blocks[0].attention.sites
    assert [site.layer_idx for site in sites] == [3, 4, 5, 6, 7] and set(core.state_dict()) == keys
    for site in sites:
        site.register_forward_hook(lambda module, *_: used.append(module.layer_idx))
    run(core, start(), 4)
    assert used == [3, 4, 5, 6]


def test_record_holds_one_entry_per_state_and_the_mean_gates() -> None:
    core, h0 = core_of(torch.float64, state_retention="all"), start(dtype=torch.float64)
    out = run(core, h0, 3, record=True)
    norms = torch.stack([h.norm(dim=-1).mean() for h in (h0, *out.states)])
    # Records are float32.
    torch.testing.assert_close(out.norms, norms.float(), rtol=1e-6, atol=0)
    gates = [gate_of(core, h, h0, t).mean() for t, h in enumerate((h0, *out.states[:2]))]
    torch.testing.assert_close(out.gate_mean, torch.stack(gates).float(), rtol=1e-5, atol=0)
    assert out.is_finite.tolist() == [True] * 4
    plain = run(core, h0, 3)
    assert plain.norms is None and plain.gate_mean is None and plain.is_finite is None


# -- the gate ---------------------------------------------------------------------------------------------------------


def forced_gate(bias: float, dtype: torch.dtype = torch.float64, **overrides: Any) -> RecurrentCore:
    """A core without closing norm whose gate is nearly constant."""
    core = core_of(dtype, recurrent_norm="none", **overrides)
    with torch.no_grad():
        core.gate.proj.weight.zero_()
        core.gate.proj.bias.fill_(bias)
    return core


def test_closed_gate_keeps_the_state_and_open_gate_takes_the_update() -> None:
    h0 = start(dtype=torch.float64)
    closed, opened = forced_gate(-30.0), forced_gate(30.0)
    update = block_stage(closed, h0 + 0.5 * closed.injection_proj(h0), h0, 0)
    # sigmoid(-30) = 1e-13 of the difference remains.
    torch.testing.assert_close(run(closed, h0, 1).hidden_states, h0, rtol=0, atol=1e-11)
    torch.testing.assert_close(run(opened, h0, 1).hidden_states, update, rtol=0, atol=1e-11)
    torch.testing.assert_close(run(closed, h0, 4).hidden_states, h0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_gate_stays_strictly_between_zero_and_one(bias: float, dtype: torch.dtype) -> None:
    core, h0 = forced_gate(bias, dtype), start(dtype=dtype)
    gate = core.gate(h0, h0, 0)
    assert bool((gate > 0).all()) and bool((gate < 1).all())
    assert gate.dtype == torch.promote_types(dtype, torch.float32)


def test_mean_gate_is_reported_by_loop() -> None:
    # Float32 means of sigmoid(-2), far from the ends.
    out = run(forced_gate(-2.0), start(dtype=torch.float64), 3, record=True)
    assert out.gate_mean.tolist() == pytest.approx([1 / (1 + math.exp(2))] * 3, rel=1e-6)
    assert run(core_of(recurrent_gating=False), start(), 3, record=True).gate_mean is None


def test_fresh_gate_starts_at_the_configured_bias() -> None:
    model = CognexisForCausalLM(tiny_config(gate_init_bias=-1.5))
    assert model.model.recurrent.gate.proj.bias.unique().tolist() == [-1.5]


def test_loop_embedding_is_the_sinusoid_of_the_loop_number() -> None:
    like = torch.zeros(1, 8)
    rates = 10_000.0 ** (-torch.arange(4) / 4)
    for loop in (1, 2, 500):
        expected = torch.cat(((loop * rates).sin(), (loop * rates).cos()))
        torch.testing.assert_close(loop_embedding(loop, like), expected, rtol=0, atol=1e-4)  # float32 angles to 500
    assert loop_embedding(3, torch.zeros(1, 7)).shape == (7,), "odd widths exist"
    assert loop_embedding(3, like.bfloat16()).dtype == torch.bfloat16


def test_gate_sees_the_loop_number_only_with_a_loop_embedding() -> None:
    h0 = start()
    plain, aware = core_of(), core_of(gate_loop_embedding=True)
    assert torch.equal(plain.gate(h0, h0, 0), plain.gate(h0, h0, 3))
    assert not torch.allclose(aware.gate(h0, h0, 0), aware.gate(h0, h0, 3), atol=1e-3)
    assert plain.gate.loop_proj is None
    assert run(aware, h0, 9).hidden_states.isfinite().all(), "it exists for every loop"


# -- injection --------------------------------------------------------------------------------------------------------

EXTRA_PARAMETERS = {  # what each mode adds to the core without injection
    "none": {},
    "residual": {"injection_proj.weight": (32, 32)},
    "concat_project": {"injection_proj.weight": (32, 64)},
    "gate_condition": {"gate.condition_proj.weight": (32, 32)},
    "attention_memory": {
        "memory_norm.weight": (32,),
        "blocks.0.attention.memory_k_proj.weight": (16, 32),
        "blocks.0.attention.memory_v_proj.weight": (16, 32),
    },
}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_injection_mode_has_exactly_its_parameters(injection: str) -> None:
    names = dict(core_of(input_injection="none").named_parameters())
    extra = {n: tuple(p.shape) for n, p in core_of(input_injection=injection).named_parameters() if n not in names}
    assert extra == EXTRA_PARAMETERS[injection]


def test_identity_projection_has_no_parameters() -> None:
    assert core_of(injection_projection="identity").injection_proj is None


@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("injection", INJECTIONS[1:])
def test_injection_keeps_the_shape_and_changes_the_result(injection: str, site: str) -> None:
    plain, core = core_of(input_injection="none"), core_of(input_injection=injection, injection_site=site)
    missing, unexpected = core.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == set(EXTRA_PARAMETERS[injection]) and unexpected == []
    h0 = start()
    changed, reference = run(core, h0, 2).hidden_states, run(plain, h0, 2).hidden_states
    assert changed.shape == h0.shape and not torch.allclose(changed, reference, atol=1e-2)


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_later_tokens_never_reach_earlier_ones(injection: str, loops: int) -> None:
    core, h0 = core_of(input_injection=injection), start(length=6)
    later = h0.clone()
    later[:, 3:] += torch.randn(2, 3, 32)
    before, after = run(core, h0, loops).hidden_states, run(core, later, loops).hidden_states
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.equal(after[:, 3:], before[:, 3:])


def test_zero_scale_injects_nothing() -> None:
    plain, core = core_of(input_injection="none"), core_of(injection_scale=0.0)
    core.load_state_dict(plain.state_dict(), strict=False)
    h0 = start()
    assert torch.equal(run(core, h0, 3).hidden_states, run(plain, h0, 3).hidden_states)


def test_fresh_concatenation_starts_as_additive_injection() -> None:
    model = CognexisForCausalLM(tiny_config(input_injection="concat_project", injection_scale=0.25))
    core, eye = model.model.recurrent, torch.eye(32)
    assert torch.equal(core.injection_proj.weight.detach(), torch.cat((eye, 0.25 * eye), dim=1))
    state, h0 = start(), start()
    # Products with exact zeros and ones, but a matrix kernel may fuse them.
    torch.testing.assert_close(core.inject(state, h0), state + 0.25 * h0, rtol=1e-6, atol=1e-6)


# -- retained states --------------------------------------------------------------------------------------------------


def test_all_states_are_kept_and_the_last_is_the_result() -> None:
    core, h0 = core_of(state_retention="all"), start()
    out = run(core, h0, 4)
    assert len(out.states) == 4 and out.states[-1] is out.hidden_states
    for n, state in enumerate(out.states, start=1):
        assert torch.equal(state, run(core, h0, n).hidden_states)


def test_final_only_keeps_none_and_selected_keeps_its_loops() -> None:
    h0 = start()
    every = run(core_of(state_retention="all"), h0, 4).states
    assert run(core_of(), h0, 4).states == ()
    kept = run(core_of(state_retention="selected", selected_states=[1, 3]), h0, 4).states
    assert len(kept) == 2 and torch.equal(kept[0], every[0]) and torch.equal(kept[1], every[2])


def test_selected_loop_that_does_not_run_is_an_error() -> None:
    with pytest.raises(InvalidConfigError, match=r"selected_states=\[1, 3\]: loops \[3\]"):
        run(core_of(state_retention="selected", selected_states=[1, 3]), start(), 2)


def gradients(core: RecurrentCore, h0: Tensor, loss: Tensor) -> dict[str, Tensor]:
    core.zero_grad()
    h0.grad = None
    loss.backward()
    found = {name: p.grad.clone() for name, p in core.named_parameters()}
    return found | {"h0": h0.grad.clone()}


@pytest.mark.parametrize("injection", ["residual", "attention_memory"])
def test_checkpointed_states_have_the_gradients_of_all_states(injection: str) -> None:
    kept = core_of(input_injection=injection, state_retention="all").train()
    recomputed = core_of(input_injection=injection, state_retention="checkpointed").train()
    results = []
    for core in (kept, recomputed):
        torch.manual_seed(1)
        h0 = start().requires_grad_()
        out = run(core, h0, 4)
        assert len(out.states) == 4 and out.states[-1] is out.hidden_states
        weights = torch.randn(4, *h0.shape)
        results.append(gradients(core, h0, (torch.stack(out.states) * weights).sum()))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_checkpointed_states_are_recomputed_in_the_backward_pass() -> None:
    core, calls = core_of(state_retention="checkpointed").train(), []
    core.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    out = run(core, start().requires_grad_(), 3)
    assert len(calls) == 3
    out.hidden_states.sum().backward()
    assert len(calls) == 6


# -- truncated backpropagation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("retention", ["final_only", "all", "checkpointed"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_truncated_gradient_equals_a_prefix_without_gradient(k: int, retention: str, autocast: bool) -> None:
    """Casts made in the prefix without gradient must not stand in for the weights afterwards."""
    core = core_of(backprop_loops=k, state_retention=retention).train()
    torch.manual_seed(1)
    h0 = start().requires_grad_()

    def autocast_or_not() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    with autocast_or_not():
        truncated = run(core, h0, 4).hidden_states
        got = gradients(core, h0, truncated.float().square().sum())
    reference, around = copy.deepcopy(core), surroundings(core, h0) | {"memories": [None]}
    state = h0
    with torch.no_grad(), autocast_or_not():
        for loop_index in range(4 - k):
            state, _ = reference.loop(state, h0, loop_index, **around)
    with autocast_or_not():  # leaving the context above has dropped the casts it kept
        for loop_index in range(4 - k, 4):
            state, _ = reference.loop(state, h0, loop_index, **around)
        expected = gradients(reference, h0, state.float().square().sum())
    assert torch.equal(truncated, state)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(got[name], gradient), name


def test_truncation_with_checkpointing_has_the_gradients_of_plain_truncation() -> None:
    results = []
    for every in (0, 1, 2, 3):
        model = tiny_model(tiny_config(backprop_loops=3, default_loops=4)).train()
        if every:
            model.gradient_checkpointing_enable({"every_k_loops": every})
        ids = torch.arange(12).view(2, 6)
        model(ids, labels=ids).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert torch.equal(other[name], gradient), name


def test_truncation_longer_than_the_run_is_the_full_gradient() -> None:
    results = []
    for k in (None, 3, 9):
        core = core_of(backprop_loops=k).train()
        torch.manual_seed(1)
        h0 = start().requires_grad_()
        results.append(gradients(core, h0, run(core, h0, 3).hidden_states.square().sum()))
    assert all(torch.equal(results[0][n], results[i][n]) for i in (1, 2) for n in results[0])


def test_truncation_cuts_in_training_only() -> None:
    results = []
    for k in (None, 1):
        core = core_of(backprop_loops=k)
        torch.manual_seed(1)
        h0 = start().requires_grad_()
        results.append(gradients(core, h0, run(core, h0, 3).hidden_states.square().sum()))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_truncated_gradient_differs_from_the_full_one() -> None:
    results = []
    for k in (None, 1):
        core = core_of(backprop_loops=k).train()
        torch.manual_seed(1)
        h0 = start().requires_grad_()
        results.append(gradients(core, h0, run(core, h0, 4).hidden_states.square().sum()))
    assert not torch.allclose(results[0]["h0"], results[1]["h0"], rtol=1e-2)


# -- random start -----------------------------------------------------------------------------------------------------


def test_position_noise_is_unit_normal_and_unrelated_between_neighbours() -> None:
    noise = position_noise(torch.arange(4096)[None], 64)[0]  # 2^18 numbers
    assert noise.isfinite().all()
    # Four standard deviations: of a mean 4 / 2^9, of a standard deviation 4 / sqrt(2^19).
    assert abs(noise.mean().item()) < 0.008 and abs(noise.std().item() - 1) < 0.006
    within = (noise.abs() < 1).float().mean().item()
    assert abs(within - 0.6827) < 4 * math.sqrt(0.6827 * 0.3173 / 2**18)
    for one, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[2048:], noise[:2048])):
        assert abs((one * other).mean().item()) < 0.011, "four deviations of 1 / sqrt(2^17)"
    assert len(noise.unique()) > 0.98 * noise.numel(), "float32 numbers collide now and then"


def test_position_noise_depends_on_position_and_feature_only() -> None:
    whole = position_noise(torch.arange(9)[None], 16)
    assert torch.equal(position_noise(torch.tensor([[7, 2, 2], [0, 8, 3]]), 16)[0, 0], whole[0, 7])
    assert torch.equal(position_noise(torch.tensor([[7, 2, 2], [0, 8, 3]]), 16)[1, 1], whole[0, 8])
    assert torch.equal(position_noise(torch.arange(5, 9)[None], 16), whole[:, 5:])
    assert position_noise(torch.tensor([[2**31 - 1]]), 16).isfinite().all()


def test_random_start_forgets_h0_except_through_the_injection() -> None:
    core = core_of(recurrent_init="random", injection_scale=0.0, recurrent_gating=False)
    first, second = start(), start()
    assert torch.equal(run(core, first, 2).hidden_states, run(core, second, 2).hidden_states)


def test_random_start_in_evaluation_is_fixed_and_independent_of_the_batch() -> None:
    model = tiny_model(tiny_config(recurrent_init="random")).double()
    ids = torch.randint(0, 64, (3, 7))
    torch.manual_seed(1)
    together = model(ids).logits
    torch.manual_seed(2)
    assert torch.equal(model(ids).logits, together)
    alone = torch.cat([model(row[None]).logits for row in ids])
    padded = model(
        torch.nn.functional.pad(ids, (2, 0), value=2),
        attention_mask=torch.nn.functional.pad(torch.ones_like(ids), (2, 0)),
    ).logits[:, 2:]
    # Kernels for other shapes sum float64 in another order.
    torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(padded, together, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("cuts", [(1, 6), (3, 4), (1, 1, 5), (2, 2, 3)])
def test_random_start_does_not_depend_on_how_the_sequence_is_cut(cuts: tuple[int, ...]) -> None:
    model = tiny_model(tiny_config(recurrent_init="random")).double()
    ids = torch.randint(0, 64, (2, 7))
    whole, cache, parts = model(ids).logits, None, []
    for part in ids.split(cuts, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-11)  # as above


def test_random_start_in_training_is_fresh_and_follows_the_seed() -> None:
    core, h0 = core_of(recurrent_init="random").train(), start()
    first, second = run(core, h0, 1).hidden_states, run(core, h0, 1).hidden_states
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = run(core, h0, 1).hidden_states
    torch.manual_seed(5)
    assert torch.equal(run(core, h0, 1).hidden_states, again)


# -- skipped loops ----------------------------------------------------------------------------------------------------


def test_loops_are_skipped_at_their_rate_in_training_and_never_in_evaluation() -> None:
    core, calls, h0 = core_of(recurrent_stochastic_depth=0.3), [], start(length=1, rows=1)
    core.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for _ in range(10):
            run(core, h0, 4)
        assert len(calls) == 40
        calls.clear()
        core.train()
        for _ in range(150):
            run(core, h0, 4)
    # Four standard deviations of a share of 600 draws: 4 * sqrt(0.21 / 600).
    assert len(calls) / 600 == pytest.approx(0.7, abs=0.075)


def test_skipped_loop_keeps_the_state_and_still_counts() -> None:
    model = tiny_model(tiny_config(recurrent_stochastic_depth=0.999, state_retention="all")).train()
    ids = torch.randint(0, 64, (2, 5))
    out = model(ids, num_loops=3, return_loop_stats=True)
    assert out.loop_counts.tolist() == [3, 3] and len(out.loop_states) == 3
    assert torch.equal(out.loop_states[0], out.loop_states[2])
    assert len(out.loop_diagnostics.norms) == 4


def test_mean_gates_stay_in_line_with_the_loops_when_some_are_skipped() -> None:
    model = tiny_model(tiny_config(recurrent_stochastic_depth=0.5)).train()
    ids = torch.randint(0, 64, (2, 5))
    for seed in range(4):
        torch.manual_seed(seed)
        gates = model(ids, num_loops=4, return_loop_stats=True).loop_diagnostics.gate_mean
        assert gates is not None and gates.shape == (4,)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_loops_skip_what_the_forward_pass_skipped(every: int) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model(tiny_config(recurrent_stochastic_depth=0.5, attention_dropout=0.2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"every_k_loops": every})
        ids = torch.arange(12).view(2, 6)
        torch.manual_seed(7)
        model(ids, labels=ids).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name
