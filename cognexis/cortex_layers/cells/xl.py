"""Attention over a rolling memory of past inputs, with relative positions.

    keys and values = projections of [mem, x];   code(d) = [sin(d w), cos(d w)],   w_j = 10000^(-2j/H)
    score(t, j) = ((q_t + u) k_j + (q_t + v) r_proj(code(t - j))) / sqrt(D)
    y_t = o_proj(heads of sum_j softmax_j(score(t, j)) v_j)

A token sees itself and at most ``mem_len`` tokens before it that belong to its segment; a reset begins a new segment.
Because of this band steps, sequences and any cut give the same numbers. ``mem_len=0``: causal attention inside the
call, without a memory and without a band.

State: ``mem`` ``[B, M, H]``, the last M inputs with the newest last, and ``mem_seg`` ``[B, M]``, their segments. A
segment of -1 marks an empty slot, which nobody attends to; slots of before a reset are emptied. With ``use_axon_qkv``
the projections are AxonLayers (group ``xl_qkv``), whose keys and values depend on the past; they are kept in ``mem_k``
and ``mem_v`` ``[B, M, P]`` and never computed again. ``detach_memory`` cuts the gradient between calls.

Letters: B batch, T time, H hidden, N heads, D head width, P = N D, M memory slots. Source: Dai et al. 2019,
Transformer-XL; segments and the band are added.
"""

import math
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer, update_parent_state
from cognexis.cortex_layers.config import XLCellConfig
from cognexis.cortex_layers.state import as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.kernels.relative_attention import attend_relative

_EMPTY = -1


