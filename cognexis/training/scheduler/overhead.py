"""What a halting signal costs, measured, and whether it earns that back.

    core_seconds = (time of 1 + k loops - time of 1 loop) / k             of a forward on the given tokens
    head_seconds = one prediction of the value head on the same tokens
    + signal_seconds = coda, final norm, language-model head and softmax, if the head reads probabilities

A signal is paid in every loop that is run and saves the loops that are not. With m mean loops of L:

    cost    = m * (head_seconds + signal_seconds)
    savings = (L - m) * core_seconds

Where the cost reaches the savings the scheduler falls back to the rule on the change of the state, whose signal is
one subtraction and one norm.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.configuration_rules import VALUE_FEATURES
from cognexis.looping.signals import log_probabilities

_NEED_PROBABILITIES = {"confidence", "margin", "entropy", "prediction_change"}


@dataclass(frozen=True)
class Overhead:
    """Seconds of one loop on the same tokens.

    Attributes:
        core_seconds: the core.
        head_seconds: the value head.
        signal_seconds: what the head's features need besides; 0 when they need no probabilities.
        num_rows: rows that were measured.
        length: tokens of each.
        device: where.
    """

    core_seconds: float
    head_seconds: float
    signal_seconds: float
    num_rows: int
    length: int
    device: str


@dataclass(frozen=True)
class Decision:
    """Which scheduler a checkpoint gets, and why.

    Attributes:
        scheduler: settings for ``scheduler.json``.
        falls_back: the value head costs at least what it saves.
        cost_seconds: of the head over a run.
        saved_seconds: of the core over a run.
        reason: one sentence.
    """

    scheduler: dict[str, Any]
    falls_back: bool
    cost_seconds: float
    saved_seconds: float
    reason: str


@torch.no_grad()
def measure_overhead(
    model: Any, input_ids: Tensor, *, extra_loops: int = 4, repeats: int = 7, clock: Callable[[], float] | None = None
) -> Overhead:
    """Time the core and the value head of ``model`` on ``input_ids`` ``[B, T]``; medians of ``repeats`` runs.

    Args:
        extra_loops: k of the module docstring; fewer where the configuration allows fewer.
        clock: returns seconds; by default the process's clock, after the device has finished.
    """
    body, head = model.model, model.model.value_head
    extra = max(1, min(extra_loops, model.config.max_loops - 1))
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["state"], seen["arguments"] = args[0], kwargs

    def forward(num_loops: int) -> None:
        body(input_ids=input_ids, num_loops=num_loops, loop_mode="fixed", use_cache=False)

    handle = body.coda.register_forward_pre_hook(keep, with_kwargs=True)
    was_training = model.training
    model.eval()
    try:
        timer = _Timer(model.device, repeats, clock or time.perf_counter)
        once, more = timer.seconds(lambda: forward(1)), timer.seconds(lambda: forward(1 + extra))
        state, arguments = seen["state"], seen["arguments"]
        signals = {name: torch.rand_like(state[..., 0], dtype=torch.float32) for name in VALUE_FEATURES}
        in_head = timer.seconds(lambda: head.predict(state, loop_index=1, features=signals))
        in_signals = 0.0
        if _NEED_PROBABILITIES & set(head.feature_names):
            in_signals = timer.seconds(
                lambda: log_probabilities(model.lm_head(body.final_norm(body.coda(state, **arguments))))
            )
    finally:
        handle.remove()
        model.train(was_training)
    rows, length = input_ids.shape
    return Overhead(max(more - once, 0.0) / extra, in_head, in_signals, rows, length, str(model.device))


class _Timer:
    """Median seconds of a call, the device included."""

    def __init__(self, device: torch.device, repeats: int, clock: Callable[[], float]) -> None:
        self.device, self.repeats, self.clock = device, repeats, clock

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        found = []
        for _ in range(self.repeats):
            self._wait()
            start = self.clock()
            call()
            self._wait()
            found.append(self.clock() - start)
        return median(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def decide(
    overhead: Overhead,
    *,
    mean_loops: float,
    full_loops: int,
    value_scheduler: dict[str, Any],
    rule_scheduler: dict[str, Any],
) -> Decision:
    """Choose between the value head and the rule.

    Args:
        mean_loops: m, with the value head at its chosen threshold.
        full_loops: L.
        value_scheduler: settings that use the head.
        rule_scheduler: settings to fall back to.
    """
    cost = mean_loops * (overhead.head_seconds + overhead.signal_seconds)
    saved = (full_loops - mean_loops) * overhead.core_seconds
    falls_back = cost >= saved
    verdict = "costs at least what it saves: the scheduler falls back to rule_based" if falls_back else "pays"
    reason = (
        f"the value head takes {cost:.3g} s and saves {saved:.3g} s of {full_loops * overhead.core_seconds:.3g} s in "
        f"the core ({mean_loops:.2f} of {full_loops} loops), so it {verdict}"
    )
    return Decision(rule_scheduler if falls_back else value_scheduler, falls_back, cost, saved, reason)
