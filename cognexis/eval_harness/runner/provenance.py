"""Where a row comes from: hardware, versions of packages, and the commit of the code."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[2]
_PACKAGES = ("cognexis", "torch", "transformers", "tokenizers", "numpy")


def hardware(device: torch.device) -> str:
    """A device that computes, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    count = torch.get_num_threads()
    return f"{platform.machine()} CPU, {count} thread{'s' * (count > 1)}"


@cache
def versions() -> dict[str, str]:
    """Package to version, ``python``, and ``commit`` where the package runs from a git checkout."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = git_commit(PACKAGE)
    return found | ({"commit": commit} if commit is not None else {})


def git_commit(package: Path) -> str | None:
    """Commit of the checkout whose folder holds ``package``, with "+changes" where tracked files differ from it.

    None without git, and where the package is not tracked there, such as an installed one below a user's repository.
    """
    if not _git(package, "ls-files", "--", "."):
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return None if not commit else commit + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    """What git prints; empty if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
