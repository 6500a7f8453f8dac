"""Every rule of the configuration: what is refused and how, what is derived, what is stored."""

import contextlib
import copy
import json
import logging
import math
import os
import pickle
import re
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.configuration_cognexis import AUTO_MAP, swiglu_width
from cognexis.errors import CognexisError, InvalidConfigError
from tests.batteries.tiny import tiny_config, tiny_model

OWN_FIELDS = [f.name for f in fields(CognexisConfig) if f.name not in {g.name for g in fields(PreTrainedConfig)}]
NAN, INF = math.nan, math.inf

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "num_recurrent_blocks", "trained_max_loops", "max_loops", "min_loops"),
    *("default_loops", "kv_slots", "backprop_loops", "ffn_multiple_of"),
)
COUNTS = (*SIZES, "num_prelude_blocks", "num_coda_blocks", "global_tokens")
PROBABILITIES = (
    *("attention_dropout", "ffn_dropout", "embedding_dropout", "classifier_dropout"),
    *("prelude_stochastic_depth", "recurrent_stochastic_depth", "coda_stochastic_depth"),
)
POSITIVE = ("embedding_scale", "rms_norm_eps", "initializer_range")
NOT_NEGATIVE = ("recurrent_residual_scale", "injection_scale")
CHOICES = (
    *("ffn_activation", "norm_type", "final_norm", "recurrent_residual_mode", "recurrent_norm", "recurrent_init"),
    *("input_injection", "injection_site", "injection_projection", "state_retention"),
)
FLAGS = (
    *("attention_bias", "mlp_bias", "lm_head_bias", "tie_word_embeddings", "use_cache", "experimental_multi_block"),
    *("document_boundary_attention", "recurrent_gating", "gate_loop_embedding"),
)


