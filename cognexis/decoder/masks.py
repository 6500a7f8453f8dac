"""Which keys a query may see: causality, padding, the sliding window and document boundaries combined.

Packed documents arrive as ``document_ids`` (-1 for padding), ``seq_idx``, ``cu_seq_lens_q`` or positions that restart;
the first of these that is given decides. A document is one run of equal ids, positions restart with it, and attention
never crosses into another one. Global tokens are the first positions of a sequence, visible to every later query of
a sliding layer.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from cognexis.configuration_rules import STAGES, mask_kind
from cognexis.errors import InvalidConfigError, ShapeMismatchError


def find_documents(
    batch_size: int,
    length: int,
    *,
    document_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | None:
    """Document number ``[B, T]`` of each token, rising from 0 and -1 for padding; None when nothing is packed.

    Args:
        batch_size: B; ``length`` is T.
        document_ids: ``[B, T]``, any integers, equal within a document; -1 marks padding.
        seq_idx: ``[B, T]``, as data collators for packed batches emit it.
        cu_seq_lens: ``[documents + 1]``, cumulative lengths of a single flattened row.
        position_ids: ``[B or 1, T]``; a step other than +1 starts a document.
        attention_mask: ``[B, T]``; zeros mark padding.

    Raises:
        ShapeMismatchError: a tensor does not cover ``[B, T]``.
    """
    if cu_seq_lens is not None and document_ids is None and seq_idx is None:
        readable = cu_seq_lens.device.type == "cpu" and not torch.compiler.is_compiling()
        fits = batch_size == 1 and cu_seq_lens.ndim == 1 and cu_seq_lens.numel() > 1
        if fits and readable:
            ends = (int(cu_seq_lens[0]), int(cu_seq_lens[-1])) == (0, length)
            fits = ends and bool((cu_seq_lens[1:] >= cu_seq_lens[:-1]).all())
        if not fits:
            raise ShapeMismatchError(
                f"cu_seq_lens must have one axis, rise from 0 to {length} and describe a single row; got shape "
                f"{tuple(cu_seq_lens.shape)} for a batch of {batch_size} rows",
                expected=(0, length),
                actual=tuple(cu_seq_lens.shape),
            )
        tokens = torch.arange(length, device=cu_seq_lens.device)
        document_ids = torch.searchsorted(cu_seq_lens[1:].contiguous(), tokens, right=True)[None]
    source = document_ids if document_ids is not None else seq_idx
    if source is not None:
        if tuple(source.shape) != (batch_size, length):
            name = "document_ids" if document_ids is not None else "seq_idx"
            raise ShapeMismatchError(
                f"{name} must have shape {(batch_size, length)}, got {tuple(source.shape)}",
                expected=(batch_size, length),
                actual=tuple(source.shape),
            )
        starts = source[:, 1:] != source[:, :-1]
    elif position_ids is not None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if not bool(starts.any()):
            return None
    else:
        return None
    numbers = torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0)).expand(batch_size, -1)
    if source is not None:
        numbers = numbers.masked_fill(source < 0, -1)
    if attention_mask is not None and attention_mask.ndim == 2:
        numbers = numbers.masked_fill(attention_mask == 0, -1)
    return numbers


def document_positions(documents: Tensor) -> Tensor:
    """Position ``[B, T]`` of each token within its document, from 0; ``documents`` as :func:`find_documents`."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=-1).values


