"""Probes of a depth against values computed in another way."""

import pytest
import torch

from cognexis.eval_harness.scaling.probes import continue_greedily, probe_depth, repetition_rate
from tests.batteries.state_layers import overrides
from tests.batteries.tiny import tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 17, 33], [7, 7, 12, 40]])


def largest_singular_value(model, ids, num_loops):
    """By the dense Jacobian of the last loop, whose input enters the core at one place (without a gate)."""
    recurrent, found = model.model.recurrent, []
    original = recurrent.entered

    def entered(state, h0):
        found.append(state.detach().requires_grad_())
        return original(found[-1], h0.detach())

    recurrent.entered = entered
    handle = recurrent.loop_state.register_forward_hook(lambda *args: found.append(args[2]))
    model(input_ids=ids, num_loops=num_loops, use_cache=False)
    handle.remove()
    del recurrent.entered
    before, after = found[-2:]
    lines = [torch.autograd.grad(x, before, retain_graph=True)[0].flatten() for x in after.flatten()]
    return torch.linalg.matrix_norm(torch.stack(lines), 2)


@pytest.mark.parametrize(
    ("name", "num_loops"), [("residual", 1), ("residual", 3), ("attention_memory", 2), ("mlstm", 2)]
)
def test_gain_is_the_largest_singular_value_of_the_jacobian(name, num_loops):
    changes = overrides("mlstm", "core") if name == "mlstm" else {"input_injection": name}
    model = tiny_model(tiny_config(**changes, recurrent_gating=False))
    expected = torch.stack([largest_singular_value(model, row[None], num_loops) for row in IDS]).mean().item()
    found = probe_depth(model, IDS, num_loops).loop_gain
    assert 0.9 * expected < found < 1.01 * expected  # power iteration comes from below


def test_gain_of_16_bit_weights_is_not_measured():
    assert probe_depth(tiny_model().to(torch.bfloat16), IDS, 2).loop_gain is None


def test_entropy_of_the_attention_is_that_of_its_recorded_weights():
    model = tiny_model()
    found = probe_depth(model, IDS, 3).attention_entropies
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(input_ids=IDS, num_loops=3, use_cache=False, output_attentions=True).attentions
    in_core = weights[2:5]  # behind two blocks of the prelude, in the order of execution
    expected = [torch.special.entr(layer).sum(-1).mean().item() for layer in in_core]
    assert found == pytest.approx(expected, rel=1e-4)


def test_probing_leaves_the_model_as_it_was():
    model = tiny_model()
    before = model.config._attn_implementation
    with torch.no_grad():
        expected = model(input_ids=IDS, num_loops=2).logits
    probe_depth(model, IDS, 2)
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.recurrent.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, num_loops=2).logits, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_core_without_attention_has_no_entropy_of_it():
    assert probe_depth(tiny_model(tiny_config(**overrides("axon", "core"))), IDS, 2).attention_entropies is None


def test_texts_are_continued_up_to_the_end():
    model = tiny_model()
    texts = continue_greedily(model, IDS, 2, 6)
    with torch.no_grad():
        step = model(input_ids=IDS, num_loops=2).logits[:, -1].argmax(-1)
    assert [text[0] for text in texts] == step.tolist() and all(len(text) <= 6 for text in texts)
    model.config.eos_token_id = model.generation_config.eos_token_id = texts[0][2]
    shorter = continue_greedily(model, IDS, 2, 6)[0]
    assert shorter == texts[0][: texts[0].index(texts[0][2])]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["abcdefgh"], 0.0),
        (["aaaaaaaa"], 1 - 1 / 5),
        (["abababab", "xyz"], 1 - 2 / 5),
        (["abcd", "abcd"], 0.0),
        (["abc"], None),
        ([], None),
    ],
)
def test_repeated_pieces_count_once(texts, expected):
    assert repetition_rate(texts) == (None if expected is None else pytest.approx(expected))