def table() -> list[Any]:
    """Rows (overrides, what the message names); the overrides break one rule of an otherwise valid configuration."""
    rows: list[tuple[dict[str, Any], str]] = []
    rows += [({name: value}, name) for name in SIZES for value in (0, -1, 2**40)]
    rows += [({name: value}, name) for name in ("num_prelude_blocks", "num_coda_blocks") for value in (-1, 2**40)]
    rows += [({"global_tokens": -1}, "global_tokens")]
    huge = 10**400  # a valid JSON number beyond every float
    rows += [({"hidden_size": huge, "intermediate_size": None}, "hidden_size")]
    rows += [({name: huge}, name) for name in (*POSITIVE, *NOT_NEGATIVE, "gate_init_bias", "attention_dropout")]
    rows += [({"rope_parameters": {"rope_theta": huge}}, "rope_parameters.rope_theta")]
    rows += [({name: value}, name) for name in COUNTS for value in ("3", True, 2.5, NAN, [4])]
    rows += [({name: value}, name) for name in POSITIVE for value in (0, -1.0, NAN, INF, "1", True, None)]
    rows += [({name: value}, name) for name in NOT_NEGATIVE for value in (-0.1, NAN, INF, "1", True, None)]
    rows += [({"gate_init_bias": value}, "gate_init_bias") for value in (NAN, INF, "1", None)]
    rows += [({name: value}, name) for name in PROBABILITIES for value in (-0.1, 1.0, 1, NAN, INF, "0", None)]
    rows += [({name: value}, name) for name in CHOICES for value in ("bogus", "", 3, None, ["none"])]
    rows += [({name: value}, name) for name in FLAGS for value in (1, "yes", None)]
    rows += [
        ({name: value}, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        for value in (64, -1, "a", 1.5, True)
    ]
    rows += [({"eos_token_id": value}, "eos_token_id") for value in ([1, 64], [True])]
    rope = [
        *(({"rope_theta": x}, "rope_theta") for x in (0, -1.0, 1, NAN, INF, "1", True, None)),
        *(({"rope_type": x}, "rope_type") for x in ("bogus", 3, None, ["default"])),
        *(({"rope_type": "linear", "factor": x}, "factor") for x in (0, 0.5, NAN, INF, "2")),
        *(({"rope_type": x}, "factor") for x in ("linear", "dynamic", "yarn")),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 4, "factor": 2.0}, "short_factor"),
        *(({"partial_rotary_factor": x}, "partial_rotary_factor") for x in (0, 1.5, NAN, "1")),
        *(({"partial_rotary_factor": x}, "partial_rotary_factor") for x in (0.1, 0.375)),  # 0 or 3 of 8 features
    ]
    rows += [({"rope_parameters": value}, f"rope_parameters.{name}") for value, name in rope]
    rows += [({"rope_parameters": value}, "rope_parameters") for value in ([1], "default", 3)]
    sliding = ["sliding_attention"] * 2
    rows += [
        ({"hidden_size": 33}, "hidden_size"),
        ({"head_dim": 16}, "hidden_size"),
        ({"hidden_size": 20}, "head_dim"),  # 4 heads of 5 features: an odd number cannot be rotated in pairs
        ({"num_attention_heads": 3}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 8}, "num_attention_heads"),
        ({"intermediate_size": 50, "ffn_multiple_of": 16}, "intermediate_size"),
        ({"min_loops": 5}, "max_loops"),
        ({"max_loops": 2, "min_loops": 3}, "max_loops"),
        ({"default_loops": 5}, "default_loops"),
        ({"min_loops": 2, "default_loops": 1}, "default_loops"),
        ({"num_recurrent_blocks": 2}, "num_recurrent_blocks"),
        ({"prelude_layer_types": ["full_attention"]}, "prelude_layer_types"),
        ({"coda_layer_types": ["bogus"]}, "coda_layer_types"),
        ({"core_layer_types": ["linear_attention"]}, "core_layer_types"),
        ({"prelude_layer_types": sliding}, "sliding_window"),
        ({"prelude_layer_types": sliding, "sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"global_tokens": 1}, "global_tokens"),
        ({"input_injection": "gate_condition", "recurrent_gating": False}, "input_injection"),
        ({"gate_loop_embedding": True, "recurrent_gating": False}, "gate_loop_embedding"),
        ({"recurrent_init": "random", "input_injection": "none"}, "recurrent_init"),
        ({"backprop_loops": 2, "input_injection": "none"}, "backprop_loops"),
        ({"selected_states": [1]}, "selected_states"),
        ({"state_retention": "selected"}, "selected_states"),
        *(({"state_retention": "selected", "selected_states": x}, "selected_states") for x in ([0], [5], ["1"])),
        ({"tokenizer_checksum": 3}, "tokenizer_checksum"),
        ({"cortex": {}}, "cortex"),
        ({"value_head": {}}, "value_head"),
    ]
    overrides = [
        ({"encoder": {}}, "encoder"),
        ({"coda": 3}, "coda"),
        ({"coda": {"hidden_size": 16}}, "coda.hidden_size"),
        ({"coda": {3: 16}}, "coda.3"),
        ({"coda": {"num_attention_heads": 3}}, "coda.num_attention_heads"),
        ({"coda": {"num_attention_heads": 0}}, "coda.num_attention_heads"),
        ({"coda": {"num_key_value_heads": 3}}, "coda.num_attention_heads"),
        ({"prelude": {"intermediate_size": None}}, "prelude.intermediate_size"),
        ({"prelude": {"intermediate_size": -1}}, "prelude.intermediate_size"),
        ({"core": {"ffn_activation": "bogus"}}, "core.ffn_activation"),
        ({"core": {"ffn_dropout": 1.0}}, "core.ffn_dropout"),
        ({"core": {"ffn_dropout": True}}, "core.ffn_dropout"),
        ({"core": {"rms_norm_eps": 0.0}}, "core.rms_norm_eps"),
    ]
    rows += [({"stage_overrides": value}, f"stage_overrides.{name}") for value, name in overrides]
    return [pytest.param(*row, id="-".join(f"{k}={v!r}" for k, v in row[0].items())[:80]) for row in rows]


@pytest.mark.parametrize("overrides, named", table())
def test_broken_rule_is_a_config_error_that_names_field_and_value(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(**overrides)
    faults = caught.value.faults
    field = named.split(".", 1)[0]
    assert any(re.match(rf"{re.escape(named)}\b", fault) for fault in faults), faults
    assert isinstance(caught.value, ValueError) and caught.value.code == "invalid_config"
    if field in overrides and not isinstance(overrides[field], dict):
        assert f"={overrides[field]!r}" in str(caught.value)


def test_all_faults_are_listed_in_one_message() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(vocab_size=0, ffn_activation="swiglo", attention_dropout=2.0, min_loops="1", colour="red")
    message = str(caught.value)
    assert len(caught.value.faults) == 5 and "5 faults" in message
    for name in ("vocab_size=0", "ffn_activation='swiglo'", "attention_dropout=2.0", "min_loops='1'", "colour"):
        assert name in message


def test_rules_between_fields_are_all_listed_too() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(num_key_value_heads=3, num_recurrent_blocks=2, sliding_window=4, default_loops=9)
    named = [fault.split("=")[0] for fault in caught.value.faults]
    assert named == ["num_attention_heads", "default_loops", "num_recurrent_blocks", "sliding_window"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": "4"},
        {"vocab_size": "70000", "pad_token_id": 60_000},
        {"max_loops": "9", "default_loops": 6},
    ],
    ids=["heads", "vocabulary", "loops"],
)
def test_field_of_the_wrong_type_brings_no_faults_of_rules_that_read_it(overrides: dict[str, Any]) -> None:
    """The rules that compare with such a field would see its default, which the user never chose."""
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(**overrides)
    wrong_type = next(iter(overrides))
    assert [fault.split("=")[0] for fault in caught.value.faults] == [wrong_type]


def test_choice_error_lists_the_allowed_values_and_the_nearest() -> None:
    with pytest.raises(InvalidConfigError, match=r"swiglu, geglu, gelu, relu \(did you mean 'swiglu'\?\)"):
        tiny_config(ffn_activation="swigl")


@pytest.mark.parametrize(
    "key, nearest", [("hiden_size", "hidden_size"), ("rope_thetaa", "rope_theta"), ("max_loop", "max_loops")]
)
def test_unknown_key_in_the_constructor_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(InvalidConfigError, match=f"{key}: unknown key .*'{nearest}'"):
        CognexisConfig(**{key: 3})


def test_key_far_from_any_field_is_an_error_without_a_guess() -> None:
    with pytest.raises(InvalidConfigError, match=r"^invalid configuration: zzz: unknown key$"):
        CognexisConfig(zzz=1)


def test_positional_argument_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="keyword arguments only"):
        CognexisConfig(50_000)


@pytest.mark.parametrize(
    "overrides",
    [
        {"dtype": "bogus"},
        {"dtype": 3},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 3,
                "long_factor": [2.0] * 4,
                "factor": 2.0,
            }
        },
    ],
    ids=["unknown dtype", "dtype as number", "nested rope", "longrope width"],
)
def test_value_of_a_shared_field_that_cannot_work_is_a_config_error(overrides: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match=next(iter(overrides))):
        tiny_config(**overrides)


