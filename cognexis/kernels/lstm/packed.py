"""The LSTM on packed sequences with a backward pass written by hand, for CPUs.

Tokens stand place by place: first those at place 0 of every sequence, longest sequence first, then those at place 1
of all that are as long, and so on. So what a place needs from the one before are that one's first rows.

With dh, dc the gradients that arrive from later places, the backward loop is

    dc += dh o (1 - tanh(c)^2)
    da = [dc g i (1 - i), dc c_{t-1} f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o)]
    to the place before: dh = da W_hh, dc = dc f

in which all factors are computed for all places beforehand, and the gradient of W_hh for all places afterwards.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def run_packed_lstm(
    net: nn.LSTM, tokens: Tensor, counts: list[int], states: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run all layers.

    Args:
        tokens: packed, ``[P, H]``.
        counts: how many sequences reach each place; falling.
        states: h and c ``[S, L, H]`` of the S sequences, longest first.

    Returns:
        y ``[P, H]``, and the last h and c ``[S, L, H]``.
    """
    dtype = tokens.dtype
    ends = _last_tokens(counts).to(tokens.device)
    finals = []
    for layer in range(net.num_layers):
        gates = tokens @ getattr(net, f"weight_ih_l{layer}").to(dtype).T
        if net.bias:
            gates = gates + (getattr(net, f"bias_ih_l{layer}") + getattr(net, f"bias_hh_l{layer}")).to(dtype)
        matrix = getattr(net, f"weight_hh_l{layer}").to(dtype)
        h, c = _PackedLayer.apply(gates, matrix, states[0][:, layer], states[1][:, layer], counts)
        finals.append((h[ends], c[ends]))
        tokens = h
        if net.training and layer + 1 < net.num_layers:
            tokens = F.dropout(tokens, net.dropout)
    return tokens, tuple(torch.stack(parts, 1) for parts in zip(*finals, strict=True))


def _last_tokens(counts: list[int]) -> Tensor:
    """Where the last token of each sequence stands."""
    per_place = torch.tensor(counts)
    lengths = (per_place[:, None] > torch.arange(counts[0])).sum(0)
    begins = per_place.cumsum(0) - per_place
    return begins[lengths - 1] + torch.arange(counts[0])


class _PackedLayer(torch.autograd.Function):
    """One layer on gates ``[P, 4 H]``; gives h and c of every token, ``[P, H]``."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, matrix: Tensor, h0: Tensor, c0: Tensor, counts: list[int]) -> Any:
        gates = gates.clone()
        width = h0.shape[1]
        hs, cs = gates.new_empty(2, len(gates), width).unbind(0)
        h, c = h0, c0
        across = matrix.T.contiguous()
        for a, h_new, c_new in zip(gates.split(counts), hs.split(counts), cs.split(counts), strict=True):
            count = len(a)
            a.addmm_(h[:count], across)
            i, f, g, o = a.split(width, 1)
            a[:, : 2 * width].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.addcmul(i * g, f, c[:count], out=c_new)
            torch.mul(c_new.tanh(), o, out=h_new)
            h, c = h_new, c_new
        ctx.counts = counts
        ctx.save_for_backward(gates, matrix, h0, c0, hs, cs)
        ctx.set_materialize_grads(False)
        return hs, cs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhs: Tensor | None, dcs: Tensor | None) -> Any:
        gates, matrix, h0, c0, hs, cs = ctx.saved_tensors
        counts, width = ctx.counts, h0.shape[1]
        h_before, c_before = (_before(first, parts, counts) for first, parts in ((h0, hs), (c0, cs)))
        i, f, g, o = gates.split(width, 1)
        tanh_c = cs.tanh()
        to_c = o * (1 - tanh_c * tanh_c)
        from_c = torch.cat([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)], 1).unflatten(1, (3, width))
        from_h = tanh_c * o * (1 - o)
        das = torch.empty_like(gates)
        dh, dc = torch.zeros_like(h0), torch.zeros_like(c0)
        begin = len(gates)
        for count in reversed(counts):
            here = slice(begin - count, begin)
            begin -= count
            dh_here, dc_here = dh[:count], dc[:count]
            if dhs is not None:
                dh_here = dh_here + dhs[here]
            if dcs is not None:
                dc_here = dc_here + dcs[here]
            dc_here = torch.addcmul(dc_here, dh_here, to_c[here])
            da = das[here]
            torch.mul(dc_here[:, None], from_c[here], out=da[:, : 3 * width].unflatten(1, (3, width)))
            torch.mul(dh_here, from_h[here], out=da[:, 3 * width :])
            torch.mm(da, matrix, out=dh[:count])
            torch.mul(dc_here, f[here], out=dc[:count])
        return das, das.T @ h_before, dh, dc, None


def _before(first: Tensor, parts: Tensor, counts: list[int]) -> Tensor:
    """What stood one place earlier, for every token."""
    shifted = [first]
    shifted += [part[:count] for part, count in zip(parts.split(counts), counts[1:], strict=False)]
    return torch.cat(shifted)
