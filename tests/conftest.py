"""Surroundings of every test: no network, no shared folders, fixed seeds, deterministic algorithms.

The environment is set before transformers is imported, which reads it once. That warnings from the package
are errors is set in pyproject.toml.
"""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Iterator

# The tests keep the cores busy by running side by side, not by many threads each; nor do the processes they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# One folder per process: transformers copies a bundle's files into HF_HOME/modules, and two workers that do
# so at the same time would read each other's half-written files.
_HF_HOME = tempfile.mkdtemp(prefix="cognexis-tests-")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": _HF_HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
for variable in ("HF_HUB_CACHE", "HF_XET_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN"):
    os.environ.pop(variable, None)

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("cognexis", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("cognexis")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _deterministic_algorithms(request: pytest.FixtureRequest) -> Iterator[None]:
    """Deterministic algorithms, which also fill what torch.empty returns with NaN.

    On a GPU an operation without a deterministic form is allowed; several of torch's own have none.
    torch.use_deterministic_algorithms would do the same after ten seconds of importing the compiler.
    """
    torch.set_deterministic_debug_mode("warn" if request.node.get_closest_marker("gpu") else "error")
    yield
    torch.set_deterministic_debug_mode("default")
