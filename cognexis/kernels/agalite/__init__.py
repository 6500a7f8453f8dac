"""Gated linear attention with oscillating low-rank memories.

Per head, with * elementwise and (x) the flattened outer product:

    K = relu(k) (x) relu(p1),   Q = relu(q) (x) relu(p2),   G = sigma(gamma) (x) sigma(p3),   b = sigma(beta)
    tilde_k_j <- keep (1 - G) * tilde_k_j + a_j G * K        a_j = cos(tick omega_j),  omega = linspace(-pi, pi, R)
    tilde_v_j <- keep (1 - b) * tilde_v_j + a_j b * v
    s         <- keep (1 - G) * s + G * K
    y = sum_j tilde_v_j (tilde_k_j . Q) / (2 R (s . Q) + eps)

keep is 0 at a reset. The tick counts tokens: it is 1 in a fresh state, and the first token after that has tick 2, also
after a reset; it is an integer and is reduced by the period of the cosines. With R = 2 both frequencies give the same
cosines. T = 0 returns the state. 16-bit inputs are computed, and memories kept, in float32.

Letters: B batch, T time, N heads, D head width, E = eta, F = D E (D major), R frequencies.
Source: Pramanik et al. 2024, AGaLiTe: Approximate Gated Linear Transformers for Online Reinforcement Learning.
"""

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.kernels.agalite.inputs import AgaliteInputs, AgaliteState
from cognexis.kernels.agalite.reference import agalite_reference
from cognexis.kernels.agalite.vectorised import agalite_vectorised
from cognexis.kernels.dispatch import choose
from cognexis.kernels.precision import no_autocast

_FORMS = {"reference": agalite_reference, "vectorised": agalite_vectorised}


def agalite_scan(
    inputs: AgaliteInputs,
    state: AgaliteState,
    tick: Tensor,
    *,
    resets: Tensor | None = None,
    eps: float = 1e-5,
    form: str | None = None,
) -> tuple[Tensor, AgaliteState, Tensor]:
    """Run a sequence.

    Args:
        inputs: the projections.
        state: the memories.
        tick: int64 ``[B]``, tokens so far.
        resets: bool ``[B, T]``.
        eps: added to the normaliser; positive.

    Returns:
        y ``[B, T, N, D]`` in the dtype of v, the memories, the tick.

    Raises:
        ShapeMismatchError: shapes do not fit.
        InvalidConfigError: eps is not positive.
    """
    B, T, N, D = inputs.v.shape
    E = inputs.p1.shape[-1]
    R = state.tilde_k.shape[1]
    if eps <= 0:
        raise InvalidConfigError(f"eps={eps}: must be positive", path="eps", value=eps)
    wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
        (name, getattr(inputs, name), (B, T, N, D)) for name in ("k", "q", "beta", "gamma")
    ]
    wanted += [(name, getattr(inputs, name), (B, T, N, E)) for name in ("p1", "p2", "p3")]
    wanted += [
        ("tilde_k", state.tilde_k, (B, R, N, D * E)),
        ("tilde_v", state.tilde_v, (B, R, N, D)),
        ("s", state.s, (B, N, D * E)),
        ("tick", tick, (B,)),
    ]
    if resets is not None:
        wanted.append(("resets", resets, (B, T)))
    for name, value, shape in wanted:
        if tuple(value.shape) != shape:
            raise ShapeMismatchError(f"agalite_scan: {name} of shape {list(value.shape)}, expected {list(shape)}")
    dtype = torch.promote_types(inputs.v.dtype, torch.float32)
    ticks = _ticks(tick, T, resets)
    chosen = choose("agalite_scan", inputs.v, form=form).form
    with no_autocast(inputs.v):
        y, after = _FORMS[chosen](
            AgaliteInputs(*(value.to(dtype) for value in inputs)),
            AgaliteState(*(value.to(dtype) for value in state)),
            *(ticks, resets, eps),
        )
    return y.to(inputs.v.dtype), after, ticks[:, -1] if T else tick


def _ticks(tick: Tensor, T: int, resets: Tensor | None) -> Tensor:
    """The tick of every token, ``[B, T]``."""
    at = torch.arange(T, device=tick.device)
    ticks = tick.long().unsqueeze(1) + at + 1
    if resets is None or not T:
        return ticks
    last = torch.where(resets, at, -1).cummax(1).values  # where the present episode began; -1: before the call
    return torch.where(last < 0, ticks, at - last + 2)


__all__ = ["AgaliteInputs", "AgaliteState", "agalite_scan"]
