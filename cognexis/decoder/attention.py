"""Causal self-attention as shared projections plus one parameter-free site per (block, loop).

    scores = Q K^T / sqrt(D) + mask,   weights = softmax(scores),   context = weights V W_o

A query head n reads key/value head n // (N / G) (grouped-query attention; G = N is multi-head, G = 1 multi-query).
A row without a visible key returns zeros. In the looped core the projections are shared by all loops, but each loop
needs keys and values of its own; the identity of such a key/value slot sits in an :class:`AttentionSite`, because
continuous batching and serving engines read ``module.layer_idx`` of the module that calls the attention interface.
Sites hold no parameters, so checkpoints name each physical projection once.
Letters: B batch, T queries, S keys, N heads, G key/value heads, D head width, H hidden width.
Reference: Vaswani et al. 2017, "Attention Is All You Need", equation 1; Ainslie et al. 2023, "GQA".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cognexis.configuration_cognexis import BlockSpec
from cognexis.decoder.norm import compute_dtype
from cognexis.decoder.rope import rotate


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, the reference of every fast backend.

    Args:
        module: carries ``num_key_value_groups`` (N / G) and ``training``.
        query: ``[B, N, T, D]``.
        key: ``[B, G, S, D]``; ``value`` likewise.
        attention_mask: ``[B, 1, T, S]``, additive (the smallest finite value hides a key) or boolean (False hides
            it); None shows every key.
        scaling: factor on the scores.
        dropout: probability of dropping a weight, in training only.

    Returns:
        The context ``[B, T, N, D]`` and the weights ``[B, N, T, S]``.
    """
    groups = module.num_key_value_groups
    key = key.repeat_interleave(groups, dim=1) if groups > 1 else key
    value = value.repeat_interleave(groups, dim=1) if groups > 1 else value
    scores = (query @ key.transpose(2, 3)).to(compute_dtype(query.dtype)) * scaling
    if attention_mask is not None:
        is_bool = attention_mask.dtype == torch.bool
        hidden = ~attention_mask if is_bool else attention_mask <= torch.finfo(attention_mask.dtype).min / 2
        bias = 0.0 if is_bool else attention_mask
        scores = (scores + bias).masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if attention_mask is not None:
        weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AttentionSite(nn.Module):
    """The one place where (block, loop) reads and writes its keys and values; no parameters.

    Attributes:
        layer_idx: index of the key/value slot, unique in the model.
    """

    def __init__(self, config: Any, spec: BlockSpec, layer_idx: int, sliding_window: int | None) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = spec.head_dim
        self.num_key_value_groups = spec.num_attention_heads // spec.num_key_value_heads
        self.scaling = spec.head_dim**-0.5
        self.attention_dropout = float(spec.attention_dropout)
        self.sliding_window = sliding_window
        self.is_causal = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        memory: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` ``[B, N, T, D]`` to cached and new keys; ``memory`` holds further keys and values."""
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if memory is not None:
            key, value = torch.cat((key, memory[0]), dim=2), torch.cat((value, memory[1]), dim=2)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )


class MemorySlot(nn.Module):
    """Keys and values made from the prelude output, kept in a slot of their own; no parameters."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.slot = layer_idx

    def forward(self, key: Tensor, value: Tensor, past_key_values: Any) -> tuple[Tensor, Tensor]:
        return (key, value) if past_key_values is None else past_key_values.update(key, value, self.slot)


class CognexisAttention(nn.Module):
    """The projections of one block with its sites, one per loop (a single one outside the core).

    Args:
        config: the model's configuration; the sites read ``_attn_implementation`` at every call.
        spec: sizes of this block.
        slots: key/value slot of each site, in the order of the loops.
        sliding_window: keys a query may look back to, itself included; None for all.
        memory_slot: slot for the attention memory, None without one.
    """

    def __init__(
        self,
        config: Any,
        spec: BlockSpec,
        slots: Sequence[int],
        sliding_window: int | None = None,
        memory_slot: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.sliding_window = sliding_window
        width, kv_width = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, width, bias=spec.attention_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.attention_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.attention_bias)
        self.o_proj = nn.Linear(width, spec.hidden_size, bias=spec.attention_bias)
        self.sites = nn.ModuleList(AttentionSite(config, spec, slot, sliding_window) for slot in slots)
        if memory_slot is not None:
            self.memory_k_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.attention_bias)
            self.memory_v_proj = nn.Linear(spec.hidden_size, kv_width, bias=spec.attention_bias)
            self.memory_slot = MemorySlot(memory_slot)

    def add_site(self, config: Any, spec: BlockSpec, layer_idx: int) -> None:
        """Append a site for one more loop; used when a request may go beyond the configured slots."""
        site = AttentionSite(config, spec, layer_idx, self.sliding_window)
        self.sites.append(site.train(self.training))

    def project_memory(
        self, memory: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, S, D]`` of the normalised prelude output ``memory`` ``[B, T, H]``."""
        shape = (*memory.shape[:-1], -1, self.head_dim)
        key = rotate(self.memory_k_proj(memory).view(shape).transpose(1, 2), *position_embeddings)
        value = self.memory_v_proj(memory).view(shape).transpose(1, 2)
        return self.memory_slot(key, value, past_key_values)

    def project_keys(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, T, D]`` of ``hidden_states`` ``[B, T, H]``, normalised by the block."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        return rotate(key, *position_embeddings), value

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        loop_index: int = 0,
        memory: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``[B, T, H]`` to ``[B, T, H]``, using the site of ``loop_index`` (from 0)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # The three projections stand together because serving engines fuse what they find here.
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # [B, N, T, D]
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)  # [B, G, T, D]
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        # Sites differ in their slot of a cache only. Naming one would compile the block anew for every loop.
        is_same = past_key_values is None and self.training and torch.compiler.is_compiling()
        context, _ = self.sites[0 if is_same else loop_index](
            query, key, value, attention_mask, past_key_values=past_key_values, memory=memory, **kwargs
        )
        return self.o_proj(context.reshape(*shape[:-2], -1))