# -- defaults and derived values ------------------------------------------------------------------------------------


def test_default_object_is_valid_and_follows_the_sample() -> None:
    config = CognexisConfig()
    config.validate()
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (4096, 32, 8)
    assert (config.intermediate_size, config.head_dim, config.max_position_embeddings) == (11_008, 128, 8192)
    assert (config.num_prelude_blocks, config.num_recurrent_blocks, config.num_coda_blocks) == (8, 1, 8)
    assert (config.trained_max_loops, config.max_loops, config.default_loops, config.kv_slots) == (12, 12, 12, 12)
    assert config.min_loops == 1
    assert config.recurrent_gating and config.input_injection == "residual" and config.injection_scale == 0.1
    assert config.recurrent_norm == "none" and config.recurrent_residual_mode == "depth_scaled"
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.tie_word_embeddings and config.nonstandard_features == []


def test_ffn_width_follows_the_formula() -> None:
    assert swiglu_width(4096, 256) == 11_008
    assert CognexisConfig(ffn_multiple_of=64).intermediate_size == 10_944  # 171 * 64, the next above 10922.67
    for hidden, multiple in ((32, 64), (96, 128), (4096, 64), (8192, 256)):
        width = swiglu_width(hidden, multiple)
        assert width % multiple == 0 and 0 <= width - 8 * hidden / 3 < multiple


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (8, 2), (32, 8), (6, 6), (2, 2)])
def test_key_value_heads_default_to_a_quarter_where_that_divides(heads: int, kv_heads: int) -> None:
    config = CognexisConfig(hidden_size=8 * heads, num_attention_heads=heads)
    assert (config.num_key_value_heads, config.head_dim) == (kv_heads, 8)


@pytest.mark.parametrize("kv_heads, variant", [(4, "mha"), (2, "gqa"), (1, "mqa")])
def test_attention_variant_is_derived_from_the_head_counts(kv_heads: int, variant: str) -> None:
    assert tiny_config(num_key_value_heads=kv_heads).attention_variant == variant


def test_maxima_derive_from_each_other_in_the_documented_direction() -> None:
    assert tiny_config(trained_max_loops=6).max_loops == 6
    assert tiny_config(trained_max_loops=6, max_loops=9).default_loops == 9
    assert tiny_config(trained_max_loops=6, max_loops=9).kv_slots == 9
    assert tiny_config(max_loops=3, kv_slots=2).default_loops == 3


def test_depth_scaled_residual_is_one_over_the_root_of_the_trained_maximum() -> None:
    assert CognexisConfig(trained_max_loops=16).residual_scale == 0.25
    assert CognexisConfig(trained_max_loops=16, max_loops=64).residual_scale == 0.25, "a request bound moves nothing"
    assert CognexisConfig(recurrent_residual_mode="fixed").residual_scale == 0.5


def test_effective_depth_counts_blocks_passed() -> None:
    assert [CognexisConfig().effective_depth(n) for n in (1, 12)] == [17, 28]
    assert CognexisConfig(num_prelude_blocks=16, num_coda_blocks=16).effective_depth(24) == 56
    assert CognexisConfig(num_prelude_blocks=10, num_coda_blocks=10).effective_depth(16) == 36
    assert CognexisConfig(default_loops=3).effective_depth() == 19
    two = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)
    assert (two.effective_depth(3), two.num_unique_blocks) == (2 + 3 * 2 + 1, 5)


