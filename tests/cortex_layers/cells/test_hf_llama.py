"""What is special about a Llama layer as a cell; the rules of all cells come from the battery."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from cognexis.cortex_layers.cells.hf_llama import HFLlamaLayerCell, HFLlamaLayerConfig, LayerwiseCache
from cognexis.errors import BackendError
from tests.batteries.cell_properties import PROPERTIES, Unit, gradients_are_finite_differences, randomised

H = 16


def model(attention="sdpa", layers=1):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=H,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaModel(config).eval()


def cell(mem_len=32, attention="sdpa", **fields):
    inner = model(attention)
    return HFLlamaLayerCell(
        HFLlamaLayerConfig(
            hidden_size=H,
            mem_len=mem_len,
            hf_layer=inner.layers[0],
            hf_submodel=inner,
            hf_config=inner.config,
            **fields,
        )
    ).eval()


CASES = {"sdpa": {}, "eager": {"attention": "eager"}, "attached": {"detach_memory": False}}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "holds",
    [holds for holds in PROPERTIES if holds is not gradients_are_finite_differences],
    ids=lambda check: check.__name__,
)
def test_cell_keeps_the_shared_rules(holds, fields):
    holds(Unit(cell(**fields), streamed_gradients=fields.get("detach_memory") is False))


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_finite_differences(detach):
    """With norms that stay in float64; those of transformers round to float32, which no difference quotient bears."""
    module = randomised(cell(mem_len=6, detach_memory=detach), 0.1)
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = torch.nn.RMSNorm(H, eps=1e-6)
        norm.load_state_dict(getattr(module.layer, name).state_dict())
        setattr(module.layer, name, norm)
    gradients_are_finite_differences(Unit(module))


def test_rows_may_have_different_lengths():
    module = cell(mem_len=6).double()
    x = torch.randn(2, 12, H, dtype=torch.float64)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[1, 3] = True
    _, state = module(x[:, :5], None, resets=resets[:, :5])
    assert state["kv_len"].tolist() == [5, 2] and state["pos"].tolist() == [5, 2]
    _, state = module(x[:, 5:7], state)
    assert state["kv_len"].tolist() == [6, 4]
    _, fresh = module(x[1:, 3:7], None)
    torch.testing.assert_close(state["k"][1], fresh["k"][0])


def test_chunk_longer_than_the_memory_sees_all_of_it_and_keeps_the_last_entries():
    module, long = cell(mem_len=4).double(), None
    x = torch.randn(2, 9, H, dtype=torch.float64)
    y, state = module(x, None)
    module.mem_len = 9
    expected, long = module(x, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state["k"], long["k"][:, :, 5:])
    assert state["kv_len"].tolist() == [4, 4] and state["pos"].tolist() == [9, 9]


def test_without_memory_only_positions_are_kept():
    module = cell(mem_len=0)
    _, state = module(torch.randn(2, 5, H), None)
    assert sorted(state.keys()) == ["kv_len", "pos", "seg_pos"]
    assert state["pos"].tolist() == [5, 5] and state["kv_len"].tolist() == [0, 0]


def test_cache_in_place_keeps_its_address_and_gives_the_same_numbers():
    stable, copied = cell(mem_len=4, inplace_cache=True), cell(mem_len=4)
    copied.load_state_dict(stable.state_dict())
    x = torch.randn(2, 9, H)
    state, other = stable.init_state(2, device="cpu", dtype=torch.float32), None
    address = state["k"].data_ptr(), state["v"].data_ptr()
    for t in range(0, 9, 3):
        y, state = stable(x[:, t : t + 3], state)
        expected, other = copied(x[:, t : t + 3], other)
        torch.testing.assert_close(y, expected)
        assert (state["k"].data_ptr(), state["v"].data_ptr()) == address


def test_reset_state_keeps_other_rows_and_the_dtype():
    module = cell(mem_len=4).bfloat16()
    _, state = module(torch.randn(2, 3, H).bfloat16(), None)
    after = module.reset_state(state, torch.tensor([True, False]))
    assert after["k"].dtype == torch.bfloat16
    assert after["kv_len"].tolist() == [0, 3] and not after["k"][0].any()
    assert torch.equal(after["k"][1], state["k"][1])


def test_flash_attention_refuses_what_it_cannot_mask():
    module = cell()
    module.hf_config._attn_implementation = "flash_attention_2"
    x, resets = torch.randn(2, 3, H), torch.tensor([[0, 1, 0], [0, 0, 0]])
    with pytest.raises(BackendError, match="cannot respect resets"):
        module(x, None, resets=resets)
    state = module.init_state(2, device="cpu", dtype=torch.float32)
    state["kv_len"][1] = 2
    with pytest.raises(BackendError, match="rows of different length"):
        module(x, state)


def test_missing_layer_and_contradicting_settings_are_errors():
    with pytest.raises(ValueError, match="hf_layer is missing"):
        HFLlamaLayerCell(HFLlamaLayerConfig(hidden_size=H))
    with pytest.raises(ValueError, match="inplace_cache=True needs detach_memory=True"):
        cell(inplace_cache=True, detach_memory=False)


def test_cache_puts_new_entries_behind_old_ones():
    cache = LayerwiseCache()
    first, second = torch.randn(2, 1, 1, 2, 3).unbind(0)
    cache.update(first, first, 0)
    keys, _ = cache.update(second, second, 0)
    torch.testing.assert_close(keys, torch.cat([first, second], 2))
    assert cache.get_seq_length() == 4
