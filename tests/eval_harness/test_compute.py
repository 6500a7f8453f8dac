"""Costs: against values computed by hand and against torch's own counter."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cognexis import CognexisCache, CognexisConfig, CognexisForCausalLM
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.compute import (
    StageFlops,
    cache_bytes,
    dense_block_flops,
    elementwise_flops,
    generation_flops,
    head_flops,
    latency_summary,
    matmul_flops,
    token_updates,
)
from tests.batteries.state_layers import CELLS, STAGES, described, overrides
from tests.batteries.tiny import tiny_config

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_prelude_blocks": 1,
    "num_coda_blocks": 2,
    "trained_max_loops": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_dense_block_and_head_by_hand():
    block = dense_block_flops(3, 4, 2, 1, 2, 8, gated=True)
    assert block == 96 + 96 + 96 + 144 + 576 == 1008
    assert dense_block_flops(3, 4, 2, 1, 2, 8, gated=False) == 1008 - 2 * 3 * 4 * 8
    assert head_flops(3, 4, 300) == 7200
    assert (block + head_flops(3, 4, 300), 2 * block + head_flops(3, 4, 300)) == (8208, 9216)


@pytest.mark.parametrize("num_loops", [1, 2])
def test_model_is_the_sum_of_its_blocks(num_loops):
    config = CognexisConfig(**SMALL, recurrent_gating=False, input_injection="none")
    block = dense_block_flops(10, 32, 4, 2, 8, 64, gated=True)
    flops = matmul_flops(config, 10, num_loops)
    assert flops == StageFlops(block, num_loops * block, 2 * block, head_flops(10, 32, 97))
    assert flops.total == (3 + num_loops) * block + head_flops(10, 32, 97)


VARIANTS = {
    "defaults": {},
    "plain": {"recurrent_gating": False, "input_injection": "none"},
    "concatenated": {"input_injection": "concat_project"},
    "gate sees the input": {"input_injection": "gate_condition"},
    "memory": {"input_injection": "attention_memory"},
    "training preset": {"recurrent_gating": False, "injection_projection": "identity", "recurrent_norm": "sandwich"},
    "no gated activation": {"ffn_activation": "relu"},
    "one key head": {"num_key_value_heads": 1},
    "loop embedding": {"gate_loop_embedding": True},
    "sliding": {"prelude_layer_types": ["sliding_attention"], "sliding_window": 32},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_loops", [1, 3])
def test_formula_agrees_with_the_counter_of_torch(name, num_loops):
    config = CognexisConfig(**{**SMALL, **VARIANTS[name]}, attn_implementation="eager")
    model = CognexisForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 97, (2, 24)), num_loops=num_loops, use_cache=False)
    assert 2 * matmul_flops(config, 24, num_loops).total == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cached_step_agrees_with_the_counter_of_torch():
    config = CognexisConfig(**SMALL, attn_implementation="eager")
    model = CognexisForCausalLM(config).eval()
    with torch.no_grad():
        past = model(input_ids=torch.randint(3, 97, (1, 20)), num_loops=2, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.tensor([[5]]), num_loops=2, past_key_values=past, use_cache=True)
    assert matmul_flops(config, 1, 2, num_keys=21).total == pytest.approx(counter.get_total_flops(), rel=0.02)


def counted_by_torch(model, ids, num_loops, cache=None):
    """torch's own count; its LSTM is not fused here, since the counter sees nothing inside a fused one."""
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, num_loops=num_loops, past_key_values=cache, use_cache=cache is not None)
    return counter.get_total_flops()


def tiny_model_of(overrides):
    model = CognexisForCausalLM(tiny_config(**overrides)).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("cell", [*CELLS])
