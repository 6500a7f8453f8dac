"""Attention: the reference numbers, masks, grouped heads, and eager against sdpa with gradients."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cognexis.decoder.attention import AttentionSite, CognexisAttention, eager_attention_forward
from cognexis.decoder.rope import CognexisRotaryEmbedding, rotate
from tests.batteries.tiny import tiny_config, tiny_model

BACKENDS = ("eager", "sdpa")


def site(backend: str = "eager", **overrides: Any) -> AttentionSite:
    """A site in eval mode with the head counts of a tiny configuration (by default 4 heads of 8, 2 for keys)."""
    config = tiny_config(**overrides)
    config._attn_implementation = backend
    return AttentionSite(config, config.block_spec("core"), 0, None).eval()


def one_head(backend: str, query: Any, key: Any, value: Any, visible: Any) -> Tensor:
    """Attention of one head of width 2 over lists of vectors; values may be single numbers. ``[T, 2]``."""
    module = site(backend, hidden_size=2, num_attention_heads=1, num_key_value_heads=1)
    q, k, v = (torch.tensor(x, dtype=torch.float64)[None, None] for x in (query, key, value))
    v = v[..., None].expand(*v.shape, 2) if v.ndim == 3 else v
    return module(q, k, v, torch.tensor(visible)[None, None])[0][0, :, 0]


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention written as loops; ``[B, N, T, D]`` queries, ``[B, G, S, D]`` keys, -inf in ``bias`` hides."""
    batch, heads, length, width = query.shape
    out = torch.zeros(batch, length, heads, width, dtype=query.dtype)
    for b in range(batch):
        for n in range(heads):
            g = n // (heads // key.shape[1])
            for t in range(length):
                scores = [
                    float(query[b, n, t] @ key[b, g, s]) / math.sqrt(width) + float(bias[b, 0, t, s])
                    for s in range(key.shape[2])
                ]
                if max(scores) == -math.inf:
                    continue
                weights = [math.exp(score - max(scores)) for score in scores]
                out[b, t, n] = sum(w / sum(weights) * value[b, g, s] for s, w in enumerate(weights))
    return out


# -- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rotated, second_row", [(False, 33.6936), (True, 41.1576)])
def test_causal_attention_gives_the_reference_numbers(backend: str, rotated: bool, second_row: float) -> None:
    query, key = torch.tensor([[10.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [10.0, 0.0]])
    if rotated:
        rotary = CognexisRotaryEmbedding(tiny_config(hidden_size=8, head_dim=2))
        turn = rotary(query, torch.tensor([[0, 1]]))
        query, key = (rotate(x[None, None], *turn)[0, 0] for x in (query, key))
    out = one_head(backend, query.tolist(), key.tolist(), [[1.0, 1.0], [100.0, 100.0]], [[True, False], [True, True]])
    assert out[0].tolist() == [1.0, 1.0]
    # The golden has four decimals.
    torch.testing.assert_close(out[1], torch.full((2,), second_row, dtype=torch.float64), rtol=0, atol=5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_documents_and_causality_combine(backend: str) -> None:
    """One query at position 2 of document 1; keys at 0, 1, 2 of documents 0, 1, 1, the last one padding."""
    position, documents, real = torch.arange(3), torch.tensor([0, 1, 1]), torch.tensor([True, True, False])
    visible = (position <= 2) & (documents == 1) & real
    out = one_head(
        backend, [[3.0, -1.0]], [[1.0, 2.0], [0.5, 0.5], [9.0, 9.0]], [1.0, 20.0, 100.0], visible[None].tolist()
    )
    assert out.tolist() == [[20.0, 20.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_that_sees_only_the_future_is_zero(backend: str) -> None:
    assert one_head(backend, [[1.0, 0.0]], [[1.0, 0.0]], [100.0], [[False]]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_equals_the_definition_written_as_loops(backend: str) -> None:
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 8, dtype=torch.float64)
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, -math.inf)
    bias[0, 0, 2] = -math.inf
    mask = bias.clamp(min=torch.finfo(torch.float64).min)
    if backend == "sdpa":  # takes minus infinity itself; the smallest finite value would leave a mean of values
        mask = bias
    out, _ = site(backend)(query, key, value, mask)
    # Another order of float64 sums.
    torch.testing.assert_close(out, attend(query, key, value, bias), rtol=1e-12, atol=1e-12)
    assert torch.equal(out[0, 2], torch.zeros(4, 8, dtype=torch.float64))


def test_boolean_and_additive_masks_mean_the_same() -> None:
    query, (key, value) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8)
    visible = torch.rand(2, 1, 5, 5) < 0.5
    visible[1, 0, 3] = False
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    by_bool, by_sum = (eager_attention_forward(site(), query, key, value, m, 8**-0.5) for m in (visible, additive))
    assert torch.equal(by_bool[0], by_sum[0]) and torch.equal(by_bool[1], by_sum[1])


def test_weights_sum_to_one_and_are_exactly_zero_at_hidden_keys() -> None:
    query, (key, value) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8)
    visible = torch.rand(2, 1, 5, 5) < 0.5
    visible[..., 0] = True
    visible[1, 0, 3] = False
    _, weights = eager_attention_forward(site(), query, key, value, visible, 8**-0.5)
    assert weights[~visible.expand_as(weights)].unique().tolist() == [0.0]
    sums = visible.any(-1).float().expand(2, 4, 5)
    torch.testing.assert_close(weights.sum(-1), sums, rtol=0, atol=1e-6)  # five float32 weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_large_scores_stay_finite(backend: str, size: float) -> None:
    query, (key, value) = size * torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 3, 8)
    out, _ = site(backend)(query, key, value, torch.ones(1, 1, 3, 3, dtype=torch.bool).tril())
    assert out.isfinite().all()


