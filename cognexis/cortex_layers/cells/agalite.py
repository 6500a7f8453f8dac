"""AGaLiTe: gated linear attention with oscillating low-rank memories, as a cell.

    (k, q, v, beta, gamma) = kqvbg_proj(x),   (p1, p2, p3) = p123_proj(x),   y = dropout(out_proj(heads))

``cognexis.kernels.agalite`` has the recurrence. State: ``tilde_k`` ``[B, R, N, F]``, ``tilde_v`` ``[B, R, N, D]`` and
``s`` ``[B, N, F]``, zero at first and float32 for 16-bit inputs, and ``tick`` ``[B]``, int64 and 1 at first. A reset
restores all four, so that the first token of an episode always has the same angle. ``detach_memory`` cuts the gradient
between calls.

Letters: B batch, T time, N heads, D head width, F = eta D, R frequencies. Source: Pramanik et al. 2024, AGaLiTe.
"""

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import AGaLiTeCellConfig
from cognexis.cortex_layers.state import accumulator_dtype, as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.agalite import AgaliteInputs, AgaliteState, agalite_scan

_FIRST_TICK = 1


class AGaLiTeCell(MemoryCell):
    """Gated linear attention as a memory cell.

    Args:
        cfg: ``n_heads`` times ``head_dim`` must be ``hidden_size``.
    """

    def __init__(self, cfg: AGaLiTeCellConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        self.cfg = cfg
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.head_dim or self.hidden_size // cfg.n_heads
        width = self.n_heads * self.head_dim
        if width != self.hidden_size:
            raise ValueError(
                f"AGaLiTeCell: n_heads={cfg.n_heads}, head_dim={cfg.head_dim}: their product must be "
                f"hidden_size={self.hidden_size}"
            )
        self.kqvbg_proj = nn.Linear(self.hidden_size, 5 * width, bias=False)
        self.p123_proj = nn.Linear(self.hidden_size, 3 * self.n_heads * cfg.eta, bias=False)
        self.out_proj = nn.Linear(width, self.hidden_size)
        self.dropout = nn.Dropout(cfg.dropout)
        for linear in (self.kqvbg_proj, self.p123_proj, self.out_proj):
            nn.init.orthogonal_(linear.weight, math.sqrt(2))
        nn.init.zeros_(self.out_proj.bias)

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        kept: dict[str, Any] = {"device": device, "dtype": accumulator_dtype(dtype)}
        N, D, R, F = self.n_heads, self.head_dim, self.cfg.r, self.cfg.eta * self.head_dim
        return TensorDict(
            {
                "tilde_k": torch.zeros(batch, R, N, F, **kept),
                "tilde_v": torch.zeros(batch, R, N, D, **kept),
                "s": torch.zeros(batch, N, F, **kept),
                "tick": torch.full((batch,), _FIRST_TICK, device=device, dtype=torch.long),
            },
            batch_size=[batch],
            device=device,
        )

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "AGaLiTeCell")
        if state is None or not has_keys(state, "tilde_k", "tilde_v", "s", "tick"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if x.shape[1] == 0:
            return x, state
        heads = self.kqvbg_proj(x).unflatten(-1, (self.n_heads, 5, self.head_dim)).unbind(-2)
        gates = self.p123_proj(x).unflatten(-1, (self.n_heads, 3, self.cfg.eta)).unbind(-2)
        memories = AgaliteState(state["tilde_k"], state["tilde_v"], state["s"])
        y, memories, tick = agalite_scan(
            AgaliteInputs(*heads, *gates), memories, state["tick"], resets=mask, eps=self.cfg.eps
        )
        y = self.dropout(self.out_proj(y.flatten(-2)))
        after = TensorDict(memories._asdict() | {"tick": tick}, batch_size=[x.shape[0]], device=x.device)
        return y[:, 0] if is_step else y, after.detach() if self.cfg.detach_memory else after


__all__ = ["AGaLiTeCell"]