class XLCell(MemoryCell):
    """Transformer-XL attention as a cell.

    Args:
        cfg: see ``XLCellConfig``; without ``head_dim``, ``n_heads`` must divide ``hidden_size``.
    """

    def __init__(self, cfg: XLCellConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        H = self.hidden_size
        if cfg.head_dim is None and H % cfg.n_heads:
            raise ValueError(f"XLCell: n_heads={cfg.n_heads}: must divide hidden_size={H}, or give head_dim")
        self.cfg = cfg
        self.n_heads = cfg.n_heads
        self.head_dim = cfg.head_dim or H // cfg.n_heads
        self.width = self.n_heads * self.head_dim
        names = ("q", "k", "v")
        if cfg.use_axon_qkv:
            layers: list[AxonLayer | nn.Linear] = [
                AxonLayer(H, self.width, cfg.axon_qkv_config, name=name, group="xl_qkv") for name in names
            ]
        else:
            layers = [nn.Linear(H, self.width, bias=cfg.use_bias) for _ in names]
        self.q_proj, self.k_proj, self.v_proj = layers
        self.r_proj = nn.Linear(H, self.width, bias=False)
        self.o_proj = nn.Linear(self.width, H, bias=cfg.use_bias)
        self.u = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.v = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.out_dropout = nn.Dropout(cfg.out_dropout)
        plain = [layer.linear if isinstance(layer, AxonLayer) else layer for layer in layers]
        for linear in (*plain, self.r_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        """A fresh state; ``traces`` concerns the AxonLayers."""
        M = self.cfg.mem_len
        kept: dict[str, Any] = {"device": device, "dtype": dtype}
        state = TensorDict(
            {
                "mem": torch.zeros(batch, M, self.hidden_size, **kept),
                "mem_seg": torch.full((batch, M), _EMPTY, device=device, dtype=torch.long),
            },
            batch_size=[batch],
            device=device,
        )
        if self.cfg.use_axon_qkv:
            for key in ("mem_k", "mem_v"):
                state[key] = torch.zeros(batch, M, self.width, **kept)
            for layer in (self.q_proj, self.k_proj, self.v_proj):
                layer.init_into(state, batch, device, dtype, traces)  # type: ignore[operator]
        return state

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "XLCell")
        keys = ("mem", "mem_seg", "mem_k", "mem_v") if self.cfg.use_axon_qkv else ("mem", "mem_seg")
        if state is None or not has_keys(state, *keys) or state["mem"].shape[0] != x.shape[0]:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if x.shape[1] == 0:
            return x, state
        M = min(self.cfg.mem_len, state["mem"].shape[1])
        old = {key: state[key][:, state[key].shape[1] - M :] for key in keys}
        segments = self._segments(old["mem_seg"], x, mask)
        source = torch.cat([old["mem"].to(x.dtype), x], 1)
        parent = state.copy()
        kept = {"mem": source, "mem_seg": torch.cat([old["mem_seg"], segments], 1)}
        if self.cfg.use_axon_qkv:
            q, k, v = (layer(x, parent, resets=mask) for layer in (self.q_proj, self.k_proj, self.v_proj))
            k, v = torch.cat([old["mem_k"].to(k.dtype), k], 1), torch.cat([old["mem_v"].to(v.dtype), v], 1)
            kept |= {"mem_k": k, "mem_v": v}
        else:
            q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        y = self._attend(q, k, v, kept["mem_seg"], M, x)
        if mask is not None:
            kept = self._forget(kept)
        slots = {key: self._newest(value, state[key].dtype, key) for key, value in kept.items()}
        after = update_parent_state(TensorDict(slots, batch_size=[x.shape[0]], device=x.device), parent)
        return y[:, 0] if is_step else y, after

    def _segments(self, old: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """Segment of every token ``[B, T]``: that of the newest slot, 0 if it is empty, plus the resets so far."""
        last = old[:, -1:].clamp(min=0) if old.shape[1] else old.new_zeros(old.shape[0], 1)
        if mask is None:
            return last.expand(-1, x.shape[1])
        return last + mask.long().cumsum(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, M: int, x: Tensor) -> Tensor:
        B, T = q.shape[:2]
        heads = (self.n_heads, self.head_dim)
        q, k, v = (value.unflatten(-1, heads).transpose(1, 2) for value in (q, k, v))
        # The codes live in the weight's dtype: the weight, not the input, decides whether they can be precise.
        r = self.r_proj(self._codes(M + T, x.device).to(self.r_proj.weight.dtype)).unflatten(-1, heads).transpose(0, 1)
        y = attend_relative(
            *(q, k, v, r, segments, self.u, self.v, M, 1 / math.sqrt(self.head_dim)),
            window=self.cfg.mem_len or None,
            dropout=self.cfg.attn_dropout if self.training else 0.0,
        )
        return self.out_dropout(self.o_proj(y.transpose(1, 2).reshape(B, T, self.width)))

    def _codes(self, length: int, device: torch.device) -> Tensor:
        """Codes of the distances length - 1 down to 0, ``[length, H]``."""
        H = self.hidden_size
        rates = 10000.0 ** (-2 * torch.arange((H + 1) // 2, device=device, dtype=torch.float64) / H)
        angles = torch.arange(length - 1, -1, -1, device=device, dtype=torch.float64).unsqueeze(1) * rates
        return torch.cat([angles.sin(), angles.cos()], -1)[:, :H]

    @staticmethod
    def _forget(kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Empty the slots of earlier segments, and call the present one 0, as after a fresh start."""
        segments = kept["mem_seg"]
        is_past = segments != segments[:, -1:]
        empty = {key: value.masked_fill(is_past.unsqueeze(-1), 0) for key, value in kept.items() if key != "mem_seg"}
        return empty | {"mem_seg": torch.where(is_past, _EMPTY, 0)}

    def _newest(self, value: Tensor, dtype: torch.dtype, key: str) -> Tensor:
        """The last M slots in the state's dtype, filled up in front with empty ones."""
        M = self.cfg.mem_len
        missing = M - value.shape[1]
        value = value[:, value.shape[1] - M :] if missing <= 0 else value
        if missing > 0:
            filler = value.new_full((value.shape[0], missing, *value.shape[2:]), _EMPTY if key == "mem_seg" else 0)
            value = torch.cat([filler, value], 1)
        value = value.to(dtype)
        return value.detach() if self.cfg.detach_memory else value


__all__ = ["XLCell"]