def test_hidden_keys_receive_no_gradient_and_nothing_is_nan() -> None:
    for backend in BACKENDS:
        query, (key, value) = torch.randn(1, 4, 4, 8), torch.randn(2, 1, 2, 4, 8)
        inputs = [x.requires_grad_() for x in (query, key, value)]
        visible = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
        visible[..., 2] = False  # key 2 is padding
        visible[0, 0, 1] = False  # row 1 sees nothing
        site(backend)(*inputs, visible)[0].square().sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)
        assert torch.equal(inputs[1].grad[:, :, 2], torch.zeros(1, 2, 8))
        assert torch.equal(inputs[2].grad[:, :, 2], torch.zeros(1, 2, 8))
        assert torch.equal(inputs[0].grad[:, :, 1], torch.zeros(1, 4, 8))


def test_query_heads_read_their_own_group() -> None:
    """Keys are equal, so each head returns the mean value of its group: 0 for heads 0 and 1, 1 for 2 and 3."""
    value = torch.stack((torch.zeros(3, 8), torch.ones(3, 8)))[None]
    for backend in BACKENDS:
        out, _ = site(backend)(torch.randn(1, 4, 3, 8), torch.zeros(1, 2, 3, 8), value, None)
        assert out[0, -1].mean(-1).tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_of_half_precision_scores_is_taken_in_float32(dtype: torch.dtype) -> None:
    """Scaled scores near 30 have steps of 1/8 in bfloat16: rounding them would move weights by several percent."""
    query, key = (5 * torch.randn(1, 4, 3, 8)).to(dtype), (5 * torch.randn(1, 2, 6, 8)).to(dtype)
    _, weights = eager_attention_forward(site(), query, key, key, None, 8**-0.5)
    scores = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)).float() * 8**-0.5
    assert scores.abs().max() > 30
    assert torch.equal(weights, scores.softmax(-1).to(dtype))
    assert not torch.equal(weights, scores.to(dtype).float().softmax(-1).to(dtype))


def test_dropout_acts_in_training_only() -> None:
    module = site(attention_dropout=0.5)
    inputs = torch.randn(1, 4, 6, 8), *torch.randn(2, 1, 2, 6, 8)
    assert torch.equal(module(*inputs)[0], module(*inputs)[0])
    module.train()
    dropped = module(*inputs)[1]
    share = (dropped == 0).float().mean().item()
    assert 0.3 < share < 0.7, "144 weights, each dropped with probability 1/2: 0.5 within five deviations of 0.04"
    kept = dropped[dropped != 0]
    assert torch.isin(kept, 2 * module.eval()(*inputs)[1]).all(), "what is kept is doubled"


# -- the projections --------------------------------------------------------------------------------------------------


def attention_of(**overrides: Any) -> CognexisAttention:
    """The attention of the core block of a random tiny model, in float64."""
    return tiny_model(tiny_config(**overrides)).double().model.recurrent.blocks[0].attention


def run(attention: CognexisAttention, hidden_states: Tensor, visible: Tensor | None = None) -> Tensor:
    length = hidden_states.shape[1]
    turn = CognexisRotaryEmbedding(tiny_config())(hidden_states, torch.arange(length)[None])
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return attention(hidden_states, turn, causal if visible is None else causal & visible)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_projections_have_the_shapes_of_their_variant(kv_heads: int, bias: bool) -> None:
    attention = attention_of(num_key_value_heads=kv_heads, attention_bias=bias)
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    wanted = {"q_proj": 32, "k_proj": 8 * kv_heads, "v_proj": 8 * kv_heads, "o_proj": 32}
    assert {name: shapes[f"{name}.weight"] for name in wanted} == {name: (n, 32) for name, n in wanted.items()}
    biases = {name: (n,) for name, n in wanted.items()} if bias else {}
    assert {n.removesuffix(".bias"): s for n, s in shapes.items() if n.endswith("bias")} == biases


