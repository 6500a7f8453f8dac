"""What can be imported from where."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cognexis.cortex_layers as cortex

ROOT = "cognexis.cortex_layers"
NAMES = {
    "": """BlockConfig AdapterBlockConfig ColumnBlockConfig PassThroughBlockConfig PreUpBlockConfig PostUpBlockConfig
        PostUpGatedBlockConfig RouterConfig CortexStackConfig CellConfig AxonConfig CausalConv1dConfig LSTMCellConfig
        XLCellConfig mLSTMCellConfig sLSTMCellConfig AGaLiTeCellConfig GRUCellConfig MemoryCell AxonCell AxonLayer
        CausalConv1d LSTMCell mLSTMCell sLSTMCell register_cell build_cell BaseBlock AdapterBlock ColumnBlock
        PassThroughBlock PreUpBlock PostUpBlock PostUpGatedBlock register_block build_block build_column_auto_config
        build_column_auto_block CortexStack build_cortex build_from_dict MaybeState ResetMask State Tensor
        TRITON_AVAILABLE select_backend register_token detach_state""",
    "config": "AGaLiTeCellConfig PostUpGatedBlockConfig CortexStackConfig",
    "factory": "build_cortex build_from_dict",
    "registry": """register_token block_config_for_token get_single_char_symbols can_use_caret
        get_registered_tokens""",
    "tokens": "",
    "types": "Tensor State MaybeState ResetMask",
    "utils": "TRITON_AVAILABLE select_backend",
    "td": "CortexTD CortexTDConfig",
    "torch_init": "seed_everything enable_determinism set_tf32_precision",
    "cells": """MemoryCell CausalConv1d LSTMCell mLSTMCell sLSTMCell AxonCell AxonLayer XLCell AGaLiTeCell
        HFLlamaLayerCell register_cell build_cell get_cell_class""",
    "cells.base": "MemoryCell",
    "cells.core": "AxonCell AxonLayer update_parent_state",
    "cells.core.axon_cell": "AxonCell",
    "cells.lstm": "LSTMCell",
    "cells.mlstm": "mLSTMCell MultiHeadLayerNorm bias_linspace_init_",
    "cells.slstm": "sLSTMCell",
    "cells.xl": "XLCell",
    "cells.agalite": "AGaLiTeCell",
    "cells.conv": "CausalConv1d",
    "cells.hf_llama": "HFLlamaLayerCell HFLlamaLayerConfig LayerwiseCache",
    "cells.registry": "register_cell build_cell get_cell_class get_cell_config_class",
    "blocks": """BaseBlock AdapterBlock ColumnBlock PassThroughBlock PreUpBlock PostUpBlock PostUpGatedBlock
        register_block build_block build_column_auto_config build_column_auto_block get_block_class""",
    "blocks.base": "BaseBlock",
    "blocks.adapter": "AdapterBlock",
    "blocks.passthrough": "PassThroughBlock",
    "blocks.preup": "PreUpBlock",
    "blocks.postup": "PostUpBlock",
    "blocks.postup_gated": "PostUpGatedBlock",
    "blocks.registry": "register_block build_block get_block_class get_block_config_class",
    "blocks.column": "ColumnBlock BaseRouter GlobalContextRouter",
    "blocks.column.auto": "build_column_auto_config build_column_auto_block",
    "blocks.column.routers": "BaseRouter GlobalContextRouter TokenRefiner",
    "stacks": """CortexStack build_cortex_auto_config build_cortex_auto_stack build_hf_stack build_hf_stack_config
        build_llama_stack_from_model build_llama_stack_config_from_model""",
    "stacks.hf": """build_hf_stack build_hf_stack_config build_llama_stack_from_model
        build_llama_stack_config_from_model""",
    "kernels.pytorch.lstm": "lstm_sequence_pytorch",
    "kernels.pytorch.conv1d": "causal_conv1d_pytorch",
    "kernels.pytorch.mlstm": "mlstm_recurrent_step_stabilized_simple mlstm_chunkwise_simple",
    "kernels.pytorch.slstm": "slstm_sequence_pytorch",
    "kernels.pytorch.rtu": "rtu_stream_diag_pytorch rtu_stream_full_pytorch",
    "kernels.pytorch.rtu.rtu_stream_diag": "rtu_stream_diag_pytorch",
    "kernels.pytorch.rtu.rtu_stream_fullrank": "rtu_stream_full_pytorch",
    "kernels.pytorch.srht": "srht_pytorch",
    "kernels.pytorch.txl": "txl_pytorch",
    "kernels.pytorch.agalite": "discounted_sum_pytorch",
    "kernels.triton.lstm": "lstm_sequence_triton",
    "kernels.triton.slstm": "slstm_sequence_triton",
    "kernels.triton.mlstm": "mlstm_chunkwise_triton",
    "kernels.triton.rtu": "rtu_stream_diag_triton",
    "kernels.triton.conv1d": "causal_conv1d_triton",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_where_they_are_looked_for(module):
    loaded = importlib.import_module(f"{ROOT}.{module}".rstrip("."))
    missing = [name for name in NAMES[module].split() if not hasattr(loaded, name)]
    assert not missing


def test_root_names_are_listed_and_unknown_ones_refused():
    assert set(NAMES[""].split()) <= set(cortex.__all__) == set(dir(cortex))
    assert all(getattr(cortex, name) is not None for name in cortex.__all__)
    with pytest.raises(AttributeError, match="no attribute 'CortexStak'"):
        _ = cortex.CortexStak


@pytest.mark.slow
def test_configurations_load_without_cells_and_cells_without_transformers():
    code = f"""
import sys
from {ROOT}.config import CortexStackConfig
assert "tensordict" not in sys.modules and "torch" not in sys.modules
import tensordict  # which imports Triton where that is installed
before = set(sys.modules)
from {ROOT} import CortexStack, build_cortex
import {ROOT}.td
added = set(sys.modules) - before
assert not {{"transformers", "torchrl", "triton", "triton.compiler", "torch._inductor.codecache"}} & added
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_triton_names_compute_the_same_as_their_twins():
    from cognexis.cortex_layers.kernels.pytorch.lstm import lstm_sequence_pytorch
    from cognexis.cortex_layers.kernels.triton.conv1d import causal_conv1d_triton
    from cognexis.cortex_layers.kernels.triton.lstm import lstm_sequence_triton

    net, start = torch.nn.LSTM(3, 3, batch_first=True), torch.zeros(2, 1, 3)
    given = {"lstm": net, "x_seq": torch.randn(2, 4, 3), "h0_bf": start, "c0_bf": start, "resets": torch.zeros(2, 4)}
    for one, other in zip(lstm_sequence_triton(**given), lstm_sequence_pytorch(**given), strict=True):
        assert torch.equal(one, other)
    state, x, weight = torch.zeros(2, 4, 3), torch.randn(2, 5, 3), torch.randn(3, 3, 4)
    y, _ = causal_conv1d_triton(state, x, weight, None, 1, resets=torch.zeros(2, 5))
    torch.testing.assert_close(
        y, torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (3, 0)), weight).mT, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="groups=1"):
        causal_conv1d_triton(state, x, weight, None, 3, resets=torch.zeros(2, 5))
    for resets in (None, torch.zeros(2)):
        with pytest.raises(ValueError, match="per-timestep resets"):
            causal_conv1d_triton(state, x, weight, None, 1, resets=resets)
