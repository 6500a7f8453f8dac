"""Which software wrote a checkpoint: the version, and the commit when the package runs from a git checkout."""

import functools
import re
from importlib.resources import files
from pathlib import Path

from cognexis.hub.flat_file import version_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


@functools.cache
def build_id() -> str:
    """``cognexis 0.1.0`` or ``cognexis 0.1.0 (commit 1a2b3c4d5e6f)``."""
    package = files("cognexis")
    commit = commit_of(Path(str(package)).parent)
    return f"cognexis {version_of(package)}" + (f" (commit {commit[:12]})" if commit else "")


def commit_of(checkout: Path) -> str | None:
    """The commit that a git checkout stands at, read from its files; None where there is no checkout."""
    git = checkout / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head if _COMMIT.fullmatch(head) else None
        reference = head.removeprefix("ref: ")
        if (loose := git / reference).is_file():
            return loose.read_text().strip()
        packed = (git / "packed-refs").read_text()
        found = re.search(rf"^([0-9a-f]{{40}}) {re.escape(reference)}$", packed, re.MULTILINE)
        return found[1] if found else None
    except OSError:
        return None
