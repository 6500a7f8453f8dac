"""A decoder layer of a Hugging Face Llama model as a cell, with its keys and values as state.

The layer, weights and all, is that of the model; the cell computes positions, the mask and the cache:

    position of token t = tokens of its episode before it (an episode begins at a reset), also across calls
    key s is visible to token t if s <= t and no reset lies in (s, t]

State, ``[B]`` int64 each: ``pos`` and ``seg_pos``, the position of the next token (equal; the interface has both), and
``kv_len = min(pos, mem_len)``. With ``mem_len`` > 0 also ``k``, ``v`` ``[B, G, mem_len, D]``: the last entries of the
episode, the oldest first, beginning with slot 0; slots behind ``kv_len`` are zero. Every row has its own length.

A call attends to all that is kept and to itself, and keeps the last ``mem_len`` of that; so cutting a sequence changes
nothing as long as it fits. With ``mem_len=0`` a call sees itself only, at continued positions.

The cache is written anew in each call; ``inplace_cache`` writes into the buffers of the given state instead, whose
addresses then stay the same. ``detach_memory`` cuts the gradient between calls. Flash attention takes no mask: resets,
and rows of different length, are errors there.

Letters: B batch, T time, H hidden, G key/value heads, D head width.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import HFLlamaLayerConfig
from cognexis.cortex_layers.state import as_sequence, has_keys
from cognexis.cortex_layers.types import MaybeState, ResetMask
from cognexis.errors import BackendError

_COUNTS = ("pos", "seg_pos", "kv_len")


class LayerwiseCache:
    """What a layer of transformers takes for a cache: puts past keys and values in front of the new ones.

    Args:
        keys, values: ``[B, G, L, D]``, or None for an empty past.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys = keys
        self.values = values

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, which are kept."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys.to(key_states.dtype), key_states], 2)
            self.values = torch.cat([self.values.to(value_states.dtype), value_states], 2)
        return self.keys, self.values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many entries are kept."""
        return 0 if self.keys is None else self.keys.shape[2]


class HFLlamaLayerCell(MemoryCell):
    """A Llama decoder layer as a cell.

    Args:
        cfg: with ``hf_layer`` (a LlamaDecoderLayer), ``hf_submodel`` (has its ``rotary_emb``) and ``hf_config``.

    Raises:
        ValueError: one of these is missing, or the settings contradict.
    """

    def __init__(self, cfg: HFLlamaLayerConfig) -> None:
        super().__init__(cfg.hidden_size)  # type: ignore[arg-type]
        for name in ("hf_layer", "hf_submodel", "hf_config"):
            if getattr(cfg, name) is None:
                raise ValueError(
                    f"HFLlamaLayerCell: {name} is missing; it is an object that no dump of a configuration holds, so "
                    "build the configuration with build_llama_stack_config_from_model"
                )
        if cfg.inplace_cache and not cfg.detach_memory:
            raise ValueError("HFLlamaLayerCell: inplace_cache=True needs detach_memory=True: it overwrites the past")
        if cfg.hf_config.hidden_size != self.hidden_size:
            raise ValueError(
                f"HFLlamaLayerCell: hidden_size={self.hidden_size}, but the layer has {cfg.hf_config.hidden_size}"
            )
        self.cfg = cfg.model_copy(update={"hf_layer": None, "hf_submodel": None, "hf_config": None})
        self.hf_config = cfg.hf_config
        self.layer: nn.Module = cfg.hf_layer
        self.rotary_emb: nn.Module = cfg.hf_submodel.rotary_emb
        self.mem_len = cfg.mem_len
        attention: Any = self.layer.self_attn
        self.head_dim: int = attention.head_dim
        self.num_key_value_heads: int = attention.k_proj.out_features // self.head_dim

    def init_state(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> TensorDict:
        state = {name: torch.zeros(batch, device=device, dtype=torch.long) for name in _COUNTS}
        if self.mem_len:
            shape = (batch, self.num_key_value_heads, self.mem_len, self.head_dim)
            state |= {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")}
        return TensorDict(state, batch_size=[batch], device=device)

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        x, mask, is_step = as_sequence(x, state, resets, self.hidden_size, "HFLlamaLayerCell")
        if state is None or not has_keys(state, *_COUNTS, *(("k", "v") if self.mem_len else ())):
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if x.shape[1] == 0:
            return x, state
        T = x.shape[1]
        at = torch.arange(T, device=x.device)
        began = at.new_full((x.shape[0], T), -1)  # where the episode of a token began; -1: before the call
        if mask is not None:
            began = torch.where(mask, at, -1).cummax(1).values
        positions = torch.where(began < 0, state["pos"].unsqueeze(1) + at, at - began)
        past = (state["k"], state["v"]) if self.mem_len else (None, None)
        if self._attention_takes_a_mask():
            visible = self._mask(began, state["kv_len"], x)
        else:
            visible = None
            past = self._equal_past(past, state["kv_len"], mask)
        cache = LayerwiseCache(*past)
        y = self.layer(
            x,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary_emb(x, position_ids=positions),
        )
        y = y[0] if isinstance(y, tuple) else y
        position = positions[:, -1] + 1
        after = {"pos": position, "seg_pos": position.clone(), "kv_len": position.clamp(max=self.mem_len)}
        if self.mem_len:
            after |= self._kept(cache, began[:, -1], state, T)
        if self.cfg.inplace_cache:
            after |= {name: state[name].copy_(after[name]) for name in ("k", "v") if self.mem_len}
        return y[:, 0] if is_step else y, TensorDict(after, batch_size=[x.shape[0]], device=x.device)

    def _attention_takes_a_mask(self) -> bool:
        kind = str(getattr(self.hf_config, "_attn_implementation", None) or "eager")
        if "flex" in kind:
            raise BackendError(
                f"HFLlamaLayerCell: attn_implementation={kind!r}: must be eager, sdpa or flash attention"
            )
        return "flash" not in kind

    def _mask(self, began: Tensor, kv_len: Tensor, x: Tensor) -> Tensor:
        """Additive mask ``[B, 1, T, mem_len + T]``."""
        at = torch.arange(x.shape[1], device=x.device)
        slots = torch.arange(self.mem_len, device=x.device)
        is_kept = (slots < kv_len.unsqueeze(1)).unsqueeze(1) & (began < 0).unsqueeze(2)  # [B, T, mem_len]
        is_new = (at <= at.unsqueeze(1)) & (at >= began.unsqueeze(2))  # [B, T, T]
        visible = torch.cat([is_kept, is_new], 2).unsqueeze(1)
        return torch.zeros((), device=x.device, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)

    @staticmethod
    def _equal_past(past: Any, kv_len: Tensor, mask: Tensor | None) -> Any:
        """The used part of the cache, for attention that takes no mask."""
        if mask is not None and bool(mask.any()):
            raise BackendError("HFLlamaLayerCell: flash attention cannot respect resets; use eager or sdpa attention")
        if past[0] is None or not kv_len.numel():
            return past
        length = int(kv_len.max())
        if int(kv_len.min()) != length:
            raise BackendError(
                "HFLlamaLayerCell: flash attention cannot respect rows of different length; use eager or "
                "sdpa attention"
            )
        return tuple(value[:, :, :length] for value in past)

    def _kept(self, cache: LayerwiseCache, began: Tensor, state: TensorDict, T: int) -> dict[str, Tensor]:
        """The last ``mem_len`` entries of every row's episode, moved to the front."""
        assert cache.keys is not None and cache.values is not None
        past = cache.keys.shape[2] - T
        length = torch.where(began < 0, state["kv_len"], 0)
        first = began.clamp(min=0)
        total = length + T - first
        slots = torch.arange(self.mem_len, device=began.device)
        entry = slots + (total - self.mem_len).clamp(min=0).unsqueeze(1)  # the how-manieth entry goes to a slot
        source = torch.where(entry < length.unsqueeze(1), entry, past + (first - length).unsqueeze(1) + entry)
        is_used = (slots < total.unsqueeze(1))[:, None, :, None]
        index = source.clamp(max=past + T - 1)[:, None, :, None]
        kept = {}
        for name, value in (("k", cache.keys), ("v", cache.values)):
            chosen = value.gather(2, index.expand(-1, value.shape[1], -1, value.shape[3]))
            chosen = torch.where(is_used, chosen, 0).to(state[name].dtype)
            kept[name] = chosen.detach() if self.cfg.detach_memory else chosen
        return kept


__all__ = ["HFLlamaLayerCell", "HFLlamaLayerConfig", "LayerwiseCache"]
