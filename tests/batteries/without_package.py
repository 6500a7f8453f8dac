"""Runs a script where the package cannot be imported, as on a machine that has only torch and transformers.

The script prints one line of JSON last; that is what the caller gets. A process costs seconds, so one script should
look at many things.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

COMMIT = "0123456789" * 4
_BLOCK = 'import sys\nsys.modules["cognexis"] = None\n'
_FORGOTTEN = ("PYTHONPATH", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_ENDPOINT", "HF_TOKEN", "PYTEST_XDIST_WORKER")


def put_in_hub_cache(folder: Path, hf_home: Path, repo_id: str) -> None:
    """Lay out ``folder`` as if ``repo_id`` had been downloaded to ``hf_home``."""
    repository = hf_home / "hub" / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def run_without_package(
    script: str, *arguments: Any, hf_home: Path, has_package: bool = False, **environment: str
) -> Any:
    """Run ``script`` and return the JSON on its last line of output.

    Args:
        script: Python source; ``sys.argv[1:]`` are the arguments.
        arguments: passed on as strings.
        hf_home: folder for ``HF_HOME``; a script started with a new one finds no code of an earlier run.
        has_package: leave the package importable, for a script that needs a process of its own.
        environment: further variables.
    """
    empty = hf_home / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    variables = {name: value for name, value in os.environ.items() if name not in _FORGOTTEN}
    variables |= {
        "HF_HOME": str(hf_home),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are split by threads; bit-equality needs as many
    }
    if has_package:
        variables["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", ("" if has_package else _BLOCK) + script, *map(str, arguments)],
        cwd=empty,
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return json.loads(result.stdout.splitlines()[-1])
