"""RTU: one complex pole per channel, driven by the input, with sensitivities that are carried forward in time.

    u1_t = w1 * z_t, u2_t = w2 * z_t             (diagonal: w1, w2 of shape [H])
    u1_t = z_t @ w1, u2_t = z_t @ w2             (full rank: w1, w2 of shape [D, H])
    c1_t = g c1_{t-1} - p c2_{t-1} + gam u1_t,   c2_t = g c2_{t-1} + p c1_{t-1} + gam u2_t
    y_t  = [act(c1_t), act(c2_t)]

with g + i p = r e^{i th}, r = exp(-e^{nu_log}), th = e^{theta_log}, gam = sqrt(1 - r^2).

Traces E_q = dc/dq for q in (nu_log, theta_log, w1, w2) follow the same recurrence, for instance
E_nu' = lam E_nu - e^{nu_log} lam c + (dgam/dnu_log) u in complex form with the state c *before* the step. If the
incoming state is cut off from the gradient and traces are given, their product with dL/dstate is added to the
gradients of these four parameters: truncated training then has the gradient of the whole sequence for them (and for
what reads the output), though not for anything that produced earlier inputs. If the state carries a gradient, it
flows through the state and nothing is added. Traces themselves carry no gradient.

A reset at t sets c and all traces of the row to 0 before the step. T = 0 returns the arguments. 16-bit inputs are
computed, and states and traces kept, in float32.

Letters: B batch, T time, D width of the input, H width of the state (D = H in the diagonal form).
Source: Elelimy et al. 2024, Real-Time Recurrent Learning using Trace Units (RTU). The time loop of the paper is a scan
over chunks here.
"""

import torch
from torch import Tensor

from cognexis.errors import ShapeMismatchError
from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import no_autocast
from cognexis.kernels.rtu.poles import NU_LIMIT, attach_traces, pole_of, rtu_activation
from cognexis.kernels.rtu.reference import rtu_reference
from cognexis.kernels.rtu.vectorised import rtu_vectorised

TRACE_NAMES = tuple(f"E_{name}_{part}" for name in ("nu", "th", "w1", "w2") for part in ("c1", "c2"))
_FORMS = {"reference": rtu_reference, "vectorised": rtu_vectorised}
State = tuple[Tensor, Tensor]
Traces = tuple[Tensor, ...]


def rtu_stream(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    state: State,
    traces: Traces | None = None,
    resets: Tensor | None = None,
    activation: str = "identity",
    form: str | None = None,
) -> tuple[Tensor, State, Traces | None]:
    """Run the recurrence over a sequence.

    Args:
        x: ``[B, T, D]``.
        nu_log, theta_log: ``[H]``.
        w1, w2: ``[H]`` (diagonal) or ``[D, H]`` (full rank).
        state: c1 and c2 before the first step, ``[B, H]`` each.
        traces: the eight of ``TRACE_NAMES``, ``[B, H]`` each, those of full-rank w1 and w2 ``[B, D, H]``; None: no
            traces, and no term at the boundary.
        resets: bool ``[B, T]``, or ``[B]`` for the first step.
        activation: identity, linear, relu, silu, swish or tanh.

    Returns:
        y ``[B, T, 2H]`` in x's dtype, the state, and the traces (None where none were given).

    Raises:
        ShapeMismatchError: shapes do not fit.
    """
    _check_shapes(x, nu_log, theta_log, w1, w2, state, traces)
    rtu_activation(activation)
    resets = _whole_mask(resets, x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, nu_log.dtype), torch.float32)
    nu_log, theta_log, w1, w2 = (value.to(dtype) for value in (nu_log, theta_log, w1, w2))
    c1, c2 = (value.to(dtype) for value in state)
    if traces is not None:
        traces = tuple(trace.detach().to(dtype) for trace in traces)
        if torch.is_grad_enabled() and not (c1.requires_grad or c2.requires_grad):
            parameters = nu_log.clamp(-NU_LIMIT, NU_LIMIT), theta_log, w1, w2
            c1 = attach_traces(c1, traces[0::2], parameters)
            c2 = attach_traces(c2, traces[1::2], parameters)
    chosen = choose("rtu_stream", x, form=form).form
    with no_autocast(x):
        y, last, traces = _FORMS[chosen](x.to(dtype), nu_log, theta_log, w1, w2, (c1, c2), traces, resets, activation)
    return y.to(x.dtype), last, traces


