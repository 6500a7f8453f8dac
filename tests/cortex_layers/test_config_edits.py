"""Overrides of configurations inside a tree."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from cognexis.cortex_layers.config import (
    AxonConfig,
    ColumnBlockConfig,
    HFLlamaLayerConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
    XLCellConfig,
    mLSTMCellConfig,
)
from cognexis.cortex_layers.config_edits import apply_overrides, edited
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_config


def experts(pattern, overrides, **settings):
    config = build_cortex_auto_config(
        d_hidden=16, num_layers=2, pattern=pattern, override_global_configs=overrides, **settings
    )
    assert type(config).model_validate_json(config.model_dump_json()) == config
    return [expert for layer in config.blocks for expert in layer.experts]


def test_override_changes_only_the_fields_that_it_sets():
    found = experts("X^X", [XLCellConfig(mem_len=64)])
    assert [expert.cell.mem_len for expert in found] == [64] * 4
    assert [expert.cell.use_axon_qkv for expert in found] == [True, False, True, False]


def test_search_goes_on_below_what_was_merged():
    found = experts("X", [PostUpGatedBlockConfig(proj_factor=2), XLCellConfig(mem_len=64)])
    assert all(expert.proj_factor == 2 and expert.cell.mem_len == 64 for expert in found)


def test_all_matching_overrides_apply_in_order():
    found = experts("X", [XLCellConfig(mem_len=1, n_heads=2), XLCellConfig(mem_len=64)])
    assert all(expert.cell.mem_len == 64 and expert.cell.n_heads == 2 for expert in found)


def test_generator_of_overrides_reaches_every_layer():
    found = experts("X", (each for each in [XLCellConfig(mem_len=64)]))
    assert [expert.cell.mem_len for expert in found] == [64, 64]


def test_router_of_every_column_is_reached():
    config = build_cortex_auto_config(d_hidden=16, override_global_configs=[RouterConfig(d_key=8, temperature=0.7)])
    assert all(layer.router.d_key == 8 and layer.router.temperature == 0.7 for layer in config.blocks)


def test_nested_models_stay_models_and_are_merged():
    base = PreUpBlockConfig(cell=mLSTMCellConfig(axon_layer_config=AxonConfig(r_max=0.5)))
    override = mLSTMCellConfig(axon_layer_config=AxonConfig(r_min=0.25), axon_qkv_config=AxonConfig(r_max=0.75))
    cell = apply_overrides(base, [override]).cell
    assert isinstance(cell.axon_layer_config, AxonConfig) and isinstance(cell.axon_qkv_config, AxonConfig)
    assert (cell.axon_layer_config.r_max, cell.axon_layer_config.r_min) == (0.5, 0.25)
    assert cell.axon_qkv_config.r_max == 0.75 and cell.axon_qkv_config is not override.axon_qkv_config
    found = experts("M", [mLSTMCellConfig(axon_layer_config=AxonConfig(r_max=0.5)), AxonConfig(r_min=0.125)])
    assert all(expert.cell.axon_layer_config.r_min == 0.125 for expert in found)


def test_whole_cell_on_a_block_override_is_merged_into_the_cell():
    found = experts("X^", [PostUpGatedBlockConfig(cell=XLCellConfig(mem_len=3))])
    assert all(expert.cell.mem_len == 3 and expert.cell.use_axon_qkv for expert in found)


def test_override_that_breaks_a_rule_is_refused():
    with pytest.raises(ValidationError, match="r_min"):
        apply_overrides(AxonConfig(r_min=0.5), [AxonConfig(r_max=0.25)])


def test_override_of_hadamard_mixing_clears_the_default_mixer_only():
    changed = apply_overrides(AxonConfig(), [AxonConfig(use_srht=True)])
    assert changed.use_srht and not changed.use_untraced_linear


def test_hidden_size_and_tags_cannot_be_overridden():
    found = experts("X", [XLCellConfig(hidden_size=1000, cell_type="xl", mem_len=5)])
    assert all(expert.cell.hidden_size is None and expert.cell.mem_len == 5 for expert in found)


def test_override_reaches_derived_types_and_not_base_types():
    class LongXLConfig(XLCellConfig):
        extra: int = 1

    column = ColumnBlockConfig(experts=[PostUpGatedBlockConfig(cell=cell()) for cell in (LongXLConfig, XLCellConfig)])
    changed = apply_overrides(column, [XLCellConfig(mem_len=5)])
    assert [expert.cell.mem_len for expert in changed.experts] == [5, 5]
    assert [type(expert.cell) for expert in changed.experts] == [LongXLConfig, XLCellConfig]
    changed = apply_overrides(column, [LongXLConfig(mem_len=5)])
    assert [expert.cell.mem_len for expert in changed.experts] == [5, 128]


def test_arguments_stay_as_they_are():
    base, override = PostUpGatedBlockConfig(cell=XLCellConfig()), XLCellConfig(mem_len=64)
    before = base.model_dump()
    apply_overrides(base, [override])
    edited(base, proj_factor=3)
    assert base.model_dump() == before and override.model_fields_set == {"mem_len"}


def test_what_matches_nothing_is_reported_and_what_is_no_configuration_refused(caplog):
    build_cortex_auto_config(d_hidden=16, pattern="C", override_global_configs=[XLCellConfig(mem_len=64)])
    assert "no XLCellConfig to override" in caplog.text
    with pytest.raises(TypeError, match="is no configuration"):
        build_cortex_auto_config(d_hidden=16, override_global_configs=[{"mem_len": 64}])


def test_edit_keeps_what_is_set_and_validates():
    config = XLCellConfig(mem_len=7)
    assert edited(config, n_heads=2).model_fields_set == {"mem_len", "n_heads"}
    with pytest.raises(ValidationError, match="n_heads"):
        edited(config, n_heads=0)


def test_objects_that_no_dump_holds_survive_edits_and_overrides():
    """A width is set on every cell configuration; its modules must not become dicts on the way."""
    layer, hf_config = object(), SimpleNamespace(rope_theta=1.0)
    config = HFLlamaLayerConfig(hf_layer=layer, hf_config=hf_config)
    changed = edited(config, hidden_size=8)
    assert changed.hf_layer is layer and changed.hf_config is hf_config and changed.hidden_size == 8
    changed = apply_overrides(PreUpBlockConfig(cell=config), [HFLlamaLayerConfig(mem_len=3)])
    assert changed.cell.hf_config is hf_config and changed.cell.mem_len == 3