def build_masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: Tensor | None = None,
    documents: Tensor | None = None,
    materialise: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """Attention masks by layer type, in the form that the chosen attention implementation wants.

    Layers with memory over time want the mask ``[B, S]`` itself, under "linear_attention".

    Args:
        config: the model's configuration.
        inputs_embeds: ``[B, T, H]``; only shape, dtype and device are read.
        attention_mask: ``[B, S]`` with zeros at padding, a finished 4-D mask, a finished dictionary, or None.
        past_key_values: the cache, or None.
        position_ids: ``[B or 1, T]``, for global tokens.
        documents: see :func:`find_documents`; None when nothing is packed or boundaries are open.
        materialise: make tensors even where a backend could do without, so that rows of a mask can be picked.
    """
    if isinstance(attention_mask, dict):
        return attention_mask
    two_axes = attention_mask
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and attention_mask.dtype.is_floating_point:
        # A row that sees nothing gives zeros in every implementation only if hidden means minus infinity.
        is_hidden = attention_mask <= torch.finfo(attention_mask.dtype).min / 2
        attention_mask = attention_mask.masked_fill(is_hidden, float("-inf"))
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
    }
    kinds = {mask_kind(layer_type) for stage in STAGES for layer_type in config.stage_layer_types(stage)}
    has_memory = config.input_injection == "attention_memory"
    if has_memory:
        kinds.add("full_attention")
    if has_memory or materialise:
        arguments["and_mask_function"] = _everything  # a mask that exists: columns or rows are to be taken
    if documents is not None:  # padding is a document of its own, so the padding mask is already in there
        position_ids = document_positions(documents)
        arguments["attention_mask"] = None
        if has_memory or config.global_tokens:
            arguments["and_mask_function"] = _same_document(documents)
        else:
            arguments["position_ids"] = position_ids
    masks: dict[str, Any] = {}
    if "linear_attention" in kinds and isinstance(two_axes, Tensor) and two_axes.ndim == 2:
        masks["linear_attention"] = two_axes
    if "full_attention" in kinds:
        is_plain = attention_mask is None and documents is None and past_key_values is None
        if is_plain and "and_mask_function" not in arguments and config._attn_implementation == "sdpa":
            # Its own causal kernels skip what is hidden. While compiling, transformers would make the whole mask.
            masks["full_attention"] = None
        else:
            masks["full_attention"] = create_causal_mask(**arguments)
    if "sliding_attention" in kinds:
        if config.global_tokens:
            arguments["or_mask_function"] = _global_tokens(
                config, arguments, None if documents is None else position_ids
            )
        masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
    return masks


def with_memory(masks: dict[str, Any], config: Any) -> dict[str, Any]:
    """Masks of the core under attention memory: every key is followed by the memory of the same position."""
    if config.input_injection != "attention_memory":
        return masks
    memory = masks["full_attention"]
    return {kind: torch.cat((mask, memory), dim=-1) for kind, mask in masks.items()}


def _everything(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query.new_ones((), dtype=torch.bool)


def _same_document(documents: Tensor) -> Any:
    def is_same(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return documents[batch, query] == documents[batch, key]

    return is_same


def _global_tokens(config: Any, arguments: dict[str, Any], packed_positions: Tensor | None) -> Any:
    """Mask function: keys among the first ``global_tokens`` real tokens of their sequence or document."""
    attention_mask = arguments["attention_mask"]
    key_positions = packed_positions
    if packed_positions is None and attention_mask is not None and attention_mask.ndim == 2:
        key_positions = (attention_mask != 0).long().cumsum(-1) - 1
        if (cache := arguments["past_key_values"]) is not None:  # a static cache has keys that are not written yet
            keys = cache.get_mask_sizes(arguments["inputs_embeds"].shape[1], 0)[0]
            key_positions = torch.nn.functional.pad(key_positions, (0, keys - key_positions.shape[1]))

    def is_global(batch: Any, head: Any, query: Any, key: Any) -> Any:
        position = key if key_positions is None else key_positions[batch, key]
        return (position < config.global_tokens) & (key <= query)

    return is_global


def require_maskable_attention(config: Any) -> None:
    """Refuse attention implementations that do not take the masks of attention memory and global tokens.

    Raises:
        InvalidConfigError: names the implementation.
    """
    implementation = config._attn_implementation or ""
    has_memory = config.input_injection == "attention_memory"
    takes_masks = implementation in ("", "eager", "sdpa") or (implementation == "flex_attention" and not has_memory)
    if (has_memory or config.global_tokens > 0) and not takes_masks:
        raise InvalidConfigError(
            f"attn_implementation={implementation!r}: attention memory and global tokens need masks that it does "
            "not take; use sdpa or eager",
            path="attn_implementation",
            value=implementation,
        )
