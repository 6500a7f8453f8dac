"""Checks of what a caller hands to the model, before any computation, and what follows from it.

Shapes and dtypes are checked always; values (ids, positions) only for tensors in host memory and never while a graph
is being compiled, because reading them elsewhere would wait for the device.
"""

from typing import Any

import torch
from torch import Tensor

from cognexis.decoder.masks import document_positions, find_documents
from cognexis.errors import InvalidConfigError, InvalidTokenIdError, ShapeMismatchError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def _is_readable(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_token_ids(input_ids: Tensor, vocab_size: int, *, any_device: bool = False) -> None:
    """Require integer ids ``[B, T]`` with B and T of at least 1, all in [0, ``vocab_size``).

    Args:
        input_ids: the ids.
        vocab_size: size of the vocabulary.
        any_device: also read the values of tensors outside host memory (waits for the device).

    Raises:
        ShapeMismatchError: not two axes, or an empty one.
        InvalidTokenIdError: not integers, or an id outside the vocabulary.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in _INTEGERS:
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidTokenIdError(f"input_ids: must be a tensor of integer token ids, got {got}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ShapeMismatchError(
            f"input_ids must have shape [batch, tokens] with at least one of each, got {tuple(input_ids.shape)}",
            expected="[batch, tokens]",
            actual=tuple(input_ids.shape),
        )
    if not (_is_readable(input_ids) or (any_device and not torch.compiler.is_compiling() and not input_ids.is_meta)):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidTokenIdError(
            f"input_ids: id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}", token_id=wrong
        )


def check_inputs_embeds(inputs_embeds: Tensor, hidden_size: int) -> None:
    """Require floating-point embeddings ``[B, T, H]``.

    Raises:
        ShapeMismatchError: another shape or dtype.
    """
    wrong_shape = inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != hidden_size or 0 in inputs_embeds.shape
    if wrong_shape or not inputs_embeds.dtype.is_floating_point:
        raise ShapeMismatchError(
            f"inputs_embeds must be floating point of shape [batch, tokens, {hidden_size}], got {inputs_embeds.dtype} "
            f"{tuple(inputs_embeds.shape)}",
            expected=("batch", "tokens", hidden_size),
            actual=tuple(inputs_embeds.shape),
        )


def check_mask_type(attention_mask: Any) -> None:
    """Require a tensor, a block mask, a dictionary of such masks, or None.

    Raises:
        ShapeMismatchError: anything else.
    """
    if attention_mask is not None and not isinstance(attention_mask, dict) and not hasattr(attention_mask, "shape"):
        raise ShapeMismatchError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")


def check_attention_mask(attention_mask: Any, batch_size: int, heads: int, length: int, keys: tuple[int, ...]) -> None:
    """Require a mask ``[B, past + T]``, a finished mask ``[B or 1, N or 1, T, S]``, or a dictionary of such masks.

    Args:
        attention_mask: the mask or None.
        batch_size: B.
        heads: N.
        length: T, the new tokens.
        keys: the numbers of keys that fit: cached and new tokens, and a static cache's capacity; empty when they
            cannot be read without waiting.

    Raises:
        ShapeMismatchError: another shape.
    """
    if not isinstance(attention_mask, Tensor):
        return
    shape = tuple(attention_mask.shape)
    fits = not keys or (len(shape) > 0 and shape[-1] in keys)
    if len(shape) == 4:
        fits = fits and shape[0] in (1, batch_size) and shape[1] in (1, heads) and shape[2] == length
    else:
        fits = fits and len(shape) == 2 and shape[0] == batch_size and (not keys or shape[1] == keys[0])
    if not fits:
        wanted = keys[0] if keys else f"cached tokens + {length}"
        raise ShapeMismatchError(
            f"attention_mask must have shape [{batch_size}, {wanted}] (cached and new tokens), or be a finished mask "
            f"[{batch_size} or 1, {heads} or 1, {length}, keys]; got {shape}",
            expected=(batch_size, wanted),
            actual=shape,
        )


def real_tokens(attention_mask: Any, documents: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Bool ``[B, T]``: which of the new tokens ``[B, T, H]`` are no padding, as far as a mask or documents say.

    Args:
        attention_mask: ``[B, past + T]``, or a finished mask, which says nothing about padding.
        documents: ``[B, T]``, -1 at padding, or None.
        hidden_states: only shape and device are read.
    """
    batch_size, length = hidden_states.shape[:2]
    if documents is not None:
        return documents.to(hidden_states.device) >= 0
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, -length:].to(hidden_states.device) != 0
    return torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)


