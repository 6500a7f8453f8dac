"""The RTU on complex numbers, as a scan over chunks of time.

With c = c1 + i c2 and lam = g + i p the recurrence is c_t = keep_t lam c_{t-1} + v_t. Time is cut into chunks of about
sqrt(T) steps: all chunks run side by side from zero, then the ends of the chunks are joined, then what enters a chunk
is added to its steps with the powers of lam. The adjoint is the same scan backwards in time with conj(lam),

    s_t = dc_t + keep_{t+1} conj(lam) s_{t+1}
    dv = s,   dlam = sum s_t conj(keep_t c_{t-1}),   dstart = keep_1 conj(lam) s_1

Traces are needed at the end only, and there all are combinations of two sums over time with the weights
W_t = lam^(T-t) (0 where a reset lies behind t): of W_t c_{t-1} and of W_t z_t.
"""

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from cognexis.kernels.rtu.poles import pole_of, rtu_activation
from cognexis.kernels.rtu.reference import rtu_reference

_NEGLIGIBLE = 1e-30  # powers below count as 0: nobody sees them, and subnormal numbers are slow


def rtu_vectorised(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    state: tuple[Tensor, Tensor],
    traces: tuple[Tensor, ...] | None,
    resets: Tensor | None,
    activation: str,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...] | None]:
    """See ``rtu_stream``; the arguments have been checked and have one dtype, the boundary term is in ``state``."""
    if x.shape[1] < 2:  # nothing to scan
        return rtu_reference(x, nu_log, theta_log, w1, w2, state, traces, resets, activation)
    pole = pole_of(nu_log, theta_log)
    lam = torch.complex(pole.g, pole.p)
    if w1.dim() == 2:
        drive = (x @ torch.cat([w1 * pole.gam, w2 * pole.gam], -1)).unflatten(-1, (2, -1))
        drive = torch.complex(drive[..., 0, :], drive[..., 1, :])
    else:
        drive = torch.complex(x * (w1 * pole.gam), x * (w2 * pole.gam))
    keep = None if resets is None else (~resets).to(x.dtype)
    start = torch.complex(*state)
    c = _Scan.apply(drive, lam, start, keep, False)
    new_traces = None if traces is None else _final_traces(x, nu_log, theta_log, w1, w2, start, c, traces, keep)
    parts = torch.view_as_real(c).movedim(-1, -2).flatten(-2)  # [B, T, 2H]
    last = parts[:, -1].chunk(2, -1)
    return rtu_activation(activation)(parts), (last[0], last[1]), new_traces


