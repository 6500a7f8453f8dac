"""Shortens encoded texts: our four policies, and the strategies of transformers for a backend that is never changed.

With n = ``max_length`` and the beginning-of-text and end-of-text tokens already in place:

    right    keeps the first n tokens
    left     keeps the last n tokens
    middle   keeps floor((n - m) / 2) tokens of the head and the rest of the tail, around a marker of m tokens
    error    refuses what is longer

Masks, offsets and special-token flags are cut together with the ids. The marker's tokens have the offsets (0, 0).
"""

import json
from typing import Any

from tokenizers import Encoding

from cognexis.errors import InvalidConfigError, TokenizerError

TRUNCATION_POLICIES = ("error", "left", "right", "middle")


def check_policy(policy: Any, max_length: Any) -> None:
    """Raise InvalidConfigError unless ``policy`` is known and ``max_length`` a positive integer."""
    if policy not in TRUNCATION_POLICIES:
        raise InvalidConfigError(
            f"truncation_policy={policy!r}: must be one of {', '.join(TRUNCATION_POLICIES)}",
            path="truncation_policy",
            value=policy,
        )
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise InvalidConfigError(
            f"max_length={max_length!r}: truncation_policy needs a positive integer",
            path="max_length",
            value=max_length,
        )


def apply_policy(encoding: Encoding, max_length: int, policy: str, marker: Encoding | None = None) -> Encoding:
    """Shorten ``encoding`` to at most ``max_length`` tokens.

    Args:
        encoding: one text with its special tokens; changed in place where the policy allows it.
        max_length: number of tokens that may remain, the marker's included.
        policy: one of :data:`TRUNCATION_POLICIES`.
        marker: what stands for the part that ``middle`` leaves out.

    Raises:
        TokenizerError: too long under ``error``; the message has both lengths.
        InvalidConfigError: the marker alone is longer than ``max_length``.
    """
    if len(encoding) <= max_length:
        return encoding
    if policy == "error":
        raise TokenizerError(f"the text has {len(encoding)} tokens and max_length is {max_length}")
    if policy == "middle":
        size = len(marker) if marker else 0
        if size > max_length:
            raise InvalidConfigError(
                f"max_length={max_length}: the truncation marker alone has {size} tokens",
                path="max_length",
                value=max_length,
            )
        head = (max_length - size) // 2
        return _join_ends(encoding, head, max_length - size - head, marker)
    encoding.truncate(max_length, direction=policy)
    return _without_overflow(encoding)


def truncate_pair(
    first: Encoding, second: Encoding | None, max_length: int, strategy: str, stride: int, direction: str
) -> None:
    """Do what the backend does with its own truncation settings, before special tokens are added.

    Args:
        first: encoded text, changed in place.
        second: its partner, or None.
        max_length: tokens of both together.
        strategy: ``longest_first``, ``only_first`` or ``only_second``, as in transformers.
        stride: tokens that overflowing parts share.
        direction: the side that is cut, ``left`` or ``right``.
    """
    excess = len(first) + (len(second) if second else 0) - max_length
    if excess <= 0:
        return
    if strategy == "longest_first":
        if second is None:
            _cut(first, max_length, stride, direction)
            return
        short, long = sorted((len(first), len(second)))
        long = short if short > max_length else max(short, max_length - short)
        if short + long > max_length:
            short = max_length // 2
            long = short + max_length % 2
        if len(first) > len(second):
            short, long = long, short
        _cut(first, short, stride, direction)
        _cut(second, long, stride, direction)
        return
    target = first if strategy == "only_first" else second
    if target is None:
        raise InvalidConfigError("truncation='only_second' needs a pair of texts", path="truncation", value=strategy)
    if len(target) <= excess:
        raise TokenizerError(
            f"truncation={strategy!r} would have to remove {excess} tokens from a text of {len(target)} tokens"
        )
    _cut(target, len(target) - excess, stride, direction)


def _cut(encoding: Encoding, size: int, stride: int, direction: str) -> None:
    if 0 < size <= stride < len(encoding):
        raise InvalidConfigError(
            f"stride={stride}: must be smaller than the {size} tokens that remain", path="stride", value=stride
        )
    encoding.truncate(size, stride=stride, direction=direction)


def join_segments(segments: list[Encoding]) -> Encoding:
    """Put encoded pieces of one text together again, with the offsets in the whole text."""
    return Encoding.merge(segments, growing_offsets=True)


def _join_ends(encoding: Encoding, head: int, tail: int, marker: Encoding | None) -> Encoding:
    state = json.loads(encoding.__getstate__())
    inserted = json.loads(marker.__getstate__()) if marker else {}
    size = len(encoding)
    for key, values in state.items():
        if isinstance(values, list) and len(values) == size:
            middle = inserted.get(key, [])
            if key == "offsets":
                middle = [[0, 0]] * len(middle)
            state[key] = [*values[:head], *middle, *values[size - tail :]]
    return _from_state(state)


def _without_overflow(encoding: Encoding) -> Encoding:
    if not encoding.overflowing:
        return encoding
    return _from_state(json.loads(encoding.__getstate__()))


def _from_state(state: dict[str, Any]) -> Encoding:
    """An encoding with these fields; its only sequence reaches from the first to the last ordinary token."""
    ordinary = [index for index, special in enumerate(state["special_tokens_mask"]) if not special]
    span = {"start": ordinary[0], "end": ordinary[-1] + 1} if ordinary else {"start": 0, "end": 0}
    encoding = Encoding()
    encoding.__setstate__(json.dumps({**state, "overflowing": [], "sequence_ranges": {"0": span}}).encode())
    return encoding