@pytest.mark.parametrize(
    "overrides, feature",
    [
        ({"num_recurrent_blocks": 2, "experimental_multi_block": True}, "multi_block_core"),
        ({"num_prelude_blocks": 0}, "no_prelude"),
        ({"num_coda_blocks": 0}, "no_coda"),
        ({"tie_word_embeddings": False}, "untied_head"),
        ({"final_norm": "none"}, "no_final_norm"),
        ({"coda_layer_types": ["sliding_attention"], "sliding_window": 4}, "sliding_window"),
        ({"stage_overrides": {"coda": {"mlp_bias": True}}}, "stage_overrides"),
        ({"gate_loop_embedding": True}, "gate_loop_embedding"),
        ({"recurrent_init": "random"}, "random_initial_state"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_experimental_option_is_listed_as_nonstandard(overrides: dict[str, Any], feature: str) -> None:
    assert tiny_config().nonstandard_features == []
    assert tiny_config(**overrides).nonstandard_features == [feature]


def test_global_tokens_are_listed_beside_the_window() -> None:
    config = tiny_config(coda_layer_types=["sliding_attention"], sliding_window=4, global_tokens=1)
    assert config.nonstandard_features == ["sliding_window", "global_tokens"]


def test_too_few_stability_controls_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    bare = {
        "recurrent_gating": False,
        "input_injection": "none",
        "recurrent_norm": "none",
        "recurrent_residual_mode": "fixed",
        "recurrent_residual_scale": 1.0,
    }
    with caplog.at_level(logging.WARNING, logger="cognexis"):
        assert len(CognexisConfig().stability_controls) >= 2
        for saving in ({"recurrent_gating": True}, {"recurrent_norm": "closing"}, {"recurrent_residual_scale": 0.5}):
            assert len(tiny_config(**bare | saving).stability_controls) == 2
        assert caplog.records == []
        assert tiny_config(**bare).stability_controls == ["pre_norm"]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "two controls" in caplog.text


# -- stages ---------------------------------------------------------------------------------------------------------


def test_stage_override_reaches_its_stage_only() -> None:
    own = {"intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "ffn_activation": "relu"}
    config = tiny_config(stage_overrides={"coda": own})
    assert {name: getattr(config.block_spec("coda"), name) for name in own} == own
    assert config.block_spec("prelude") == config.block_spec("core") == tiny_config().block_spec("coda")


def test_stage_overrides_shape_the_modules_and_the_model_runs() -> None:
    config = tiny_config(
        stage_overrides={
            "prelude": {"intermediate_size": 40, "norm_type": "layernorm", "attention_bias": True},
            "core": {"mlp_bias": True, "rms_norm_eps": 1e-3, "attention_dropout": 0.25, "ffn_dropout": 0.5},
            "coda": {"num_attention_heads": 8, "num_key_value_heads": 2, "ffn_activation": "gelu"},
        }
    )
    model = tiny_model(config)
    prelude, core, coda = (getattr(model.model, stage).blocks[0] for stage in ("prelude", "recurrent", "coda"))
    assert prelude.feed_forward.gate_proj.weight.shape == (40, 32)
    assert prelude.attention_norm.bias.shape == (32,) and prelude.attention.q_proj.bias.shape == (32,)
    assert core.feed_forward.gate_proj.weight.shape == (48, 32) and core.feed_forward.down_proj.bias.shape == (32,)
    assert core.attention_norm.variance_epsilon == 1e-3
    assert (core.attention.sites[0].attention_dropout, core.feed_forward.dropout.p) == (0.25, 0.5)
    assert core.attention.q_proj.bias is None
    assert coda.attention.q_proj.weight.shape == (64, 32) and coda.attention.k_proj.weight.shape == (16, 32)
    assert coda.attention.o_proj.weight.shape == (32, 64) and not hasattr(coda.feed_forward, "gate_proj")
    assert model(torch.arange(10).view(2, 5)).logits.isfinite().all()


def test_layer_types_has_one_entry_per_slot_in_slot_order() -> None:
    config = tiny_config(
        prelude_layer_types=["sliding_attention", "full_attention"],
        core_layer_types=["full_attention", "sliding_attention"],
        num_recurrent_blocks=2,
        experimental_multi_block=True,
        sliding_window=4,
        input_injection="attention_memory",
        kv_slots=3,
    )
    full, sliding = "full_attention", "sliding_attention"
    assert config.layer_types == [sliding, full, full, full, full, *[full, sliding] * 3]
    assert len(config.layer_types) == config.num_hidden_layers == 2 + 1 + 2 + 3 * 2
    assert config.stage_layer_types("coda") == [full]


def test_global_tokens_make_every_slot_keep_everything() -> None:
    config = tiny_config(prelude_layer_types=["sliding_attention"] * 2, sliding_window=4, global_tokens=1)
    assert config.layer_types == ["full_attention"] * 7
    assert config.stage_layer_types("prelude") == ["sliding_attention"] * 2


# -- num_hidden_layers: the number of slots ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, slots",
    [
        ({}, 2 + 1 + 4),
        ({"kv_slots": 2}, 2 + 1 + 2),
        ({"max_loops": 6}, 2 + 1 + 6),
        ({"input_injection": "attention_memory"}, 2 + 1 + 1 + 4),
        ({"num_recurrent_blocks": 3, "experimental_multi_block": True}, 2 + 1 + 3 * 4),
    ],
    ids=["plain", "fewer slots", "more loops", "memory", "three core blocks"],
)
def test_num_hidden_layers_counts_the_slots(overrides: dict[str, Any], slots: int) -> None:
    assert tiny_config(**overrides).num_hidden_layers == slots


def test_num_hidden_layers_is_ignored_in_constructor_and_json_and_never_stored(tmp_path: Path) -> None:
    assert tiny_config(num_hidden_layers=99, layer_types=["full_attention"]).num_hidden_layers == 7
    config = tiny_config()
    stored = config.to_dict()
    assert "num_hidden_layers" not in stored and "layer_types" not in stored
    loaded = CognexisConfig.from_dict(stored | {"num_hidden_layers": 99, "layer_types": ["full_attention"]})
    assert loaded.to_dict() == stored and loaded.loop_cap is None


def test_lowering_num_hidden_layers_caps_the_loops_and_the_natural_value_frees_them() -> None:
    config = tiny_config()
    config.num_hidden_layers = 5
    assert (config.loop_cap, config.loop_slots, config.num_hidden_layers) == (2, 2, 5)
    assert len(config.layer_types) == 5
    model = tiny_model(tiny_config())
    model.config.num_hidden_layers = 5
    ids = torch.arange(6)[None]
    assert model(ids, num_loops=4).loop_counts.tolist() == [2], "the draft of an early exit stops at the cap"
    model.config.num_hidden_layers = 7
    assert model.config.loop_cap is None
    assert model(ids, num_loops=4).loop_counts.tolist() == [4]
    config.num_hidden_layers = 1000
    assert (config.loop_cap, config.num_hidden_layers) == (None, 7)


def test_cap_counts_whole_core_blocks_and_leaves_out_the_memory_slots() -> None:
    config = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)
    config.num_hidden_layers = 2 + 1 + 5
    assert (config.loop_cap, config.num_hidden_layers) == (2, 2 + 1 + 4)
    config = tiny_config(input_injection="attention_memory")
    config.num_hidden_layers = 2 + 1 + 1 + 3
    assert config.loop_cap == 3


@pytest.mark.parametrize("value", [3, 0, -1])
def test_num_hidden_layers_that_leaves_no_loop_is_a_value_error(value: int) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=f"num_hidden_layers={value} leaves no loop") as caught:
        config.num_hidden_layers = value
    assert isinstance(caught.value, InvalidConfigError)
    assert config.num_hidden_layers == 7


@pytest.mark.parametrize("value", ["5", None, 5.5])
def test_num_hidden_layers_that_is_no_integer_is_a_config_error(value: Any) -> None:
    config = tiny_config()
    with pytest.raises(InvalidConfigError, match="num_hidden_layers"):
        config.num_hidden_layers = value


def test_cap_travels_with_a_copy_but_not_into_json() -> None:
    config = tiny_config()
    config.num_hidden_layers = 5
    assert copy.deepcopy(config).loop_cap == pickle.loads(pickle.dumps(config)).loop_cap == 2
    assert config.to_dict() == tiny_config().to_dict()


# -- aliases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alias, field, value",
    [
        ("hidden_dim", "hidden_size", 64),
        ("intermediate_dim", "intermediate_size", 80),
        ("num_kv_heads", "num_key_value_heads", 4),
        ("tie_embeddings", "tie_word_embeddings", False),
        ("norm_epsilon", "rms_norm_eps", 1e-4),
        ("num_loops", "default_loops", 3),
    ],
)
def test_alias_is_the_field_under_another_name(alias: str, field: str, value: Any) -> None:
    settings = {**tiny_config().to_dict(), "head_dim": None}
    del settings[field]
    config = CognexisConfig(**settings | {alias: value})
    assert getattr(config, field) == getattr(config, alias) == value
    assert alias not in config.to_dict() and config.to_dict()[field] == value
    assert getattr(CognexisConfig.from_dict(settings | {alias: value}), field) == value
    setattr(config, alias, getattr(tiny_config(), field))
    assert getattr(config, field) == getattr(tiny_config(), field)