class _Scan(torch.autograd.Function):
    """c_t = keep_t lam c_{t-1} + v_t; ``reverse`` runs it from the last step to the first."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, lam: Tensor, start: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
        c = _scan(v, lam, start, keep, reverse)
        ctx.save_for_backward(lam, start, c, keep)
        ctx.reverse = reverse
        return c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        lam, start, c, keep = ctx.saved_tensors
        shifted = None
        if keep is not None:
            one = torch.ones_like(keep[:, :1])
            shifted = torch.cat([one, keep[:, :-1]], 1) if ctx.reverse else torch.cat([keep[:, 1:], one], 1)
        s = _Scan.apply(grads[0], lam.conj().resolve_conj(), torch.zeros_like(start), shifted, not ctx.reverse)
        before, rest = (-1, slice(1, None)) if ctx.reverse else (0, slice(None, -1))
        after = slice(None, -1) if ctx.reverse else slice(1, None)
        first, later = (s[:, before], s[:, after])
        if keep is not None:
            first, later = first * keep[:, before, None], later * keep[:, after, None]
        d_lam = (later * c[:, rest].conj()).sum((0, 1)) + (first * start.conj()).sum(0)
        return s, d_lam, first * lam.conj(), None, None


def _powers(lam: Tensor, count: int) -> Tensor:
    """lam^1 .. lam^count, ``[count, H]``, by doubling."""
    powers = lam.unsqueeze(0)
    while powers.shape[0] < count:
        powers = torch.cat([powers, powers * powers[-1]])
    parts = torch.view_as_real(powers[:count])
    return torch.view_as_complex(parts.masked_fill(parts.abs() < _NEGLIGIBLE, 0))


def _scan(v: Tensor, lam: Tensor, start: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
    B, T, H = v.shape
    C = isqrt(T - 1) + 1 if T else 1
    n = -(-T // C)
    if n * C != T:
        v = torch.cat([v, v.new_zeros(B, n * C - T, H)], 1)
        if keep is not None:
            keep = torch.cat([keep, keep.new_ones(B, n * C - T)], 1)
    v = v.reshape(B, n, C, H)
    c = torch.empty_like(v)
    steps = range(C)[::-1] if reverse else range(C)
    powers = _powers(lam, C)
    weights = powers.flip(0) if reverse else powers
    entry = weights.unsqueeze(0).unsqueeze(0)  # [1, 1, C, H]: what a chunk's start is worth at each of its steps
    if keep is not None:
        keep = keep.view(B, n, C)
        alive = keep.flip(2).cumprod(2).flip(2) if reverse else keep.cumprod(2)
        entry = entry * alive.unsqueeze(-1)
    for position, j in enumerate(steps):
        if position == 0:
            c[:, :, j] = v[:, :, j]
            continue
        decay = lam if keep is None else lam * keep[:, :, j, None]
        torch.addcmul(v[:, :, j], decay, c[:, :, steps[position - 1]], out=c[:, :, j])
    last = steps[-1]
    carries = [start]
    chunks = range(n)[::-1] if reverse else range(n)
    for i in chunks[:-1]:
        at_end = entry[0 if keep is None else slice(None), 0 if keep is None else i, last]
        carries.append(torch.addcmul(c[:, i, last], at_end, carries[-1]))
    carried = torch.stack(carries[::-1] if reverse else carries, 1).unsqueeze(2)  # [B, n, 1, H]
    c.addcmul_(entry.expand_as(c), carried)
    return c.view(B, n * C, H)[:, :T]


@torch.no_grad()
def _final_traces(
    x: Tensor,
    nu_log: Tensor,
    theta_log: Tensor,
    w1: Tensor,
    w2: Tensor,
    start: Tensor,
    c: Tensor,
    traces: tuple[Tensor, ...],
    keep: Tensor | None,
) -> tuple[Tensor, ...]:
    pole = pole_of(nu_log, theta_log)
    lam = torch.complex(pole.g, pole.p)
    T = x.shape[1]
    powers = _powers(lam, T)
    weights = torch.cat([powers[:-1].flip(0), torch.ones_like(powers[:1])]).unsqueeze(0)  # [1, T, H]: lam^(T-t)
    entry, past = powers[-1], torch.cat([start.unsqueeze(1), c[:, :-1]], 1)
    if keep is not None:
        alive = keep.flip(1).cumprod(1).flip(1)  # no reset at or behind t
        entry = entry * alive[:, :1]
        behind = torch.cat([alive[:, 1:], torch.ones_like(alive[:, :1])], 1)
        past = past * alive.unsqueeze(-1)
        x = x * behind.unsqueeze(-1)
    sum_c = (past * weights).sum(1)
    if w1.dim() == 2:
        flat = torch.cat([weights.real, weights.imag], -1)  # [1, T, 2H]
        both = x.transpose(1, 2) @ flat
        sum_z = torch.complex(*both.chunk(2, -1))  # [B, D, H]
        sum_u = (sum_z * torch.complex(w1, w2)).sum(1)
        entry_w = entry.unsqueeze(1) if entry.dim() == 2 else entry
    else:
        sum_z = torch.complex(*((x * part.contiguous()).sum(1) for part in (weights.real, weights.imag)))
        sum_u = sum_z * torch.complex(w1, w2)
        entry_w = entry
    nu, th, w_1, w_2 = (torch.complex(*traces[i : i + 2]) for i in (0, 2, 4, 6))
    turned = lam * sum_c
    nu = entry * nu - pole.rate * turned + pole.gam_slope * sum_u
    th = entry * th + 1j * pole.theta * turned
    driven = pole.gam * sum_z
    pairs = (nu, th, entry_w * w_1 + driven, entry_w * w_2 + 1j * driven)
    return tuple(part.contiguous() for pair in pairs for part in (pair.real, pair.imag))
