"""The cells, blocks and stacks also work as the flat files that travel with a checkpoint."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cognexis
from cognexis.hub.bundle import COGNEXIS
from cognexis.hub.flat_file import flatten
from cognexis.hub.module_graph import BundleLayout

ENTRY = """
from cognexis.cortex_layers.blocks.column.auto import build_column_auto_config
from cognexis.cortex_layers.config import CortexStackConfig
from cognexis.cortex_layers.stacks.build import build_from_dict
"""
PROGRAM = """
import sys
import torch
from flat.entry_cognexis import CortexStackConfig, build_column_auto_config, build_from_dict
column = build_column_auto_config(d_hidden=16, pattern="AXMSLGC Ag M^X^S^")
inner = {"d_hidden": 1, "blocks": [{"block_type": "postup", "cell": {"cell_type": "lstm"}}]}
block = {"block_type": "preup", "cell": {"cell_type": "stack_cell", "stack": inner}}
adapter = {"block_type": "adapter", "base_block": block}
stack = build_from_dict(CortexStackConfig(d_hidden=16, blocks=[column, adapter]).model_dump())
y, state = stack(torch.randn(2, 5, 16))
assert y.isfinite().all() and list(state.keys()) == ["ColumnBlock_0", "AdapterBlock_1"]
assert "cognexis" not in sys.modules
"""


@pytest.mark.slow
def test_flat_files_build_and_run_every_cell_without_the_package(tmp_path):
    package = tmp_path / "cognexis"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(cognexis.__file__).parent, package, ignore=ignored)
    (package / "entry.py").write_text(ENTRY)
    layout = BundleLayout(root="cognexis", entries=("entry", *COGNEXIS.entries[:1]), stays=COGNEXIS.stays)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, text in {"__init__.py": "", **flatten(layout, package, ())}.items():
        (flat / name).write_text(text)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shutil.rmtree(package)
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=200, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
