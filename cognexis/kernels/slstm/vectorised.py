"""The sLSTM recurrence with a lean loop forwards and a hand-written loop backwards.

Nothing but what depends on the previous token stands inside the loops: one batched product and a dozen elementwise
operations into memory that is there already. The backward pass first computes, for all tokens at once, the factors of
the recurrence

    dc += dy K_c,  dn += dy K_n,  X = dc P + dn Q
    di = dm - X where a_i was the maximum, else X;   dl = dm - di
    df = dl (1 - sigmoid(a_f)),  dz = dc Z,  do = dy O
    backwards in time: dy = R^T [di, df, dz, do],  dc F,  dn F,  dm = dl

where X is the gradient of the exponent that is below the maximum; shifting i, l and m together changes neither
exponent, hence dl + di = dm. Gradients of the matrices and biases are one product over all tokens at the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cognexis.kernels.precision import wide_dtype
from cognexis.kernels.slstm.reference import SMALLEST


def slstm_vectorised(wx: Tensor, r: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`cognexis.kernels.slstm.slstm_sequence`."""
    wide = wide_dtype(wx, r, b, state)
    gates = (wx.to(wide) + b.to(wide)).permute(1, 3, 0, 2, 4)  # [T, N, B, 4, D]
    matrices = r.to(wide).permute(1, 3, 0, 2).flatten(2)  # [N, D, 4 * D]
    start = state.to(wide).transpose(1, 2)  # [4, N, B, D]
    keep = None if resets is None else (~resets).T.to(wide)[:, None, :, None]  # [T, 1, B, 1]
    y, others = _Recurrence.apply(gates.contiguous(), matrices.contiguous(), start, keep)
    return y.permute(2, 0, 1, 3).to(wx.dtype), others.permute(1, 0, 3, 2, 4)


class _Recurrence(torch.autograd.Function):
    """The loop on gates ``[T, N, B, 4, D]``; gives y ``[T, N, B, D]`` and c, n, m ``[T, 3, N, B, D]``."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, matrices: Tensor, start: Tensor, keep: Tensor | None) -> Any:
        length = gates.shape[0]
        gates = gates.clone()
        ys = gates.new_empty(length + 1, *start.shape[1:])
        others = gates.new_empty(length + 1, 3, *start.shape[1:])
        ys[0], others[0] = start[0], start[1:]
        rows = gates.flatten(3).unbind(0)
        inputs, forgets, news, outs = (gates[..., g, :].unbind(0) for g in range(4))
        cs, ns, ms = (others[:, part].unbind(0) for part in range(3))
        resets_at = _tokens_with_resets(keep)
        for t, y in enumerate(ys[:-1].unbind(0)):
            c, n, m = cs[t], ns[t], ms[t]
            if t in resets_at:
                y, c, n, m = (part * keep[t] for part in (y, c, n, m))  # type: ignore[index]
            torch.baddbmm(rows[t], y, matrices, out=rows[t])
            forgotten = F.logsigmoid(forgets[t]).add_(m)
            top = torch.maximum(inputs[t], forgotten, out=ms[t + 1])
            if t == 0 or t in resets_at:  # n is zero nowhere else
                top.copy_(torch.where(n == 0, inputs[t], top))
                forgotten = torch.minimum(forgotten, top)
            kept = forgotten.sub_(top).exp_()
            write = (inputs[t] - top).exp_()
            torch.addcmul(write, kept, n, out=ns[t + 1])
            torch.addcmul(write.mul_(news[t].tanh()), kept, c, out=cs[t + 1])
            torch.mul(outs[t].sigmoid(), cs[t + 1], out=ys[t + 1]).div_(ns[t + 1] + SMALLEST)
        ctx.save_for_backward(gates, matrices, ys, others, keep)
        ctx.set_materialize_grads(False)
        return ys[1:], others[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dys: Tensor | None, dothers: Tensor | None) -> Any:
        gates, matrices, ys, others, keep = ctx.saved_tensors
        before = (ys[:-1], *others[:-1].unbind(1))
        if keep is not None:
            before = tuple(part * keep for part in before)
        to_c, to_n, p, q, is_input, to_f, to_z, to_o, kept = _factors(gates, ys[1:], others[1:], before)
        dgates = torch.empty_like(gates)
        rows = dgates.flatten(3).unbind(0)
        dinputs, dforgets, dnews, douts = (dgates[..., g, :].unbind(0) for g in range(4))
        back = matrices.transpose(1, 2).contiguous()
        resets_at = _tokens_with_resets(keep)
        dy, dc, dn, dm = torch.zeros_like(others[0, 0].expand(4, *others.shape[2:])).unbind(0)
        sign = 1 - 2 * is_input
        for t in range(gates.shape[0] - 1, -1, -1):
            if dys is not None:
                dy = dy + dys[t]
            if dothers is not None:
                dc, dn, dm = dc + dothers[t, 0], dn + dothers[t, 1], dm + dothers[t, 2]
            dc = torch.addcmul(dc, dy, to_c[t])
            dn = torch.addcmul(dn, dy, to_n[t])
            below = (dc * p[t]).addcmul_(dn, q[t])
            torch.mul(is_input[t], dm, out=dinputs[t]).addcmul_(sign[t], below)
            dm = dm - dinputs[t]
            torch.mul(dm, to_f[t], out=dforgets[t])
            torch.mul(dc, to_z[t], out=dnews[t])
            torch.mul(dy, to_o[t], out=douts[t])
            dy = torch.bmm(rows[t], back)
            dc = dc * kept[t]
            dn = dn * kept[t]
            if t in resets_at:
                dy, dc, dn, dm = (part * keep[t] for part in (dy, dc, dn, dm))
        ys_before = before[0].permute(1, 3, 0, 2).flatten(2)  # [N, D, T * B]
        dmatrices = ys_before @ dgates.transpose(0, 1).flatten(3).flatten(1, 2)
        return dgates, dmatrices, torch.stack([dy, dc, dn, dm]), None


def _tokens_with_resets(keep: Tensor | None) -> frozenset[int]:
    """Where a row may have a reset; everywhere if the values cannot be read, which gives the same numbers."""
    if keep is None:
        return frozenset()
    if keep.is_meta or torch.compiler.is_compiling():
        return frozenset(range(len(keep)))
    return frozenset((keep == 0).flatten(1).any(1).nonzero()[:, 0].tolist())


def _factors(gates: Tensor, y: Tensor, others: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the backward loop multiplies with, for all tokens; see the head of this file for the names."""
    i, f, z, o = gates.unbind(3)
    _, c, n, m = before
    divisor = others[:, 1] + SMALLEST
    forgotten = m + F.logsigmoid(f)
    is_input = (n == 0) | (i >= forgotten)
    write, kept = ((part - others[:, 2]).clamp(max=0).exp() for part in (i, forgotten))
    moved = torch.where(forgotten <= others[:, 2], kept, 0)  # no gradient where the exponent is cut
    z, o = z.tanh(), o.sigmoid()
    return (
        o / divisor,
        -y / divisor,
        torch.where(is_input, moved * c, write * z),
        torch.where(is_input, moved * n, write),
        is_input.to(y.dtype),
        (-f).sigmoid(),
        write * (1 - z * z),
        y * (1 - o),
        kept,
    )
