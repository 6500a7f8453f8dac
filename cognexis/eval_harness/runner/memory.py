"""The most memory that a run needed beyond what was there before it.

On CUDA that is what the allocator of torch handed out at most, weights included. On a CPU it is the rise of the
process's resident set: Linux keeps its peak (VmHWM) and lets a process reset it (/proc/self/clear_refs), so the rise
is the peak less the resident set at the start. Pages that the allocator kept from earlier runs count as there before.
It is None where the system cannot say, as on macOS and Windows.
"""

import re
from pathlib import Path
from types import TracebackType

import torch

_PROC = Path("/proc/self")


class PeakMemory:
    """Measures a block of code; ``bytes`` is there afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._device = device
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._before = _resident("VmRSS") if _reset_peak() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        elif self._before is not None and (peak := _resident("VmHWM")) is not None:
            self.bytes = max(0, peak - self._before)


def _reset_peak() -> bool:
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])