def test_cells_agree_with_the_counter_of_torch_with_and_without_a_cache(cell):
    everywhere = {f"{stage}_layer_types": ["cortex"] * (1 + (stage == "prelude")) for stage in STAGES}
    model = tiny_model_of(everywhere | {"cortex": described(cell)})
    ids, cache = torch.randint(3, 60, (1, 37)), CognexisCache(model.config)
    expected = matmul_flops(model.config, 37, 3).total
    assert counted_by_torch(model, ids, 3, cache) == pytest.approx(expected, rel=0.02)
    expected = matmul_flops(model.config, 1, 3, num_keys=38).total
    assert counted_by_torch(model, ids[:, :1], 3, cache) == pytest.approx(expected, rel=0.02)


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("stage", STAGES)
def test_column_in_one_stage_agrees_with_the_counter_of_torch(stage):
    model = tiny_model_of(overrides("column", stage))
    expected = matmul_flops(model.config, 24, 3).total
    assert counted_by_torch(model, torch.randint(3, 60, (1, 24)), 3) == pytest.approx(expected, rel=0.02)


LARGER = {
    "column of all": {"pattern": "XMSLC M^", "overrides": [{"cell_type": "agalite", "n_heads": 4}]},
    "columns in sequence": {"pattern": ["A X", "M", "SL"]},
    "long memory": {"pattern": "X"},
    "several chunks and blocks of queries": {"pattern": "XM"},
    "no memory": {"pattern": "X", "overrides": [{"cell_type": "xl", "mem_len": 0}]},
    "mixing convolution": {"pattern": "C", "overrides": [{"cell_type": "cconv", "channel_mixing": True}]},
    "Hadamard mixer": {"pattern": "A", "overrides": [{"cell_type": "axon", "use_srht": True}]},
    "two layers of an LSTM": {"pattern": "L", "overrides": [{"cell_type": "lstm", "num_layers": 2}]},
    "no refinement": {"pattern": "AM", "router": {"whisper_lambda": 0.0, "d_key": 8}},
}


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("name", LARGER)
def test_stacks_agree_with_the_counter_of_torch(name):
    length = 300 if name.startswith("several") else 33
    model = tiny_model_of({"core_layer_types": ["cortex"], "cortex": LARGER[name], "max_position_embeddings": length})
    expected = matmul_flops(model.config, length, 2).total
    assert counted_by_torch(model, torch.randint(3, 60, (1, length)), 2) == pytest.approx(expected, rel=0.02)


def test_request_is_its_prefill_and_its_steps():
    config = CognexisConfig(**SMALL)
    expected = matmul_flops(config, 7, 3, head_tokens=1)
    expected += matmul_flops(config, 1, 1, num_keys=8)
    expected += matmul_flops(config, 1, 4, num_keys=9)
    assert generation_flops(config, 7, [3, 1, 4]) == expected


def test_elementwise_work_by_hand():
    config = CognexisConfig(
        **{**SMALL, "num_coda_blocks": 1}, recurrent_gating=False, input_injection="none", recurrent_norm="none"
    )
    block = 2 * 4 * 32 + 2 * 32 + 3 * 8 * (4 + 2) + 6 * 64 + 5 * 4 * 10
    flops = elementwise_flops(config, 10, 2)
    assert flops == StageFlops(10 * block, 20 * (block + 2 * 32), 10 * block, 10 * 4 * 32)


def test_loops_of_all_tokens():
    assert token_updates([1, 2, 1]) == 4


def test_cache_of_equal_depths_by_hand():
    config = CognexisConfig(**SMALL)
    entry = 2 * 2 * 8 * 4  # keys and values, heads, width, bytes
    assert cache_bytes(config, [2] * 5, 4) == 5 * entry * (3 + 2 + 1)


def test_latency_percentiles_interpolate():
    summary = latency_summary([*range(1, 101)])
    assert (summary.count, summary.mean, summary.median) == (100, 50.5, 50.5)
    assert summary.p90 == pytest.approx(90.1) and summary.p99 == pytest.approx(99.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda config: matmul_flops(config, 0, 1), "num_tokens=0"),
        (lambda config: matmul_flops(config, 1, 0), "num_loops=0"),
        (lambda config: matmul_flops(config, 1, 1.5), "num_loops=1.5"),
        (lambda config: generation_flops(config, 3, []), "loop_counts: none"),
        (lambda config: token_updates([1, 0]), r"loop_counts\[1\]=0"),
        (lambda _: latency_summary([]), "none given"),
        (lambda _: latency_summary([1.0, -1.0]), "-1.0 must be"),
        (lambda _: latency_summary([math.nan]), "nan must be"),
    ],
)
def test_impossible_counts_are_named(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call(CognexisConfig(**SMALL))
