"""What one call of gated linear attention is given."""

from typing import NamedTuple

import torch
from torch import Tensor


class AgaliteInputs(NamedTuple):
    """Projections of a sequence, before their nonlinearities: ``[B, T, N, D]`` and, for p1..p3, ``[B, T, N, E]``."""

    k: Tensor
    q: Tensor
    v: Tensor
    beta: Tensor
    gamma: Tensor
    p1: Tensor
    p2: Tensor
    p3: Tensor


class AgaliteState(NamedTuple):
    """Memories of the keys ``[B, R, N, F]``, of the values ``[B, R, N, D]``, and the normaliser ``[B, N, F]``."""

    tilde_k: Tensor
    tilde_v: Tensor
    s: Tensor


def angles_of(ticks: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """cos(tick omega_j) for integer ticks ``[...]``, ``[..., R]``, with omega = linspace(-pi, pi, R).

    All have the period 2 (R - 1), or 2 for R = 1, by which a tick is reduced first.
    """
    period = max(2 * (r - 1), 2)
    omegas = torch.linspace(-torch.pi, torch.pi, r, device=ticks.device, dtype=torch.float64)
    return ((ticks % period).unsqueeze(-1) * omegas).cos().to(dtype)
