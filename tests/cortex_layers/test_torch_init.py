"""Seeds and determinism."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cognexis.cortex_layers.torch_init import seed_everything, set_tf32_precision


def test_same_seed_gives_the_same_numbers_everywhere():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(7)
    first = draw()
    assert draw() != first
    seed_everything(7)
    assert draw() == first


def test_tf32_is_left_alone_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.backends.cuda.matmul.allow_tf32
    set_tf32_precision(not before)
    assert torch.backends.cuda.matmul.allow_tf32 is before


@pytest.mark.slow
def test_determinism_switches_everything():
    code = """
import os, torch
from cognexis.cortex_layers.torch_init import enable_determinism
enable_determinism()
assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
"""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
