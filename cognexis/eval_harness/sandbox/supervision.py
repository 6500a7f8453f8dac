"""Watch processes and what they write until they are done, time is over, or there is too much output."""

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Watched:
    """File descriptors to read to their end; ``output`` is counted against the limit, ``messages`` is not."""

    output: dict[int, bytearray] = field(default_factory=dict)
    messages: dict[int, bytearray] = field(default_factory=dict)

    def fds(self) -> dict[int, bytearray]:
        return {**self.output, **self.messages}


def watch_until_end(
    processes: Sequence[subprocess.Popen[bytes]], watched: Watched, deadline: float, output_bytes: int, *, ends: int
) -> str | None:
    """Read until the process ``processes[ends]`` has ended.

    Args:
        deadline: by ``time.monotonic``.
        output_bytes: most bytes of all outputs together.

    Returns:
        "timeout" or "output_limit" if that ended the run, after which nothing runs any more; otherwise None.
    """
    waiting = dict(watched.fds())
    with selectors.DefaultSelector() as selector:
        for fd in waiting:
            selector.register(fd, selectors.EVENT_READ)
        reason = None
        while reason is None and processes[ends].poll() is None:
            reason = _read_some(selector, watched, waiting, min(deadline - time.monotonic(), 0.05), output_bytes)
            if time.monotonic() >= deadline:
                reason = "timeout"
        if reason is None:
            drained = False
            while not drained and reason is None:
                before = sum(map(len, waiting.values()))
                reason = _read_some(selector, watched, waiting, 0, output_bytes)
                drained = not waiting or sum(map(len, waiting.values())) == before
    return reason


def _read_some(
    selector: selectors.BaseSelector,
    watched: Watched,
    waiting: dict[int, bytearray],
    timeout: float,
    output_bytes: int,
) -> str | None:
    if not waiting:
        time.sleep(max(min(timeout, 0.005), 0))
    for key, _ in selector.select(max(timeout, 0)) if waiting else ():
        data = os.read(key.fd, 1 << 16)
        if not data:
            selector.unregister(key.fd)
            del waiting[key.fd]
            continue
        waiting[key.fd] += data
    total = sum(map(len, watched.output.values()))
    if total > output_bytes:
        for buffer in watched.output.values():
            del buffer[output_bytes:]
        return "output_limit"
    return None


def end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill what still runs and wait for it."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
