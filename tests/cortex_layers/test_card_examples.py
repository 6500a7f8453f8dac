"""The code examples of the Cortex card run, in full in processes of their own, and narrow in this one.

What an example takes for granted is defined before it: names that it imports nowhere, placeholders such as
``MyCellConfig``, tokens that the example before it registered. "cuda" is read as the device that there is.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cognexis.cortex_layers.registry import _TOKENS
from cognexis.cortex_layers.tokens import BUILT_IN_TOKENS

TEXT = (Path(__file__).parents[1] / "data" / "cortex_card_examples.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BEFORE = {
    "signatures": """
        from typing import Optional, Tuple
        from tensordict import TensorDict
        from cognexis.cortex_layers import ResetMask, Tensor
    """,
    "patterns per layer": """
        from cognexis.cortex_layers.config import PreUpBlockConfig, mLSTMCellConfig
        from cognexis.cortex_layers.stacks import build_cortex_auto_stack
    """,
    "hidden size": "from cognexis.cortex_layers import LSTMCellConfig, PreUpBlockConfig",
    "custom cell": """
        import torch
        from cognexis.cortex_layers import CellConfig
        class MyCellConfig(CellConfig):
            pass
    """,
    "custom block": """
        from cognexis.cortex_layers import BlockConfig
        class MyBlockConfig(BlockConfig):
            pass
    """,
    "stack from tokens": EXAMPLES["registered tokens"],
}
RUNS = "y, s = {0}(torch.randn(2, 3, 256)); assert y.shape == (2, 3, 256); {0}.step(torch.randn(2, 256), s)\n"
AFTER = {
    "quick start": "assert out.shape == x.shape and out_step.shape == x_step.shape and len(stack.blocks) == 4",
    "patterns per layer": "import torch; assert len(stack.blocks) == 4 and len(stack.blocks[3].experts) == 1\n"
    + "".join(RUNS.format(name) for name in ("stack", "stack2", "stack3")),
    "overrides": "import torch; assert stack.config.blocks[1].experts[1].proj_factor == 2\n" + RUNS.format("stack"),
    "column": "assert col_cfg.experts[3].cell.use_axon_layer and not col_cfg.experts[2].cell.use_axon_layer\n"
    "assert col_cfg2.experts[0].cell.use_axon_qkv and col_cfg2.experts[0].cell.mem_len == 128",
    "manual stack": "assert out.shape == x.shape and list(state.keys()) == ['PreUpBlock_0', 'PassThroughBlock_1']\n"
    "assert stack.blocks[0].cell.hidden_size == 512",
    "custom tokens": "import torch; assert col1.experts[1].cell.use_axon_qkv and col3.experts[1].cell.mem_len == 32\n"
    + RUNS.format("stack")
    + RUNS.format("stack2"),
    "axon layer": "import torch\ncell = MyCell(256); x = torch.randn(2, 256)\n"
    "y, state = cell(x, None)\nagain, state = cell(x, state)\n"
    "assert ('mycell', 'proj') == cell.ax.state_path() and not torch.equal(y, again)",
    "agent component": "import torch\nfrom tensordict import TensorDict\n"
    "td = TensorDict({'latent': torch.randn(4, 256), 'bptt': torch.tensor([1]), 'batch': torch.tensor([4])})\n"
    "assert component(td)['recurrent_out'].shape == (4, 256)\n"
    "assert stack.config.blocks[0].experts[2].cell.use_axon_layer",
    "custom cell": "from cognexis.cortex_layers import get_cell_class\n"
    "assert get_cell_class(MyCellConfig()) is MyCell and MyCellConfig().cell_type == 'my'",
    "custom block": "from cognexis.cortex_layers import get_block_class\n"
    "assert get_block_class(MyBlockConfig()) is MyBlock and MyBlockConfig().block_type == 'my'",
    "stack from tokens": "import torch; assert len(cfg.blocks) == 3 and len(stack.blocks[2].experts) == 3\n"
    + RUNS.format("stack"),
}


def program(name: str) -> str:
    before = "\n".join(re.sub(r"^ {8}", "", line) for line in BEFORE.get(name, "").splitlines())
    example = EXAMPLES[name].replace('"cuda"', f'"{DEVICE}"').replace(".cuda()", f'.to("{DEVICE}")')
    example = example.replace("build_cortex(config)", f'build_cortex(config).to("{DEVICE}")')
    return f"{before}\n{example}\n{AFTER.get(name, '')}\n"


def test_all_examples_are_found():
    assert len(EXAMPLES) == TEXT.count("```python") == 14
    assert set(BEFORE) | set(AFTER) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_narrow(name, monkeypatch):
    """The same program at a width of 16 in place of 256; tokens that it registers are taken out again."""
    if name in ("custom cell", "custom block"):
        monkeypatch.setattr("cognexis.cortex_layers.config._CELLS", {})
        monkeypatch.setattr("cognexis.cortex_layers.config._BLOCKS", {})
    before = dict(_TOKENS)
    try:
        for token in set(_TOKENS) - set(BUILT_IN_TOKENS):
            del _TOKENS[token]
        text = program(name).replace("512", "32").replace("256", "16").replace("128", "8")
        exec(compile(text, name, "exec"), {"__name__": "card_example"})
    finally:
        _TOKENS.clear()
        _TOKENS.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_in_its_own_process(name):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:cognexis", "-c", program(name)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