def test_alias_and_field_together_are_an_error() -> None:
    with pytest.raises(InvalidConfigError, match="given twice"):
        CognexisConfig(num_loops=3, default_loops=3)


# -- JSON -------------------------------------------------------------------------------------------------------------


def stored_with(folder: Path, **changes: Any) -> Path:
    """A saved tiny configuration whose JSON was edited afterwards."""
    tiny_config().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_save_load_save_writes_the_same_bytes(tmp_path: Path) -> None:
    config = tiny_config(
        stage_overrides={"coda": {"ffn_dropout": 0.1}},
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        state_retention="selected",
        selected_states=[1, 3],
        eos_token_id=[1, 5],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "a")
    loaded = CognexisConfig.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": loaded.name_or_path}


def test_diff_dict_rebuilds_the_configuration() -> None:
    config = tiny_config(rms_norm_eps=1e-4, ffn_activation="geglu", eos_token_id=[1, 5])
    diff = config.to_diff_dict()
    assert diff["ffn_activation"] == "geglu" and diff["hidden_size"] == 32
    assert CognexisConfig.from_dict(diff).to_dict() == config.to_dict()
    assert CognexisConfig(**diff).to_dict() == config.to_dict()


def test_json_key_close_to_a_field_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=r"hiden_size: unknown key \(did you mean 'hidden_size'\?\)"):
        CognexisConfig.from_pretrained(stored_with(tmp_path, hiden_size=32))


def test_strange_json_key_is_kept_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="cognexis"):
        config = CognexisConfig.from_pretrained(stored_with(tmp_path, unsloth_version="2025.1"))
    assert "'unsloth_version' is not known" in caplog.text
    assert config.unsloth_version == config.to_dict()["unsloth_version"] == "2025.1"
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["unsloth_version"] == "2025.1"
    assert copy.deepcopy(config).unsloth_version == "2025.1"


@pytest.mark.parametrize("key, value", [("to_dict", 3), ("validate", 1), ("effective_depth", 3), ("_loop_cap", 1)])
def test_strange_json_key_has_no_effect_even_with_the_name_of_a_method(key: str, value: Any, tmp_path: Path) -> None:
    config = CognexisConfig.from_pretrained(stored_with(tmp_path, **{key: value}))
    config.validate()
    assert config.effective_depth(2) == 5
    assert config.num_hidden_layers == 7
    assert config.to_dict()["hidden_size"] == 32


def test_broken_value_in_json_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="2 faults.*vocab_size='64'.*rms_norm_eps=0"):
        CognexisConfig.from_pretrained(stored_with(tmp_path, vocab_size="64", rms_norm_eps=0))


def test_null_in_json_derives_the_field_again(tmp_path: Path) -> None:
    config = CognexisConfig.from_pretrained(stored_with(tmp_path, max_loops=None, default_loops=None, head_dim=None))
    assert (config.max_loops, config.default_loops, config.head_dim) == (4, 4, 8)


def test_keyword_of_from_pretrained_replaces_the_stored_value_before_the_rules_run(tmp_path: Path) -> None:
    stored_with(tmp_path, max_loops=2, default_loops=2, kv_slots=2)
    config, unused = CognexisConfig.from_pretrained(
        tmp_path, max_loops=3, num_loops=3, colour="red", return_unused_kwargs=True
    )
    assert (config.max_loops, config.default_loops, config.kv_slots) == (3, 3, 2)
    assert unused == {"colour": "red"}
    with pytest.raises(InvalidConfigError, match="max_loops=0"):
        CognexisConfig.from_pretrained(tmp_path, max_loops=0)


