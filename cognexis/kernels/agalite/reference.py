"""Gated linear attention as a loop over time."""

import torch
from torch import Tensor

from cognexis.kernels.agalite.inputs import AgaliteInputs, AgaliteState, angles_of


def agalite_reference(
    inputs: AgaliteInputs, state: AgaliteState, ticks: Tensor, resets: Tensor | None, eps: float
) -> tuple[Tensor, AgaliteState]:
    """See ``agalite_scan``; the arguments have been checked and have one dtype."""
    tilde_k, tilde_v, s = state
    r, outputs = tilde_k.shape[1], []
    for t in range(inputs.k.shape[1]):
        k, q, v, beta, gamma, p1, p2, p3 = (value[:, t] for value in inputs)
        beta = beta.sigmoid()
        key = (k.relu().unsqueeze(-1) * p1.relu().unsqueeze(-2)).flatten(-2)
        query = (q.relu().unsqueeze(-1) * p2.relu().unsqueeze(-2)).flatten(-2)
        gate = (gamma.sigmoid().unsqueeze(-1) * p3.sigmoid().unsqueeze(-2)).flatten(-2)
        angle = angles_of(ticks[:, t], r, k.dtype)[:, :, None, None]
        keep = torch.ones_like(k[:, 0, 0]) if resets is None else (~resets[:, t]).to(k.dtype)
        keep = keep[:, None, None]
        decay, forget = keep * (1 - gate), keep * (1 - beta)
        tilde_k = decay.unsqueeze(1) * tilde_k + angle * (gate * key).unsqueeze(1)
        tilde_v = forget.unsqueeze(1) * tilde_v + angle * (beta * v).unsqueeze(1)
        s = decay * s + gate * key
        match = torch.einsum("brnf,bnf->brn", tilde_k, query)
        total = torch.einsum("bnf,bnf->bn", s, query)
        outputs.append(torch.einsum("brnd,brn->bnd", tilde_v, match) / (2 * r * total + eps).unsqueeze(-1))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(inputs.v)
    return y, AgaliteState(tilde_k, tilde_v, s)
