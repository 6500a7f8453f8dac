"""Gated linear attention as discounted sums over time.

All memories of the keys, and the normaliser, share their discounts: they are R + 1 channels of one discounted sum
whose inputs differ by the factor cos(tick omega_j), which is 1 for the normaliser. The memories of the values are
another.
"""

import torch
from torch import Tensor

from cognexis.kernels.agalite.inputs import AgaliteInputs, AgaliteState, angles_of
from cognexis.kernels.discount.vectorised import discount_vectorised


def agalite_vectorised(
    inputs: AgaliteInputs, state: AgaliteState, ticks: Tensor, resets: Tensor | None, eps: float
) -> tuple[Tensor, AgaliteState]:
    """See ``agalite_scan``; the arguments have been checked and have one dtype."""
    if not inputs.k.shape[1]:
        return torch.zeros_like(inputs.v), state
    k, q, v, beta, gamma, p1, p2, p3 = (value.transpose(0, 1) for value in inputs)  # [T, B, N, ...]
    r = state.tilde_k.shape[1]
    beta = beta.sigmoid()
    query = (q.relu().unsqueeze(-1) * p2.relu().unsqueeze(-2)).flatten(-2)  # [T, B, N, F]
    gate = (gamma.sigmoid().unsqueeze(-1) * p3.sigmoid().unsqueeze(-2)).flatten(-2)
    driven = gate * (k.relu().unsqueeze(-1) * p1.relu().unsqueeze(-2)).flatten(-2)
    decay, forget = 1 - gate, 1 - beta
    if resets is not None:
        keep = (~resets).to(k.dtype).t()[..., None, None]
        decay, forget = decay * keep, forget * keep
    angle = angles_of(ticks.t(), r, k.dtype)  # [T, B, R]
    factors = torch.cat([angle, torch.ones_like(angle[..., :1])], -1)[..., None, None]
    start = torch.cat([state.tilde_k, state.s.unsqueeze(1)], 1)
    keys = discount_vectorised(start, factors * driven.unsqueeze(2), decay.unsqueeze(2))  # [T, B, R + 1, N, F]
    values = discount_vectorised(
        state.tilde_v, angle[..., None, None] * (beta * v).unsqueeze(2), forget.unsqueeze(2)
    )  # [T, B, R, N, D]
    match = (keys * query.unsqueeze(2)).sum(-1)  # [T, B, R + 1, N]
    mixed = (values * match[:, :, :r].unsqueeze(-1)).sum(2)
    y = mixed / (2 * r * match[:, :, r] + eps).unsqueeze(-1)
    return y.transpose(0, 1), AgaliteState(keys[-1, :, :r], values[-1], keys[-1, :, r])