def test_saved_json_carries_the_code_map_and_the_files_it_names(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["auto_map"] == AUTO_MAP and stored["model_type"] == "cognexis"
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        assert re.search(rf"^class {name}\b", (tmp_path / f"{module}.py").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b'{"a":' * 100_000, "nested more than 64 deep"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
        (b'{"vocab_size": 64, "vocab_size": 65}', "the key 'vocab_size' is given twice"),
        (b'{"ffn_dropout": NaN}', "the number NaN is not finite"),
        (b'{"ffn_dropout": -Infinity}', "the number -Infinity is not finite"),
        (b'{"ffn_dropout": 1e999}', "the number 1e999 is not finite"),
        (b"\xef\xbb\xbf{}", "not valid JSON: Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b" " * 100_000_000, "larger than 4194304 bytes"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[]", "must hold one object, got list"),
        (b"", "not valid JSON: Expecting value"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_file_that_is_no_plain_json_object_is_a_config_error_at_once(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(InvalidConfigError, match=re.escape(f"config.json: {reason}")):
        CognexisConfig.from_pretrained(tmp_path)
    assert time.perf_counter() - start < 1


def test_pipe_in_place_of_the_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InvalidConfigError, match="not a file"):
        CognexisConfig.from_json_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "code_map",
    [
        *(
            {"AutoModel": x}
            for x in ("other/repo--modeling.X", "../x.Y", "a/b.C", "/x.Y", "x", "a.b.C", 3, ["../a.B"])
        ),
        "modeling_cognexis.X",
    ],
    ids=str,
)
def test_code_map_that_leaves_the_folder_is_refused(code_map: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="auto_map") as caught:
        CognexisConfig.from_pretrained(stored_with(tmp_path, auto_map=code_map))
    assert caught.value.path.startswith("auto_map")
    config = tiny_config()
    with pytest.raises(InvalidConfigError, match="auto_map"):
        config.auto_map = code_map


@pytest.mark.parametrize(
    "overrides",
    [
        *({"num_labels": x} for x in ("2", -1, 2**40, True, [2])),
        *({"id2label": x} for x in ({0: NAN}, {"a": "b"}, {0: 3})),
        *({"label2id": x} for x in ({"a": NAN}, {"a": "0"})),
        *({name: "yes"} for name in ("output_hidden_states", "output_attentions", "return_dict")),
        {"torch_dtype": 64},
        {"torch_dtype": "x"},
        {"per_layer_config": 3},
        *({"rope_parameters": x} for x in ({"dtype": 1}, {"rope_tehta": 1e4}, {"beta_fast": 10**5000})),
    ],
    ids=lambda x: next(iter(x)),
)
def test_broken_value_of_a_field_that_transformers_keeps_unchecked_is_named(overrides: dict[str, Any]) -> None:
    """Each of them was accepted, or ended in an error of the base class, when random settings were tried."""
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(**overrides)
    assert caught.value.path.startswith(next(iter(overrides)))


def test_empty_key_is_shown() -> None:
    with pytest.raises(InvalidConfigError, match="'': unknown key"):
        tiny_config(**{"": 1})


def test_integer_without_a_decimal_text_is_still_named() -> None:
    with pytest.raises(InvalidConfigError, match="vocab_size=<int>: must be between"):
        tiny_config(vocab_size=10**5000)


def test_faults_carry_path_value_and_reason_and_survive_pickling() -> None:
    with pytest.raises(InvalidConfigError) as caught:
        tiny_config(default_loops=9, stage_overrides={"coda": {"ffn_dropout": 2.0}}, colour="red")
    error = pickle.loads(pickle.dumps(caught.value))
    parts = {(fault.path, fault.value) for fault in error.faults}
    assert parts == {("default_loops", 9), ("stage_overrides.coda.ffn_dropout", 2.0), ("colour", None)}
    first = error.faults[0]
    assert (error.path, error.value, error.reason) == (first.path, first.value, first.reason)
    assert all(fault.reason and fault.endswith(f": {fault.reason}") for fault in error.faults)
    one = InvalidConfigError("x=1: too small", path="x", value=1, reason="too small")
    assert one.faults == ["x=1: too small"]


# -- changing a configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [("hidden_size", "32"), ("recurrent_gating", 1), ("ffn_activation", None)])
def test_setting_a_field_to_another_type_is_a_config_error(name: str, value: Any) -> None:
    config = tiny_config()
    with pytest.raises(InvalidConfigError, match=name):
        setattr(config, name, value)
    assert config.to_dict() == tiny_config().to_dict()


@pytest.mark.parametrize(
    "name, value",
    [
        ("hidden_size", 33),
        ("ffn_dropout", 7.0),
        ("num_key_value_heads", 3),
        ("default_loops", 9),
        ("rope_parameters", {"rope_type": "linear"}),
    ],
)
def test_validate_and_saving_find_what_a_change_broke(name: str, value: Any, tmp_path: Path) -> None:
    config = tiny_config()
    setattr(config, name, value)
    with pytest.raises(InvalidConfigError):
        config.validate()
    with pytest.raises(InvalidConfigError):
        config.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/config.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("max_loops", "default_loops", "kv_slots", "head_dim", "num_key_value_heads", "intermediate_size"),
        "rope_parameters",
    ],
)
def test_derived_field_set_to_none_is_refused_or_derived_again(name: str) -> None:
    config = tiny_config()
    with contextlib.suppress(InvalidConfigError):
        setattr(config, name, None)
        config.validate()
        assert getattr(config, name) is not None, "the model computes with it"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copy_is_equal_and_independent(clone: Any) -> None:
    config = tiny_config(stage_overrides={"coda": {"ffn_dropout": 0.1}})
    twin = clone(config)
    assert twin == config and twin is not config
    twin.stage_overrides["coda"]["ffn_dropout"] = 0.2
    twin.default_loops = 2
    assert config == tiny_config(stage_overrides={"coda": {"ffn_dropout": 0.1}})