def time_resets(attention_mask: Any, documents: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Bool ``[B, T]``: new tokens before which states over time begin anew; None where none does.

    A state begins anew at the first real token of a row and at the start of every packed document.

    Args:
        attention_mask: ``[B, past + T]``, masks by layer type with that one under "linear_attention", or None.
        documents: ``[B, T]`` document numbers, -1 at padding; None where documents are open to each other.
        hidden_states: ``[B, T, H]``; only shape and device are read.

    Raises:
        InvalidConfigError: a finished mask, which does not say what is padding, or padding between real tokens.
    """
    length, device = hidden_states.shape[1], hidden_states.device
    if documents is not None:
        starts = torch.zeros_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        return starts.to(device)
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("linear_attention")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise InvalidConfigError(
            "attention_mask: layers with memory over time need to know which tokens are padding; pass a mask of two "
            "axes [B, tokens], or document_ids",
            path="attention_mask",
        )
    is_real = attention_mask != 0
    seen = is_real.long().cumsum(dim=-1)
    starts = (is_real & (seen == 1))[:, -length:]
    if not _is_readable(is_real):
        return starts.to(device)
    ends = is_real[:, :-1] & ~is_real[:, 1:]
    if bool((ends & (seen[:, -1:] > seen[:, :-1])).any()):
        raise InvalidConfigError(
            "attention_mask: padding between real tokens would enter the states over time; pad on the left",
            path="attention_mask",
        )
    is_fresh = attention_mask.shape[1] == length  # and its first token needs no reset
    return starts.to(device) if bool(starts[:, int(is_fresh) :].any()) else None


def last_real_token(is_real: Tensor) -> Tensor:
    """Index ``[B]`` of the last real token of each row of ``is_real`` ``[B, T]``; 0 where there is none."""
    return (torch.arange(is_real.shape[1], device=is_real.device) * is_real).argmax(dim=1)


def check_position_shape(position_ids: Tensor | None, batch_size: int, length: int) -> None:
    """Require positions of shape ``[B or 1, T]``.

    Raises:
        ShapeMismatchError: another shape.
    """
    if position_ids is None:
        return
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch_size) or position_ids.shape[1] != length:
        raise ShapeMismatchError(
            f"position_ids must have shape [{batch_size} or 1, {length}], got {tuple(position_ids.shape)}",
            expected=(batch_size, length),
            actual=tuple(position_ids.shape),
        )


def check_positions(config: Any, position_ids: Tensor) -> None:
    """Require positions within the trained range, unless rotary scaling extends it; reads host memory only.

    Raises:
        InvalidConfigError: a negative position, or one at or beyond ``max_position_embeddings`` without scaling.
    """
    if not _is_readable(position_ids):
        return
    low, last = (int(x) for x in position_ids.aminmax())
    if low < 0:
        raise InvalidConfigError(f"position_ids: {low} is negative", path="position_ids", value=low)
    limit = config.max_position_embeddings
    if config.rope_parameters.get("rope_type", "default") == "default" and last >= limit:
        raise InvalidConfigError(
            f"position_ids: position {last} is beyond max_position_embeddings={limit} (positions 0 to {limit - 1}); "
            "shorten the input or configure rope_parameters with a scaling",
            path="position_ids",
            value=last,
        )


def packed_documents(
    batch_size: int,
    length: int,
    document_ids: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Packed documents of a call, or None; a paged engine keeps its requests apart by itself.

    Args:
        kwargs: the other arguments; ``seq_idx``, ``cu_seq_lens_q`` and the paged engine's ``cache`` are read.
    """
    if "cache" in kwargs or (torch.compiler.is_compiling() and document_ids is None):
        return None
    fresh = attention_mask is None and length > 1
    return find_documents(
        batch_size,
        length,
        document_ids=document_ids,
        seq_idx=kwargs.get("seq_idx"),
        cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        position_ids=position_ids if fresh else None,
        attention_mask=attention_mask if isinstance(attention_mask, Tensor) else None,
    )


def readable_keys(past_key_values: Any, length: int) -> tuple[int, ...]:
    """Numbers of keys that a mask may cover, where they can be read without waiting for a device."""
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    if torch.compiler.is_compiling() or (isinstance(past, Tensor) and past.device.type != "cpu"):
        return ()
    keys = (int(past) + length,)
    has_layers = past_key_values is not None and len(past_key_values.layers) > 0
    return (*keys, past_key_values.get_max_length()) if has_layers else keys


def default_positions(
    attention_mask: Any, documents: Tensor | None, past_key_values: Any, length: int, device: torch.device
) -> Tensor:
    """Default positions: restart with each document, count real tokens under padding, continue a cache."""
    if documents is not None:
        return document_positions(documents)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        is_real = attention_mask != 0
        return (is_real.long().cumsum(-1) - 1).masked_fill(~is_real, 0)[:, -length:].to(device)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return (torch.arange(length, device=device) + past).unsqueeze(0)
