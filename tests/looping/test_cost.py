"""The cost formulas against torch's own counter of operations and against what a cache really holds."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cognexis import CognexisCache
from cognexis.looping.cost import core_flops_per_token, token_bytes
from tests.batteries.invariance import left_padding, token_ids
from tests.batteries.scripted_schedulers import ByTable
from tests.batteries.tiny import tiny_config, tiny_model

_SLIDING = {"sliding_window": 4, "core_layer_types": ["sliding_attention"]}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gate and linear injection": {},
    "no gate, no injection": {"recurrent_gating": False, "input_injection": "none"},
    "identity injection": {"injection_projection": "identity"},
    "concat_project": {"input_injection": "concat_project"},
    "gate_condition": {"input_injection": "gate_condition"},
    "attention_memory": {"input_injection": "attention_memory"},
    "sliding": _SLIDING,
    "one key/value head": {"num_key_value_heads": 1},
    "feed-forward without a gate": {"ffn_activation": "gelu"},
    "two blocks": {
        "num_recurrent_blocks": 2,
        "experimental_multi_block": True,
        "sliding_window": 4,
        "core_layer_types": ["sliding_attention", "full_attention"],
    },
    "a core of its own shape": {
        "stage_overrides": {"core": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}}
    },
}


def counted(model: Any, cached: int, new: int, loops: int) -> int:
    """Operations of one forward of ``new`` tokens behind ``cached`` ones."""
    ids = token_ids(model, 1, cached + new)
    cache = CognexisCache(model.config)
    if cached:
        model(ids[:, :cached], num_loops=loops, past_key_values=cache)
    with FlopCounterMode(display=False) as counter:
        model(ids[:, cached:], num_loops=loops, past_key_values=cache)
    return counter.get_total_flops()


@pytest.mark.parametrize("cached, new", [(9, 1), (0, 4)])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_the_operations_of_a_loop_are_those_that_torch_counts(name: str, cached: int, new: int) -> None:
    model = tiny_model(tiny_config(**CONFIGURATIONS[name]))
    model.set_attn_implementation("eager")
    one_loop = counted(model, cached, new, 3) - counted(model, cached, new, 2)
    assert one_loop / new == pytest.approx(core_flops_per_token(model.config, cached + new), rel=0.02)


@torch.no_grad()
def test_the_loop_embedding_of_the_gate_counts_for_every_token() -> None:
    model = tiny_model(tiny_config(gate_loop_embedding=True))
    model.set_attn_implementation("eager")
    found = {new: counted(model, 9, new, 3) - counted(model, 9, new, 2) for new in (1, 4)}
    assert found[1] == pytest.approx(core_flops_per_token(model.config, 10), rel=0.02)
    saved = 3 * 2 * model.config.hidden_size**2  # one projection serves the four tokens of a call
    assert found[4] + saved == pytest.approx(4 * core_flops_per_token(model.config, 13), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["gate and linear injection", "attention_memory", "one key/value head", "a core of its own shape"]
)
@torch.no_grad()
def test_the_bytes_of_tokens_add_up_to_those_of_the_cache(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_config(num_coda_blocks=2, **CONFIGURATIONS[name])).to(dtype)
    mask = left_padding([7, 5])
    depths = torch.randint(1, 5, mask.shape)
    scheduler, cache, expected = ByTable(depths), CognexisCache(model.config), 0
    ids = token_ids(model, 2, 7)
    for start, end in ((0, 5), (5, 6), (6, 7)):
        model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            loop_mode="adaptive_token",
            halt_dependency="token",
            scheduler=scheduler,
        )
        own = (depths * mask)[:, start:end].flatten().tolist()
        expected += sum(token_bytes(model.config, loops, dtype.itemsize) for loops in own)
        assert cache.memory_bytes() == expected


def test_each_loop_of_a_token_adds_one_entry_of_the_core() -> None:
    config = tiny_config()
    entry = 2 * 2 * 8 * 4  # key and value of 2 heads of 8 numbers of 4 bytes
    assert [token_bytes(config, loops, 4) for loops in range(3)] == [entry * (3 + 1 + loops) for loops in range(3)]