def rtu_stream_diag_pytorch(
    *,
    x_btd: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    activation_name: str,
    hc1_init_bh: Tensor,
    hc2_init_bh: Tensor,
    trace_in: Traces | None = None,
    resets_bt: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, State, Traces]:
    """``rtu_stream`` with diagonal input maps; ``trace_in=None`` means traces of zero."""
    return _stream(
        *(x_btd, nu_log, theta_log, w1, w2, hc1_init_bh, hc2_init_bh, trace_in, resets_bt, activation_name, form)
    )


def rtu_stream_full_pytorch(
    *,
    x_btd: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    Wc1: Tensor,
    Wc2: Tensor,
    activation_name: str,
    hc1_init_bh: Tensor,
    hc2_init_bh: Tensor,
    trace_in: Traces | None = None,
    resets_bt: Tensor | None = None,
    form: str | None = None,
) -> tuple[Tensor, State, Traces]:
    """``rtu_stream`` with dense input maps ``[D, H]``; ``trace_in=None`` means traces of zero."""
    return _stream(
        *(x_btd, nu_log, theta_log, Wc1, Wc2, hc1_init_bh, hc2_init_bh, trace_in, resets_bt, activation_name, form)
    )


def zero_traces(start: Tensor, w1: Tensor) -> Traces:
    """Traces of a fresh state that has the shape, dtype and device of ``start`` ``[B, H]``."""
    shape = (start.shape[0], *w1.shape) if w1.dim() == 2 else tuple(start.shape)
    small, large = torch.zeros_like(start.detach()), start.detach().new_zeros(shape)
    return tuple(small.clone() for _ in range(4)) + tuple(large.clone() for _ in range(4))


def _stream(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    c1: Tensor,
    c2: Tensor,
    traces: Traces | None,
    resets: Tensor | None,
    activation: str,
    form: str | None,
) -> tuple[Tensor, State, Traces]:
    known = zero_traces(c1, w1) if traces is None else tuple(traces)
    y, state, last = rtu_stream(
        *(x, nu_log, theta_log, w1, w2),
        state=(c1, c2),
        traces=known,
        resets=resets,
        activation=activation,
        form=form,
    )
    assert last is not None
    return y, state, last


def _whole_mask(resets: Tensor | None, x: Tensor) -> Tensor | None:
    """Bool ``[B, T]``; a mask ``[B]`` means the first step."""
    if resets is None:
        return None
    rows, length = x.shape[:2]
    mask = resets if resets.dtype == torch.bool else resets != 0
    if mask.shape == (rows, length):
        return mask
    if mask.shape == (rows,):
        later = torch.zeros(rows, max(length - 1, 0), dtype=torch.bool, device=mask.device)
        return torch.cat([mask.unsqueeze(1), later], 1)[:, :length]
    raise ShapeMismatchError(
        f"rtu_stream: resets of shape {list(mask.shape)}, expected [{rows}, {length}] or [{rows}]"
    )


def _check_shapes(
    x: Tensor, nu_log: Tensor, theta_log: Tensor, w1: Tensor, w2: Tensor, state: State, traces: Traces | None
) -> None:
    H = nu_log.shape[-1]
    if x.dim() != 3:
        raise ShapeMismatchError(f"rtu_stream: input of shape {list(x.shape)}, expected [B, T, D]")
    B, _, D = x.shape
    weight = (D, H) if w1.dim() == 2 else (H,)
    if w1.dim() == 1 and D != H:
        raise ShapeMismatchError(f"rtu_stream: input of width {D}, expected {H}")
    wanted: dict[str, tuple[tuple[int, ...], Tensor]] = {
        "nu_log": ((H,), nu_log),
        "theta_log": ((H,), theta_log),
        "w1": (weight, w1),
        "w2": (weight, w2),
        "c1": ((B, H), state[0]),
        "c2": ((B, H), state[1]),
    }
    if traces is not None:
        if len(traces) != len(TRACE_NAMES):
            raise ShapeMismatchError(f"rtu_stream: {len(traces)} traces, expected {len(TRACE_NAMES)}")
        shapes = [(B, H)] * 4 + [(B, *weight)] * 4
        wanted |= {name: (shape, value) for name, shape, value in zip(TRACE_NAMES, shapes, traces, strict=True)}
    for name, (shape, value) in wanted.items():
        if tuple(value.shape) != shape:
            raise ShapeMismatchError(f"rtu_stream: {name} of shape {list(value.shape)}, expected {list(shape)}")


__all__ = [
    "TRACE_NAMES",
    "pole_of",
    "rtu_stream",
    "rtu_stream_diag_pytorch",
    "rtu_stream_full_pytorch",
    "zero_traces",
]
