"""What all cells share about time state: shapes, resets, and rows that are made fresh.

A state is a TensorDict with batch size ``[B]``; nothing here changes its argument. A reset at t means that a row's
state is replaced by the fresh one *before* it consumes token t.

Letters: B batch, T time, H hidden.
"""

import functools
import inspect
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from cognexis.cortex_layers.types import MaybeState, ResetMask


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over time: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_input(x: Tensor, hidden_size: int, owner: str) -> bool:
    """Check ``[B, H]`` or ``[B, T, H]``; True for a single step.

    Raises:
        ValueError: names the owner, the shape and what was expected.
    """
    if x.dim() not in (2, 3) or x.shape[-1] != hidden_size:
        raise ValueError(
            f"{owner}: input of shape {list(x.shape)}, expected [B, {hidden_size}] or [B, T, {hidden_size}]"
        )
    return x.dim() == 2


def normalise_resets(resets: ResetMask | None, x: Tensor, owner: str = "resets") -> Tensor | None:
    """Bring a reset mask into one form.

    Args:
        resets: bool, integer or 0/1 float. For a step (x ``[B, H]``): ``[B]`` or ``[B, 1]``. For a sequence (x
            ``[B, T, H]``): ``[B, T]``, or ``[B]`` which means the first token.

    Returns:
        Bool ``[B]`` for a step, bool ``[B, T]`` for a sequence, on x's device; None for None.

    Raises:
        ValueError: another shape; names the expected and the given one.
    """
    if resets is None:
        return None
    mask = torch.as_tensor(resets, device=x.device)
    rows = x.shape[0]
    mask = mask if mask.dtype == torch.bool else mask != 0
    if x.dim() == 2:
        if mask.shape not in ((rows,), (rows, 1)):
            raise ValueError(
                f"{owner}: resets of shape {list(mask.shape)}, expected [{rows}] or [{rows}, 1] for a step"
            )
        return mask.reshape(rows)
    length = x.shape[1]
    if mask.shape == (rows, length):
        return mask
    if mask.shape == (rows,):
        full = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
        if length:
            full[:, 0] = mask
        return full
    raise ValueError(
        f"{owner}: resets of shape {list(mask.shape)}, expected [{rows}, {length}] or [{rows}] for a sequence"
    )


def check_device(state: MaybeState, x: Tensor, owner: str) -> None:
    """Check that the state lies where the input does; its first tensor stands for all.

    Raises:
        ValueError: names the owner and both devices.
    """
    device = None if state is None else next((tensor.device for tensor in state.values(True, True)), None)
    if device not in (None, x.device):
        raise ValueError(
            f"{owner}: state on device {device}, expected {x.device} as the input; move one of them there"
        )


def as_sequence(
    x: Tensor, state: MaybeState, resets: ResetMask | None, hidden_size: int, owner: str
) -> tuple[Tensor, Tensor | None, bool]:
    """Input and resets as ``[B, T, H]`` and bool ``[B, T]``, and whether they came as a step (then T is 1).

    Raises:
        ValueError: a wrong shape, or a state on another device; see ``check_input``, ``check_device`` and
            ``normalise_resets``.
    """
    is_step = check_input(x, hidden_size, owner)
    check_device(state, x, owner)
    mask = normalise_resets(resets, x, owner)
    if is_step:
        x, mask = x.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
    return x, mask, is_step


def fresh_state(
    part: Any, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
) -> TensorDict:
    """The fresh state of a cell, block or stack; ``traces`` is handed to those that know the word."""
    kind: Any = type(part)
    options = {"traces": traces} if _takes_traces(kind) else {}
    return part.init_state(batch, device=device, dtype=dtype, **options)


@functools.cache
def _takes_traces(kind: Any) -> bool:
    return "traces" in inspect.signature(kind.init_state).parameters


def row_mask(mask: Tensor, rows: int, owner: str = "reset_state") -> Tensor:
    """Bool ``[B]`` from the mask of ``reset_state``.

    Raises:
        ValueError: the mask is not ``[B]`` or ``[B, 1]``.
    """
    mask = torch.as_tensor(mask)
    if mask.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{owner}: mask of shape {list(mask.shape)}, expected [{rows}]")
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(rows)


def replace_rows(state: TensorDict, mask: Tensor, fresh: TensorDict) -> TensorDict:
    """A new state with the rows of ``mask`` taken from ``fresh``; keys that only ``state`` has become zero there."""
    rows = (
        row_mask(mask, state.batch_size[0]).to(state.device) if state.device else row_mask(mask, state.batch_size[0])
    )
    result = TensorDict({}, batch_size=state.batch_size, device=state.device)
    value: Any
    for key, value in state.items():
        start: Any = fresh.get(key, None)
        if isinstance(value, TensorDict):
            empty = TensorDict({}, batch_size=value.batch_size, device=value.device)
            result[key] = replace_rows(value, rows, start if isinstance(start, TensorDict) else empty)
        else:
            shaped = rows.to(value.device).view(-1, *(1,) * (value.dim() - 1))
            start = torch.zeros_like(value) if start is None else start.to(value.dtype)
            result[key] = torch.where(shaped, start, value)
    return result


def has_keys(state: MaybeState, *keys: str) -> bool:
    """Whether a state is there and complete; otherwise a cell starts fresh."""
    return state is not None and all(key in state.keys() for key in keys)  # noqa: SIM118 (no mapping)


def detach_state(state: MaybeState) -> MaybeState:
    """Cut the gradient between two pieces of a sequence; None stays None."""
    return None if state is None else state.detach()
