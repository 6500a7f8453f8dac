"""Stacks: building, states, compilation, the automatic builder."""

import copy
import json
import logging
import pickle
import warnings

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from cognexis.cortex_layers.blocks.compiled import BlockCaller
from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    AxonConfig,
    CausalConv1dConfig,
    ColumnBlockConfig,
    CortexStackConfig,
    GRUCellConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    RouterConfig,
    StackCellConfig,
)
from cognexis.cortex_layers.factory import build_cortex, build_from_dict
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_config, build_cortex_auto_stack
from cognexis.cortex_layers.stacks.build import _warn_about_ignored_variable
from tests.batteries.cell_properties import PROPERTIES_OF_MANY, Unit, randomised
from tests.batteries.leaky_cell import LeakyCellConfig

WIDTH = 8
COLUMN = ColumnBlockConfig(
    experts=[PassThroughBlockConfig(cell=LSTMCellConfig()), PostUpGatedBlockConfig(cell=CausalConv1dConfig())],
    router=RouterConfig(d_key=4),
)
MIXED = CortexStackConfig(
    d_hidden=WIDTH,
    blocks=[
        PreUpBlockConfig(cell=LSTMCellConfig(num_layers=2), proj_factor=1.5),
        COLUMN,
        AdapterBlockConfig(base_block=PostUpBlockConfig(cell=GRUCellConfig()), bottleneck=3),
    ],
)


@pytest.mark.parametrize("holds", PROPERTIES_OF_MANY, ids=lambda check: check.__name__)
def test_stack_keeps_the_shared_rules(holds):
    holds(Unit(randomised(build_cortex(MIXED))))


def test_state_keys_are_class_name_and_position():
    stack = build_cortex(MIXED)
    state = stack.init_state(batch=2, device="cpu", dtype=torch.float32)
    assert list(state.keys()) == ["PreUpBlock_0", "ColumnBlock_1", "AdapterBlock_2"]
    assert state["PreUpBlock_0", "LSTMCell", "h"].shape == (2, 2, 12)
    assert state["ColumnBlock_1", "expert_PostUpGatedBlock_1", "CausalConv1d", "conv"].shape == (2, 4, WIDTH)
    assert state["AdapterBlock_2", "wrapped", "GRUCell", "h"].shape == (2, 1, WIDTH)


def test_stack_is_its_blocks_and_a_norm():
    config = CortexStackConfig(d_hidden=WIDTH, blocks=[PassThroughBlockConfig(cell=LeakyCellConfig())] * 2)
    stack = build_cortex(config)
    x = torch.randn(2, 5, WIDTH)
    y = stack.blocks[1](stack.blocks[0](x, None)[0], None)[0]
    torch.testing.assert_close(stack(x)[0], F.layer_norm(y, (WIDTH,)))
    assert stack.norm.bias is not None
    bare = build_cortex(config.model_copy(update={"post_norm": False}))
    torch.testing.assert_close(bare(x)[0], y)


def test_step_is_the_stack_itself():
    stack = build_cortex(MIXED)
    x = torch.randn(2, WIDTH)
    y, state = stack.step(x)
    again, _ = stack.step(x, state, resets=torch.ones(2))
    torch.testing.assert_close(again, y)


def test_empty_stack_is_its_norm():
    stack = build_cortex(CortexStackConfig(d_hidden=WIDTH, blocks=[]))
    x = torch.randn(2, 5, WIDTH)
    y, state = stack(x)
    torch.testing.assert_close(y, F.layer_norm(x, (WIDTH,)))
    assert state.batch_size == (2,) and not list(state.keys())


def test_state_of_another_batch_size_is_refused():
    stack = build_cortex(MIXED)
    with pytest.raises(ValueError, match=r"batch size \[3\], expected \[2\]"):
        stack(torch.randn(2, WIDTH), stack.init_state(3))


def test_config_survives_json_and_builds_the_same_stack():
    data = json.loads(MIXED.model_dump_json())
    stack = build_from_dict(data)
    assert stack.config == MIXED and stack.cfg is stack.config
    stack.load_state_dict(build_cortex(MIXED).state_dict())
    assert build_from_dict(MIXED.model_dump()).config == MIXED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks": [{"block_type": "nowhere"}]}, "must be one of"),
        ({"blocks": [{"proj_factor": 2.0}]}, "block_type is missing"),
        ({"blocks": [{"block_type": "preup", "cell": {"cell_type": "nowhere"}}]}, "must be one of"),
        ({"blocks": [{"block_type": "preup", "cell": {}}]}, "cell_type is missing"),
        ({"blocks": [{"block_type": "preup", "prjo_factor": 2.0}]}, "prjo_factor"),
        ({"d_hiden": 8}, "d_hiden"),
        ({"d_hidden": 0}, "d_hidden"),
    ],
)
def test_faults_in_a_dict_are_named(change, words):
    with pytest.raises(ValidationError, match=words):
        build_from_dict({"d_hidden": WIDTH, "blocks": []} | change)


