"""Look at the machine: what is installed, what the model can use, and what is missing for which task."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from cognexis.hub.build import build_id

# Package, what it is for, and whether the package does nothing without it.
_PACKAGES = (
    ("torch", "everything", True),
    ("transformers", "everything", True),
    ("tokenizers", "everything", True),
    ("safetensors", "weights", True),
    ("huggingface_hub", "the Hub", True),
    ("pydantic", "run configurations", True),
    ("accelerate", "device maps and training", True),
    ("datasets", "training data", False),
    ("peft", "adapters", False),
    ("tensorboard", "training curves", False),
    ("evaluate", "metrics", False),
    ("tensordict", "Cortex layers", False),
    ("triton", "GPU kernels", False),
    ("fastapi", "serving", False),
)


@dataclass(frozen=True)
class Check:
    """One line of the report: ``state`` is "ok", "missing" (works without it) or "fault" (does not)."""

    name: str
    state: str
    detail: str


def examine() -> list[Check]:
    """Check the interpreter, the packages, the devices, the tools and the folders; changes nothing."""
    checks = [Check("python", "ok" if sys.version_info >= (3, 11) else "fault", platform.python_version())]
    checks.append(Check("cognexis", "ok", build_id().removeprefix("cognexis ")))
    for name, purpose, required in _PACKAGES:
        try:
            checks.append(Check(name, "ok", version(name)))
        except PackageNotFoundError:
            absent = importlib.util.find_spec(name) is None
            state = "ok" if not absent else "fault" if required else "missing"
            checks.append(Check(name, state, f"not installed; needed for {purpose}" if absent else "installed"))
    return [*checks, *_devices(), *_tools(), _cache()]


def _devices() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("devices", "fault", f"torch cannot be imported: {error}")]
    checks = [Check("cpu", "ok", f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        checks.append(Check("cuda", "missing", "no CUDA device; models run on the CPU"))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        checks.append(Check(f"cuda:{index}", "ok", f"{properties.name}, {size:.0f} GiB"))
    return checks


def _tools() -> list[Check]:
    found = shutil.which("bwrap")
    return [Check("bubblewrap", "ok" if found else "missing", found or "not found; runs generated code safely")]


def _cache() -> Check:
    from huggingface_hub.constants import HF_HUB_CACHE

    place = HF_HUB_CACHE
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    return Check("hub cache", "ok" if writable else "fault", f"{HF_HUB_CACHE}, {free:.1f} GiB free")
