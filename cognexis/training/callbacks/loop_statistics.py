"""What the state does from loop to loop, as summaries; no tensor with tokens leaves this module.

For loop t with h_t ``[B, T, H]``, over the real tokens:

    state_norm   mean ||h_t||           max_norm   max ||h_t||
    delta_norm   mean ||h_t - h_{t-1}||   cosine   mean cos(h_t, h_{t-1})
    oscillation  mean cos(h_t - h_{t-1}, h_{t-1} - h_{t-2}), from the second loop on; -1 where the state jumps
    nonfinite    values that are NaN or infinite

and of a gate g ``[B, T, H]`` its mean and the shares below 0.05 and above 0.95.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cognexis.looping.signals import hidden_delta, oscillation, state_norm
from cognexis.training.loop_states import loops_watched

LoopHook = Callable[[int, Tensor, Tensor], None]
"""``observe_loop(loop_index, hidden, delta)``: the loop from 1, its state and the change of it, ``[B, T, H]``."""


@torch.no_grad()
def state_statistics(
    state: Tensor, previous: Tensor, before: Tensor | None = None, is_real: Tensor | None = None
) -> dict[str, Tensor]:
    """Summaries of one loop, scalars on the device.

    Args:
        state: ``[B, T, H]`` after the loop.
        previous: ``[B, T, H]`` before it.
        before: ``[B, T, H]`` one loop earlier.
        is_real: ``[B, T]`` bool, False at padding; None: all are real.
    """
    norms = state_norm(state)
    cosines = torch.nn.functional.cosine_similarity(state.float(), previous.float(), dim=-1)
    found = {
        "state_norm": _mean(norms, is_real),
        "max_norm": (norms if is_real is None else torch.where(is_real, norms, 0)).max(),
        "delta_norm": _mean(hidden_delta(state, previous), is_real),
        "cosine": _mean(cosines, is_real),
        "nonfinite": (~torch.isfinite(state)).sum().float(),
    }
    if before is not None:
        found["oscillation"] = _mean(oscillation(state, previous, before), is_real)
    return found


@torch.no_grad()
def gate_statistics(gate: Tensor) -> dict[str, Tensor]:
    """Mean of a gate, and how much of it is nearly closed or nearly open."""
    gate = gate.float()
    return {
        "mean": gate.mean(),
        "share_closed": (gate < 0.05).float().mean(),
        "share_open": (gate > 0.95).float().mean(),
    }


@contextmanager
def loops_observed(
    model: Any, report: Callable[[str, Tensor], None], is_real: Tensor | None = None, hook: LoopHook | None = None
) -> Iterator[None]:
    """Report the summaries of every loop of the forward passes within.

    Args:
        model: a causal language model.
        report: gets a name such as "loops/state_norm_3" (third loop) and a scalar.
        hook: is called after each loop, besides.
    """
    last: list[Tensor] = []
    gates = 0

    def begin(h0: Tensor, arguments: dict[str, Any]) -> None:
        nonlocal gates
        last[:], gates = [h0.detach()], 0

    def visit(state: Tensor, _: Any) -> None:
        state = state.detach()
        loop = len(last)
        before = last[-2] if loop > 1 else None
        for name, value in state_statistics(state, last[-1], before, is_real).items():
            report(f"loops/{name}_{loop}", value)
        if hook is not None:
            hook(loop, state, state - last[-1])
        last.append(state)

    def visit_gate(module: Any, args: tuple[Any, ...], state: Tensor) -> None:
        nonlocal gates
        gate = args[1]
        if gate is None:  # there is none, or stochastic depth skipped the loop
            return
        gates += 1
        for name, value in gate_statistics(gate.detach()).items():
            report(f"gate/{name}_{gates}", value)

    handle = model.model.recurrent.loop_state.register_forward_hook(visit_gate)
    try:
        with loops_watched(model, visit, begin):
            yield
    finally:
        handle.remove()


def _mean(values: Tensor, is_real: Tensor | None) -> Tensor:
    if is_real is None:
        return values.mean()
    return torch.where(is_real, values, 0).sum() / is_real.sum().clamp(min=1)
