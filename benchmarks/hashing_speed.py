"""How fast checkpoint files are hashed, beside ``sha256sum`` on the same files.

    python benchmarks/hashing_speed.py [--mebibytes 1024] [--repeats 3]

Four files of random bytes are written, read once so that they are in memory, and hashed by both in turns; the best of
the repeats counts. The checksums are compared before anything is timed.

Writes ``benchmarks/results/hashing_speed.md``.
"""

import argparse
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cognexis.checkpoints.hashing import file_checksums

RESULT = Path(__file__).parent / "results" / "hashing_speed.md"
GOAL = 400  # MiB/s per core
NUM_FILES = 4


def best_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{index}.safetensors") for index in range(NUM_FILES)]
        for path in paths:
            path.write_bytes(os.urandom(2**20) * (options.mebibytes // NUM_FILES))

        def peer() -> list[str]:
            lines = subprocess.run(["sha256sum", *paths], check=True, capture_output=True, text=True).stdout
            return [f"sha256:{line.split()[0]}" for line in lines.splitlines()]

        assert file_checksums(paths) == peer()
        content = paths[0].read_bytes()
        calls: dict[str, Callable[[], object]] = {
            "`hashlib` on memory, the ceiling": lambda: [hashlib.sha256(content).digest() for _ in paths],
            "`sha256sum`, one process": peer,
            "`file_checksums`, one thread": lambda: file_checksums(paths, num_threads=1),
            f"`file_checksums`, {cores} threads": lambda: file_checksums(paths),
        }
        times = best_times(calls, options.repeats)
    reference = times["`sha256sum`, one process"]
    speeds = {name: options.mebibytes / seconds for name, seconds in times.items()}
    per_core = speeds["`file_checksums`, one thread"]
    text = "\n".join(
        [
            "# Speed of hashing",
            "",
            f"{options.mebibytes} MiB in {NUM_FILES} files; Python {platform.python_version()}, {platform.machine()}, "
            f"best of {options.repeats}.",
            "",
            "| call | MiB/s | beside sha256sum |",
            "|---|---|---|",
            *(f"| {name} | {speeds[name]:.0f} | {reference / times[name]:.2f} |" for name in times),
            "",
            f"The goal of {GOAL} MiB/s per core is {'met' if per_core >= GOAL else 'missed'}.",
            "",
        ]
    )
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
