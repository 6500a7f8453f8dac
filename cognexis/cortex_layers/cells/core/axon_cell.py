"""Axon: a complex recurrence per channel with a mixer in front and a linear map behind.

    z_t = mixer(x_t)                                  (a matrix, a Hadamard transform, or x itself)
    c_t = r e^{i th} c_{t-1} + gam (w1 * z_t + i w2 * z_t)
    y_t = W_out [act(Re c_t), act(Im c_t)]            (2H to H; a second map H to out_dim where they differ)

In the full-rank form w1 and w2 are matrices ``[D, H]`` and there is no mixer. State: ``hc1``, ``hc2`` ``[B, H]`` (Re c
and Im c) and, unless the state was made with ``traces=False``, eight traces ``E_*``, the sensitivities of c to the
parameters of the recurrence. At the cut of a detached state they stand in for the steps before it: the gradients of
nu_log, theta_log, w1, w2 (Wc1, Wc2) and out_proj are then those of the whole sequence. This does not hold for
input_proj nor for anything below the cell, and only if no module above it has a state. An attached state passes
gradients as usual.

A reset makes c and the traces of the row 0 before the step. States and traces are float32 for 16-bit inputs.
Letters: B batch, T time, H hidden. Source: Elelimy et al. 2024, Real-Time Recurrent Learning using Trace Units.
"""

import math
import warnings
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import AxonConfig
from cognexis.cortex_layers.state import accumulator_dtype, as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.hadamard import srht_pytorch
from cognexis.kernels.rtu import TRACE_NAMES, rtu_stream

_TINY = 1e-12
_SRHT_SEED = 0


class AxonCell(MemoryCell):
    """The recurrence as a memory cell.

    Args:
        cfg: ``use_fullrank_rtu`` wins over the mixers ``use_untraced_linear`` and ``use_srht``.
        enforce_out_dim_eq_hidden: whether ``forward`` refuses an output of another width than H, which no block can
            take.
    """

    srht_signs: Tensor
    srht_perm: Tensor

    def __init__(self, cfg: AxonConfig, enforce_out_dim_eq_hidden: bool = True) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        H = self.hidden_size
        default = AxonConfig.model_fields["cuda_seq_threshold"].default
        if cfg.cuda_seq_threshold != default:
            _warn_once_about_threshold()
        self.cfg = cfg
        self.out_dim = H if cfg.out_dim is None else cfg.out_dim
        self.enforce_out_dim_eq_hidden = enforce_out_dim_eq_hidden
        inner, outer = cfg.r_min**2, cfg.r_max**2
        radius = torch.rand(H) * (outer - inner) + inner
        self.nu_log = nn.Parameter(torch.log(torch.clamp(-0.5 * torch.log(radius.clamp(min=_TINY)), min=_TINY)))
        self.theta_log = nn.Parameter(torch.log(torch.clamp(cfg.max_phase * torch.rand(H), min=_TINY)))
        bound = 1 / math.sqrt(H)
        shape = (H, H) if cfg.use_fullrank_rtu else (H,)
        first, second = (nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for _ in range(2))
        self.input_proj: nn.Linear | None = None
        if cfg.use_fullrank_rtu:
            self.Wc1, self.Wc2 = first, second
        else:
            self.w1, self.w2 = first, second
            if cfg.use_untraced_linear:
                self.input_proj = nn.Linear(H, H, bias=False)
                nn.init.orthogonal_(self.input_proj.weight)
        self.uses_srht = cfg.use_srht and not cfg.use_fullrank_rtu and self.input_proj is None
        size = H if self.uses_srht else 0
        generator = torch.Generator(device="cpu").manual_seed(_SRHT_SEED)
        signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2.0 - 1.0
        order = torch.randperm(size, generator=generator, device="cpu") if cfg.srht_permute else torch.arange(size)
        self.register_buffer("srht_signs", signs)
        self.register_buffer("srht_perm", order)
        self.out_proj = nn.Linear(2 * H, H)
        self.dim_proj = nn.Identity() if self.out_dim == H else nn.Linear(H, self.out_dim)

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        """A fresh state; without ``traces`` it stays so, which is what generation wants."""
        kept: dict[str, Any] = {"device": device, "dtype": accumulator_dtype(dtype)}
        H = self.hidden_size
        state = {name: torch.zeros(batch, H, **kept) for name in ("hc1", "hc2")}
        if traces:
            wide = (batch, H, H) if self.cfg.use_fullrank_rtu else (batch, H)
            for name in TRACE_NAMES:
                state[name] = torch.zeros(wide if "_w" in name else (batch, H), **kept)
        return TensorDict(state, batch_size=[batch], device=device)

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        if self.enforce_out_dim_eq_hidden and self.out_dim != self.hidden_size:
            raise ValueError(
                f"AxonCell: out_dim={self.out_dim} differs from hidden_size={self.hidden_size}; a cell in a block "
                "must keep the width (enforce_out_dim_eq_hidden=False allows it outside of blocks)"
            )
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "AxonCell")
        if state is None or not has_keys(state, "hc1", "hc2"):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, self.out_dim), state
        traces = tuple(state[name] for name in TRACE_NAMES) if has_keys(state, *TRACE_NAMES) else None
        w1, w2 = (self.Wc1, self.Wc2) if self.cfg.use_fullrank_rtu else (self.w1, self.w2)
        c, (hc1, hc2), traces = rtu_stream(
            *(self._mix(x), self.nu_log, self.theta_log, w1, w2),
            state=(state["hc1"], state["hc2"]),
            traces=traces,
            resets=mask,
            activation=self.cfg.activation,
        )
        y = self.dim_proj(self.out_proj(c))
        parts = {"hc1": hc1, "hc2": hc2, **dict(zip(TRACE_NAMES, traces or (), strict=False))}
        return y[:, 0] if is_step else y, TensorDict(parts, batch_size=[x.shape[0]], device=x.device)

    def _mix(self, x: Tensor) -> Tensor:
        if self.input_proj is not None:
            return self.input_proj(x)
        if self.uses_srht:
            return srht_pytorch(x, self.srht_signs, self.srht_perm if self.cfg.srht_permute else None)
        return x


_warned: set[str] = set()


def _warn_once_about_threshold() -> None:
    if "cuda_seq_threshold" not in _warned:
        _warned.add("cuda_seq_threshold")
        warnings.warn("AxonConfig.cuda_seq_threshold has no effect any more", DeprecationWarning, stacklevel=3)


__all__ = ["AxonCell"]
