"""Checks of a generation request, all before the first forward.

The values here are those that transformers accepts or lets fail deep inside: a top_p of 2, a NaN temperature, zero
beams, an empty prompt, a length beyond the last position.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from cognexis.decoder.inputs import check_inputs_embeds, check_mask_type, check_position_shape, check_token_ids
from cognexis.errors import BudgetExceededError, InvalidConfigError, ShapeMismatchError

logger = logging.get_logger(__name__)

MAX_REQUEST_TOKENS = 10**8
MAX_STOP_STRINGS = 1024
MAX_STOP_STRING_LENGTH = 4096

_INTEGER_RANGES = {  # name: smallest and largest accepted value
    "max_new_tokens": (1, 2**31 - 1),
    "max_length": (1, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "num_beams": (1, 2**16),
    "num_return_sequences": (1, 2**16),
    "top_k": (0, 2**31 - 1),
    "prompt_lookup_num_tokens": (1, 2**16),
    "prefill_chunk_size": (1, 2**31 - 1),
}
_NUMBER_RULES: dict[str, tuple[Any, str]] = {
    "temperature": (lambda x: x >= 0, "finite and 0 or more (0 is greedy)"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "typical_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "repetition_penalty": (lambda x: x > 0, "finite and positive"),
    "max_time": (lambda x: x > 0, "finite and positive"),
}


def check_prompt(config: Any, input_ids: Any, kwargs: dict[str, Any]) -> None:
    """Require a non-empty prompt whose mask and positions have its shape, with at least one real token per row.

    Args:
        config: the model's configuration.
        input_ids: the prompt, or None.
        kwargs: the other arguments; ``inputs_embeds``, ``attention_mask``, ``position_ids`` and ``past_key_values``
            (with a cache, mask and positions may cover earlier tokens too) are read.

    Raises:
        ShapeMismatchError, InvalidTokenIdError: wrong shape, dtype or ids.
        InvalidConfigError: nothing to start from, or a row without a real token.
    """
    inputs_embeds, attention_mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if input_ids is None and inputs_embeds is None:
        raise InvalidConfigError(
            "input_ids: a prompt of at least one token is needed (or inputs_embeds)", path="input_ids"
        )
    if inputs_embeds is not None:
        check_inputs_embeds(inputs_embeds, config.hidden_size)
    if input_ids is not None and not (inputs_embeds is not None and input_ids.shape[1] == 0):
        check_token_ids(input_ids, config.vocab_size, any_device=True)
    prompt: Any = inputs_embeds if input_ids is None or input_ids.shape[1] == 0 else input_ids
    rows, length = prompt.shape[:2]
    continues = kwargs.get("past_key_values") is not None
    positions = kwargs.get("position_ids")
    if positions is not None and not continues:
        check_position_shape(positions, rows, length)
    check_mask_type(attention_mask)
    if attention_mask is None:
        return
    width = attention_mask.shape[-1] if attention_mask.ndim else 0
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == rows
    if not fits or (width < length if continues else width != length):
        raise ShapeMismatchError(
            f"attention_mask must have two axes, {(rows, length)} like the prompt, got {tuple(attention_mask.shape)}",
            expected=(rows, length),
            actual=tuple(attention_mask.shape),
        )
    if not bool((attention_mask != 0).any(dim=1).all()):
        raise InvalidConfigError("attention_mask: a row has no real token", path="attention_mask")
    if config.has_time_state and not bool((attention_mask[:, -1] != 0).all()):
        raise InvalidConfigError(
            "attention_mask: a row ends with padding, which would enter the states over time; pad on the left",
            path="attention_mask",
        )
    if rows == 1 and not bool(attention_mask[0, -1]):  # transformers warns of larger batches itself
        logger.warning("attention_mask: right-padding was detected; pad on the left for correct generation")


def check_generation_values(config: Any, values: dict[str, Any], resolved: bool = False) -> None:
    """Check sampling, length and stop settings.

    Args:
        config: the model's configuration.
        values: keyword arguments, or all fields of a finished generation config.
        resolved: ``values`` are final; ``max_length`` is then derived and not checked.

    Raises:
        InvalidConfigError: names the argument, its value and what is allowed.
    """
    for name, (low, high) in _INTEGER_RANGES.items():
        value = values.get(name)
        if value is None or (resolved and name == "max_length"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidConfigError(
                f"{name}={value!r}: must be an integer between {low} and {high}", path=name, value=value
            )
    for name, (holds, allowed) in _NUMBER_RULES.items():
        value = values.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not holds(value):
            raise InvalidConfigError(f"{name}={value!r}: must be {allowed}", path=name, value=value)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = values.get(name)
        several = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim > 0)
        for token in value if several else [value]:  # type: ignore[union-attr]
            if isinstance(token, Tensor):
                token = int(token)
            if token is not None and not (isinstance(token, int) and 0 <= token < config.vocab_size):
                raise InvalidConfigError(
                    f"{name}={token!r}: must be a token id, 0 to {config.vocab_size - 1}",
                    path=name,
                    value=token,
                )
    _check_stop_strings(values.get("stop_strings"))


def _check_stop_strings(stop_strings: Any) -> None:
    if stop_strings is None:
        return
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    sizes_fit = len(strings) <= MAX_STOP_STRINGS and all(
        isinstance(s, str) and 0 < len(s) <= MAX_STOP_STRING_LENGTH for s in strings
    )
    if not sizes_fit or not strings:
        raise InvalidConfigError(
            f"stop_strings: give 1 to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_STRING_LENGTH} characters each",
            path="stop_strings",
        )


def check_lengths(config: Any, generation_config: Any, prompt_length: int) -> None:
    """Require that every position of the request exists and that its size is sane.

    Raises:
        InvalidConfigError: prompt and new tokens need positions beyond ``max_position_embeddings``, with no rotary
            scaling configured.
        BudgetExceededError: sequences times length exceed ``MAX_REQUEST_TOKENS``.
    """
    new_tokens = generation_config.max_length - prompt_length
    limit = config.max_position_embeddings
    is_scaled = config.rope_parameters.get("rope_type", "default") != "default" or not config.has_attention
    if prompt_length > limit and not is_scaled:
        raise InvalidConfigError(
            f"input_ids: a prompt of {prompt_length} tokens exceeds max_position_embeddings={limit}",
            path="input_ids",
            value=prompt_length,
        )
    if prompt_length + new_tokens - 1 > limit and not is_scaled:
        raise InvalidConfigError(
            f"max_new_tokens={new_tokens}: a prompt of {prompt_length} tokens leaves room for "
            f"{limit - prompt_length + 1} (max_position_embeddings={limit})",
            path="max_new_tokens",
            value=new_tokens,
        )
    sequences = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if sequences * generation_config.max_length > MAX_REQUEST_TOKENS:
        raise BudgetExceededError(
            f"num_beams or num_return_sequences={sequences} times length {generation_config.max_length} exceeds "
            f"{MAX_REQUEST_TOKENS} tokens in one request"
        )


def check_prompts(config: Any, prompts: Any, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Check a batch of prompts, each a list of ids, and its sampling values, as ``generate`` would.

    Raises:
        ShapeMismatchError, InvalidTokenIdError, InvalidConfigError: as for a single prompt.
    """
    values = generation_config.to_dict() | kwargs
    # the engine writes "no end token" as -1
    check_generation_values(config, {k: v for k, v in values.items() if not (k.endswith("_token_id") and v == -1)})
    new_tokens = kwargs.get("max_new_tokens") or generation_config.max_new_tokens or 1
    for prompt in prompts:
        check_token_ids(torch.tensor([list(prompt)], dtype=torch.long), config.vocab_size)
        limits = SimpleNamespace(max_length=len(prompt) + new_tokens, num_beams=1, num_return_sequences=1)
        check_lengths(config, limits, len(prompt))
