"""The RTU as a loop over time, with every trace carried along; backward by automatic differentiation."""

import torch
from torch import Tensor

from cognexis.kernels.rtu.poles import pole_of, rtu_activation

Pair = tuple[Tensor, Tensor]


def rtu_reference(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    state: Pair,
    traces: tuple[Tensor, ...] | None,
    resets: Tensor | None,
    activation: str,
) -> tuple[Tensor, Pair, tuple[Tensor, ...] | None]:
    """See ``rtu_stream``; the arguments have been checked and have one dtype, the boundary term is in ``state``."""
    pole = pole_of(nu_log, theta_log)
    fixed = pole_of(nu_log.detach(), theta_log.detach())
    is_full = w1.dim() == 2
    act = rtu_activation(activation)
    (c1, c2), outputs = state, []
    for t in range(x.shape[1]):
        z = x[:, t]
        if resets is not None:
            keep = (~resets[:, t]).to(x.dtype).unsqueeze(-1)
            c1, c2 = c1 * keep, c2 * keep
            if traces is not None:
                traces = tuple(trace * (keep.unsqueeze(-1) if trace.dim() == 3 else keep) for trace in traces)
        u1, u2 = (z @ w1, z @ w2) if is_full else (z * w1, z * w2)
        if traces is not None:
            with torch.no_grad():
                traces = _next_traces(traces, fixed, z, u1, u2, c1, c2, is_full)
        c1, c2 = pole.g * c1 - pole.p * c2 + pole.gam * u1, pole.g * c2 + pole.p * c1 + pole.gam * u2
        outputs.append(torch.cat([act(c1), act(c2)], -1))
    y = torch.stack(outputs, 1) if outputs else x.new_zeros(x.shape[0], 0, 2 * nu_log.shape[0])
    return y, (c1, c2), traces


def _next_traces(
    traces: tuple[Tensor, ...],
    pole: tuple[Tensor, ...],
    z: Tensor,
    u1: Tensor,
    u2: Tensor,
    c1: Tensor,
    c2: Tensor,
    is_full: bool,
) -> tuple[Tensor, ...]:
    g, p, gam, rate, theta, gam_slope = pole
    nu1, nu2, th1, th2, w11, w12, w21, w22 = traces
    drive = gam * (z.unsqueeze(-1) if is_full else z)
    return (
        g * nu1 - p * nu2 - rate * g * c1 + rate * p * c2 + gam_slope * u1,
        g * nu2 + p * nu1 - rate * g * c2 - rate * p * c1 + gam_slope * u2,
        g * th1 - p * th2 - theta * p * c1 - theta * g * c2,
        g * th2 + p * th1 - theta * p * c2 + theta * g * c1,
        g * w11 - p * w12 + drive,
        g * w12 + p * w11,
        g * w21 - p * w22,
        g * w22 + p * w21 + drive,
    )