def test_grouped_heads_equal_multi_head_attention_with_repeated_keys_and_values() -> None:
    grouped, full = attention_of(), attention_of(num_key_value_heads=4)
    with torch.no_grad():
        for name in ("q_proj", "o_proj"):
            getattr(full, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(grouped, name).weight.view(2, 8, 32).repeat_interleave(2, dim=0)
            getattr(full, name).weight.copy_(heads.reshape(32, 32))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    # The same products, summed by matrix kernels of another shape.
    torch.testing.assert_close(run(full, x), run(grouped, x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        full.v_proj.weight[8:16].mul_(2.0)  # head 1 now has values of its own
    assert not torch.allclose(run(full, x), run(grouped, x), atol=1e-3)


def test_block_equals_projections_rotation_and_loops() -> None:
    attention = attention_of(attention_bias=True)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    turn = CognexisRotaryEmbedding(tiny_config())(x, torch.arange(5)[None])
    heads = {
        name: (x @ p.weight.T + p.bias).view(2, 5, -1, 8).transpose(1, 2)
        for name, p in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj))
    }
    bias = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(
        ~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf
    )
    context = attend(rotate(heads["q"], *turn), rotate(heads["k"], *turn), heads["v"], bias).reshape(2, 5, 32)
    expected = context @ attention.o_proj.weight.T + attention.o_proj.bias
    torch.testing.assert_close(run(attention, x), expected, rtol=1e-12, atol=1e-12)  # another order of sums


def test_sites_hold_a_slot_each_and_no_parameters() -> None:
    attention = attention_of()
    assert [s.layer_idx for s in attention.sites] == [3, 4, 5, 6]
    assert [p for s in attention.sites for p in (*s.parameters(), *s.buffers())] == []
    keys = set(attention.state_dict())
    config = tiny_config()
    attention.train().add_site(config, config.block_spec("core"), 7)
    assert attention.sites[4].layer_idx == 7 and attention.sites[4].training
    assert set(attention.state_dict()) == keys


def test_memory_is_appended_as_further_keys_with_rotation() -> None:
    attention = attention_of(input_injection="attention_memory")
    x, memory = torch.randn(2, 1, 4, 32, dtype=torch.float64)
    turn = CognexisRotaryEmbedding(tiny_config())(x, torch.arange(4)[None])
    key, value = attention.project_memory(memory, turn, None)
    assert torch.equal(value, attention.memory_v_proj(memory).view(1, 4, 2, 8).transpose(1, 2))
    assert torch.equal(key, rotate(attention.memory_k_proj(memory).view(1, 4, 2, 8).transpose(1, 2), *turn))
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    hidden_memory = attention(x, turn, torch.cat((causal, torch.zeros_like(causal)), -1), memory=(key, value))
    torch.testing.assert_close(hidden_memory, attention(x, turn, causal), rtol=1e-12, atol=1e-12)  # zeros in the sums
    seen = attention(x, turn, torch.cat((causal, causal), -1), memory=(key, value))
    assert not torch.allclose(seen, hidden_memory, atol=1e-3)


# -- backends through the whole model ---------------------------------------------------------------------------------

FINISHED = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
FINISHED[0, 0, 2] = False  # a row that sees nothing
FINISHED[1, 0, 5:, 1] = False

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "left padding": {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])},
    "right padding": {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])},
    "hole": {"attention_mask": torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])},
    "nothing real": {"attention_mask": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])},
    "documents": {"document_ids": torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 4, 4, -1, -1, -1]])},
    "finished boolean mask": {"attention_mask": FINISHED},
    "finished additive mask": {
        "attention_mask": torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(
            ~FINISHED, torch.finfo(torch.float64).min
        )
    },
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"input_injection": "attention_memory"},
        {"core_layer_types": ["sliding_attention"], "sliding_window": 2},
        {"core_layer_types": ["sliding_attention"], "sliding_window": 2, "global_tokens": 1},
    ],
    ids=["full", "memory", "sliding", "global"],
)
def test_eager_and_sdpa_agree_in_logits_and_gradients_padding_included(overrides: dict[str, Any], call: str) -> None:
    eager = tiny_model(tiny_config(**overrides)).double()
    eager.set_attn_implementation("eager")
    sdpa = copy.deepcopy(eager)
    sdpa.set_attn_implementation("sdpa")
    ids = torch.randint(0, 64, (2, 7))
    results = []
    for model in (eager, sdpa):
        logits = model(ids, **CALLS[call]).logits
        logits.square().mean().backward()
        results.append((logits, {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0].isfinite().all() and all(g.isfinite().all() for g in results[0][1].values())
    # Kernels sum in another order; four loops of float64 leave about 1e-14.
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-11)


def test_only_eager_returns_attention_weights() -> None:
    """Shows that the backends compared above are different ones."""
    model = tiny_model()
    ids = torch.randint(0, 64, (1, 5))
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 2 + 4 + 1 and attentions[0].shape == (1, 4, 5, 5)
    calls = []
    interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)
    assert interface is not eager_attention_forward
    model.set_attn_implementation("sdpa")
    hook = model.model.recurrent.blocks[0].attention.sites[0].register_forward_hook(lambda m, i, o: calls.append(o[1]))
    model(ids)
    hook.remove()
    assert calls == [None]
