"""What watching the loops costs a training step: processor time with and without observation, in turns.

    python benchmarks/observer_overhead.py [--rounds 20]

One step is forward and backward of ``cognexis-tiny`` at 8 loops on 4 rows of 128 tokens, on one thread. ``every step``
measures norms, changes, cosines, oscillation and the gate after each loop; with a log line every 10 steps, as
``cognexis train`` has them by default, it runs in a tenth of the steps. ``finite check`` is the flag per loop that
training always computes, against a step that leaves it out. The median of the rounds' ratios counts, because the steps
of a round see the same machine. Writes ``benchmarks/results/observer_overhead_cpu.md``.
"""

import argparse
import contextlib
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.training.callbacks.loop_statistics import loops_observed
from cognexis.training.callbacks.metrics import MetricBuffer

RESULT = Path(__file__).parent / "results" / "observer_overhead_cpu.md"
LOOPS, LOG_EVERY = 8, 10


def step(model: Any, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, num_loops=LOOPS, use_cache=False).loss.backward()
    model.zero_grad()


def seconds(model: Any, ids: torch.Tensor, around: Any) -> float:
    start = time.process_time()
    with around:
        step(model, ids)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = CognexisForCausalLM(CognexisConfig.from_variant("cognexis-tiny", recurrent_gating=True)).train()
    ids = torch.randint(5, model.config.vocab_size, (4, 128))
    metrics = MetricBuffer()
    is_finite = torch.ones((), dtype=torch.bool)
    always_finite = mock.patch("cognexis.decoder.recurrent_core.all_finite", return_value=is_finite)
    kinds = {
        "every step": lambda: loops_observed(model, metrics.add),
        "without the finite check": lambda: always_finite,
    }
    for around in (contextlib.nullcontext(), *(kind() for kind in kinds.values())):
        seconds(model, ids, around)
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    plain: list[float] = []
    for _ in range(rounds):
        first = seconds(model, ids, contextlib.nullcontext())
        found = {name: seconds(model, ids, kind()) for name, kind in kinds.items()}
        base = (first + seconds(model, ids, contextlib.nullcontext())) / 2
        plain.append(base)
        for name, value in found.items():
            ratios[name].append(value / base)
        metrics.drain()
    observed = statistics.median(ratios["every step"]) - 1
    checked = 1 / statistics.median(ratios["without the finite check"]) - 1
    lines = [
        "# What watching the loops costs a training step",
        "",
        f"`python benchmarks/observer_overhead.py`, {platform.machine()}, one thread, torch {torch.__version__},",
        f"{rounds} rounds, median step {1e3 * statistics.median(plain):.0f} ms of processor time.",
        "",
        "| what | share of a step |",
        "| --- | --- |",
        f"| statistics of every loop, in every step | {observed:.1%} |",
        f"| the same with a log line every {LOG_EVERY} steps (default) | {observed / LOG_EVERY:.1%} |",
        f"| a flag per loop for NaN and infinity (always on) | {checked:.1%} |",
    ]
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