def test_variable_of_the_former_kernels_is_named_once(monkeypatch):
    monkeypatch.setenv("CORTEX_TRITON_SMEM_SOFT_LIMIT", "98304")
    _warn_about_ignored_variable.cache_clear()
    with pytest.warns(DeprecationWarning, match="CORTEX_TRITON_SMEM_SOFT_LIMIT is ignored"):
        build_cortex(MIXED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_cortex(MIXED)


def test_building_leaves_the_configuration_as_it_is():
    before = MIXED.model_dump()
    build_cortex(MIXED)
    assert MIXED.model_dump() == before
    assert MIXED.blocks[0].cell.hidden_size is None


def test_pattern_is_repeated_or_given_per_layer():
    config = build_cortex_auto_config(d_hidden=WIDTH, num_layers=3, pattern="LC")
    assert [len(layer.experts) for layer in config.blocks] == [2, 2, 2]
    config = build_cortex_auto_config(d_hidden=WIDTH, pattern=["L", "LCG", None])
    assert [len(layer.experts) for layer in config.blocks] == [1, 3, 4]
    assert all(isinstance(layer, ColumnBlockConfig) for layer in config.blocks)
    assert len(build_cortex_auto_config(d_hidden=WIDTH).blocks) == 2
    assert len(build_cortex_auto_stack(d_hidden=WIDTH, pattern="C").blocks) == 4
    assert len(build_cortex_auto_stack(d_hidden=WIDTH, pattern=["C", "L"]).blocks) == 2


@pytest.mark.parametrize("settings", [{"num_layers": 3, "pattern": ["L", "C"]}, {"pattern": []}, {"num_layers": 0}])
def test_number_of_layers_must_fit_the_patterns(settings):
    with pytest.raises(ValueError, match="num_layers="):
        build_cortex_auto_config(d_hidden=WIDTH, **settings)


def test_automatic_builder_passes_everything_on():
    custom = {"W": PassThroughBlockConfig(cell=LeakyCellConfig())}
    stack = build_cortex_auto_stack(
        d_hidden=WIDTH,
        num_layers=1,
        pattern="WX",
        custom_map=custom,
        router=RouterConfig(top_k=1),
        post_norm=False,
        use_axonlayers=True,
        override_global_configs=[LeakyCellConfig(decay=0.125)],
    )
    first, second = stack.config.blocks[0].experts
    assert first.cell.decay == 0.125 and second.cell.use_axon_qkv
    assert stack.blocks[0].top_k == 1 and isinstance(stack.norm, torch.nn.Identity)
    assert not stack.config.compile_blocks


def test_copies_and_pickles_of_a_stack_stand_alone():
    stack = build_cortex(MIXED)
    x = torch.randn(2, 5, WIDTH)
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(twin(x)[0], stack(x)[0])
        with torch.no_grad():
            twin.blocks[0].out_proj.bias += 1
        assert not torch.equal(twin(x)[0], stack(x)[0])


def test_float_of_another_precision_keeps_to_the_input():
    stack = build_cortex(MIXED).to(torch.bfloat16)
    y, _ = stack(torch.randn(2, 5, WIDTH, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


class _Backend:
    """A compiler that runs what it gets and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


SMALL_COLUMN = ColumnBlockConfig(experts=[PreUpBlockConfig(cell=LeakyCellConfig())] * 2)
SMALL = CortexStackConfig(d_hidden=WIDTH, blocks=[PreUpBlockConfig(cell=LeakyCellConfig()), SMALL_COLUMN])


@pytest.mark.parametrize("config", [SMALL, pytest.param(MIXED, marks=pytest.mark.slow)], ids=["small", "mixed"])
def test_compiled_blocks_give_the_same_and_are_used_with_gradients_only(config, monkeypatch):
    backend = _Backend()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block: compile_(block, backend=backend))
    plain = build_cortex(config)
    stack = build_cortex(config.model_copy(update={"compile_blocks": True}))
    stack.load_state_dict(plain.state_dict())
    assert set(stack.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        stack(x)
    assert backend.graphs == 0
    (y, state), (expected, last) = stack(x), plain(x)
    assert backend.graphs > 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(stack(x, state)[0], plain(x, last)[0])
    assert len(stack.caller._compiled) == len(stack.blocks) - 1 and len(stack.blocks[1].caller._compiled) == 2
    assert None not in stack.caller._compiled.values()
    y.sum().backward()
    expected.sum().backward()
    for mine, other in zip(stack.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert set(copy.deepcopy(stack).state_dict()) == set(plain.state_dict())


def test_block_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def refuse(module, inputs):
        raise RuntimeError("not today")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block: compile_(block, backend=refuse))
    plain = build_cortex(CortexStackConfig(d_hidden=WIDTH, blocks=[PreUpBlockConfig(cell=LeakyCellConfig())]))
    caller = BlockCaller(compiles=True)
    x = torch.randn(2, 3, WIDTH)
    with caplog.at_level(logging.WARNING):
        y, _ = caller(plain.blocks[0], x, None, None)
        caller(plain.blocks[0], x, None, None)
    assert caplog.text.count("PreUpBlock runs uncompiled") == 1
    torch.testing.assert_close(y, plain.blocks[0](x, None)[0])
    with pytest.raises(ValueError, match="shape"):
        BlockCaller(compiles=True)(plain.blocks[0], x[..., :3], None, None)


def test_a_state_without_traces_stays_without_them_and_gives_the_same_outputs() -> None:
    torch.manual_seed(0)
    axon = AdapterBlockConfig(base_block=PassThroughBlockConfig(cell=AxonConfig(hidden_size=None)))
    column = build_cortex_auto_config(d_hidden=16, num_layers=1, pattern="AX^M^LS^").blocks[0]
    nested = PassThroughBlockConfig(
        cell=StackCellConfig(stack=CortexStackConfig(d_hidden=16, blocks=[PassThroughBlockConfig(cell=AxonConfig())]))
    )
    stack = build_cortex(CortexStackConfig(d_hidden=16, blocks=[axon, column, nested]))
    x = torch.randn(2, 7, 16)
    traced, plain = stack.init_state(2), stack.init_state(2, traces=False)
    expected, _ = stack(x, traced)
    y, after = stack(x, plain)
    names = {str(key) for key in plain.keys(True, True)}
    assert len(names) < len(list(traced.keys(True, True)))
    assert not any("E_" in name for name in names)
    assert names == {str(key) for key in after.keys(True, True)}
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