def test_list_defaults_are_not_shared() -> None:
    first, second = tiny_config(), tiny_config()
    first.selected_states.append(1)
    assert second.selected_states == []


# -- named sizes ------------------------------------------------------------------------------------------------------

SIZES_TABLE = {  # hidden, heads, kv heads, prelude, coda, loops, effective depth, label
    "8b": (4096, 32, 8, 8, 8, 12, 28, 8e9),
    "64b": (8192, 64, 16, 10, 10, 16, 36, 64e9),
    "256b": (12_288, 96, 24, 12, 12, 20, 44, 256e9),
    "1.28t": (16_384, 128, 32, 16, 16, 24, 56, 1.28e12),
}


def parameters_by_formula(config: CognexisConfig, kv_heads: int, *, gate_and_injection: bool) -> int:
    """Parameters of a SwiGLU model with tied head, RMS norms and heads of 128 features, counted on paper."""
    h, f = config.hidden_size, config.intermediate_size
    block = h * h + 2 * h * (128 * kv_heads) + h * h + 3 * h * f + 2 * h  # q, k and v, o, feed-forward, two norms
    blocks = config.num_prelude_blocks + 1 + config.num_coda_blocks
    gate = h + h * h + h  # norm, matrix, bias
    injection = h * h
    return 50_000 * h + blocks * block + h + (gate + injection if gate_and_injection else 0)


def built_on_meta(config: CognexisConfig) -> CognexisForCausalLM:
    with torch.device("meta"):
        return CognexisForCausalLM(config)


@pytest.mark.parametrize("form", ["", "-slim"], ids=["labelled", "slim"])
@pytest.mark.parametrize("name", SIZES_TABLE)
def test_named_size_has_the_published_columns(name: str, form: str) -> None:
    config = CognexisConfig.from_variant(f"cognexis-{name}{form}")
    hidden, heads, kv_heads, prelude, coda, loops, depth, _ = SIZES_TABLE[name]
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (hidden, heads, kv_heads)
    assert (config.num_prelude_blocks, config.num_recurrent_blocks, config.num_coda_blocks) == (prelude, 1, coda)
    assert (config.trained_max_loops, config.max_loops, config.effective_depth(loops)) == (loops, loops, depth)
    assert config.residual_scale == 1 / math.sqrt(loops) and config.max_position_embeddings == 8192
    assert config.intermediate_size % 256 == 0 and config.head_dim == 128
    assert config.nonstandard_features == [] and len(config.stability_controls) >= 2


@pytest.mark.parametrize("name", SIZES_TABLE)
def test_named_size_holds_its_label_within_one_percent(name: str) -> None:
    config = CognexisConfig.from_variant(name)
    model = built_on_meta(config)
    label, kv_heads = SIZES_TABLE[name][-1], SIZES_TABLE[name][2]
    count = model.num_parameters()
    assert abs(count / label - 1) < 0.01
    assert count == parameters_by_formula(config, kv_heads, gate_and_injection=True)
    assert len(model.model.recurrent.blocks) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "name, with_eight_kv_heads",
    [("8b", 3_217_502_208), ("64b", 14_943_215_616), ("256b", 39_228_837_888), ("1.28t", 91_064_942_592)],
)
def test_slim_size_has_the_exact_published_count(name: str, with_eight_kv_heads: int) -> None:
    """The published integers take 8 key/value heads in every size; ours take a quarter of the heads."""
    plain = {"recurrent_gating": False, "input_injection": "none"}
    ours = CognexisConfig.from_variant(f"{name}-slim", **plain)
    kv_heads = SIZES_TABLE[name][2]
    assert parameters_by_formula(ours, 8, gate_and_injection=False) == with_eight_kv_heads
    assert built_on_meta(ours).num_parameters() == parameters_by_formula(ours, kv_heads, gate_and_injection=False)
    published = CognexisConfig.from_variant(f"{name}-slim", num_key_value_heads=8, **plain)
    assert built_on_meta(published).num_parameters() == with_eight_kv_heads


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("8b", "cognexis-8b"),
        ("8B", "cognexis-8b"),
        (" Cognexis 8B ", "cognexis-8b"),
        ("cognexis_64b", "cognexis-64b"),
        ("1280b", "cognexis-1.28t"),
        ("COGNEXIS-1.28T", "cognexis-1.28t"),
        ("1280B slim", "cognexis-1.28t-slim"),
        ("256b_slim", "cognexis-256b-slim"),
        ("Tiny", "cognexis-tiny"),
        ("mini", "cognexis-mini"),
    ],
)
def test_variant_name_is_read_tolerantly(spelling: str, name: str) -> None:
    assert CognexisConfig.from_variant(spelling).to_dict() == CognexisConfig.from_variant(name).to_dict()


@pytest.mark.parametrize("name", ["9b", "", "8b-slimmer", "tiny-slim", "cognexis"])
def test_unknown_variant_lists_the_names(name: str) -> None:
    with pytest.raises(InvalidConfigError, match="allowed: .*cognexis-8b.*cognexis-1.28t-slim") as caught:
        CognexisConfig.from_variant(name)
    assert (caught.value.path, caught.value.value) == ("variant", name)


@pytest.mark.parametrize("name", [None, 8])
def test_variant_that_is_no_string_is_a_config_error(name: Any) -> None:
    with pytest.raises(InvalidConfigError, match="variant"):
        CognexisConfig.from_variant(name)


