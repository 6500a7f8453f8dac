"""Costs: against values computed by hand and against torch's own counter."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cognexis import CognexisConfig, CognexisForCausalLM
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


def test_cortex_layer_agrees_with_the_counter_of_torch():
    pytest.importorskip("tensordict")
    shape = {**SMALL, "core_layer_types": ["cortex"], "cortex": {"pattern": "A"}}
    config = CognexisConfig(**shape, attn_implementation="eager")
    model = CognexisForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 97, (1, 24)), num_loops=2, use_cache=False)
    assert matmul_flops(config, 24, 2).total == pytest.approx(counter.get_total_flops(), rel=0.02)


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