def test_variant_takes_overrides_and_checks_them() -> None:
    config = CognexisConfig.from_variant("tiny", vocab_size=300, default_loops=2)
    assert (config.vocab_size, config.default_loops, config.hidden_size) == (300, 2, 128)
    with pytest.raises(InvalidConfigError, match="did you mean 'vocab_size'"):
        CognexisConfig.from_variant("tiny", vocabsize=300)
    with pytest.raises(InvalidConfigError, match="hidden_size=100"):
        CognexisConfig.from_variant("8b", hidden_size=100, head_dim=128)


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_trainable_size_settles_by_additive_injection_and_sandwich_norms(name: str) -> None:
    config = CognexisConfig.from_variant(name)
    assert not config.recurrent_gating and config.residual_scale == 1.0
    assert (config.input_injection, config.injection_projection, config.injection_scale) == (
        "residual",
        "identity",
        1.0,
    )
    assert config.recurrent_norm == "sandwich"
    assert built_on_meta(config).num_parameters() < 1e7, "it must run on a CPU"


# -- random values ----------------------------------------------------------------------------------------------------

GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**40, -(2**70), 0.5, 1.0, 1e308, -1e-30, NAN, INF, -INF, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-1, 5), st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.none(), st.floats()), max_size=2),
)
STAGE_GARBAGE = st.dictionaries(
    st.sampled_from(["prelude", "core", "coda", "bogus"]),
    st.one_of(
        GARBAGE,
        st.dictionaries(
            st.sampled_from(["intermediate_size", "num_attention_heads", "norm_type", "ffn_dropout", "head_dim"]),
            st.one_of(GARBAGE, st.sampled_from([8, 16, "layernorm", 0.1])),
            max_size=2,
        ),
    ),
    max_size=2,
)
ROPE_GARBAGE = st.dictionaries(
    st.sampled_from(
        [
            *("rope_type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
            *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "beta_fast", "type"),
            "attention_factor",
        ]
    ),
    st.one_of(
        GARBAGE,
        st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", 1e4, 2.0, 0.5, [1.0] * 4]),
    ),
    max_size=4,
)
SOUND = {  # values that may be right, so that accepted configurations occur as well
    "ffn_activation": ["swiglu", "geglu", "gelu", "relu"],
    "norm_type": ["rmsnorm", "layernorm"],
    "final_norm": ["rmsnorm", "layernorm", "none"],
    "recurrent_residual_mode": ["fixed", "depth_scaled", "learned_scalar", "learned_vector"],
    "recurrent_norm": ["none", "closing", "sandwich"],
    "recurrent_init": ["h0", "random"],
    "input_injection": ["none", "residual", "concat_project", "gate_condition", "attention_memory"],
    "injection_site": ["pre", "post"],
    "injection_projection": ["linear", "identity"],
    "state_retention": ["final_only", "all", "selected", "checkpointed"],
    "prelude_layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2],
    "core_layer_types": [["full_attention"], ["sliding_attention"]],
    "coda_layer_types": [["full_attention"], ["sliding_attention"]],
    "selected_states": [[1], [1, 4]],
}


@st.composite
def random_settings(draw: Any) -> dict[str, Any]:
    """Values for one to four fields, some sound, most not; sizes that would take memory are never sound."""
    chosen = {}
    for name in draw(st.lists(st.sampled_from([*OWN_FIELDS, "dtype"]), min_size=1, max_size=4, unique=True)):
        special = {"rope_parameters": ROPE_GARBAGE, "stage_overrides": STAGE_GARBAGE}.get(name, GARBAGE)
        chosen[name] = draw(st.one_of(special, st.sampled_from(SOUND[name])) if name in SOUND else special)
    return chosen


def check_random_settings(chosen: dict[str, Any]) -> CognexisConfig | None:
    """A configuration is built and survives JSON, or the error is ours and names a field."""
    message, config = "", None
    try:
        config = tiny_config(**chosen)
    except InvalidConfigError as error:
        message = str(error)
    if config is None:
        assert any(re.search(rf"\b{name}\b", message) for name in (*OWN_FIELDS, "dtype")), message
        return None
    rebuilt = CognexisConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert rebuilt.to_dict() == config.to_dict()
    return config


@settings(max_examples=200)
@given(random_settings())
def test_random_settings_are_accepted_or_named(chosen: dict[str, Any]) -> None:
    check_random_settings(chosen)


@settings(max_examples=200)
@given(ROPE_GARBAGE)
def test_random_rotary_settings_are_accepted_or_named(chosen: dict[str, Any]) -> None:
    check_random_settings({"rope_parameters": chosen})


@settings(max_examples=200)
@given(STAGE_GARBAGE)
def test_random_stage_overrides_are_accepted_or_named(chosen: dict[str, Any]) -> None:
    check_random_settings({"stage_overrides": chosen})


@pytest.mark.slow
@settings(max_examples=5000)
@given(random_settings())
def test_accepted_random_settings_run_to_finite_logits(chosen: dict[str, Any]) -> None:
    config = check_random_settings(chosen)
    magnitudes = ("embedding_scale", "injection_scale", "recurrent_residual_scale", "gate_init_bias", "rms_norm_eps")
    if config is None or any(abs(getattr(config, name)) > 1e4 for name in magnitudes):
        return  # finite as numbers, but not after they multiplied a float32 state a few times
    try:
        model = tiny_model(config)
        logits = model(torch.tensor([[3, 1, 2]]) % config.vocab_size, num_loops=config.min_loops).logits
    except CognexisError:  # positions beyond a tiny max_position_embeddings, retained loops that are not run
        return
    assert logits.isfinite().all()
