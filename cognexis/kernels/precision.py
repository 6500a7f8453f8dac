"""The dtype in which operations over time accumulate: the largest of their arguments, at least float32."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The largest dtype of the tensors, at least float32."""
    given = (tensor.dtype for tensor in tensors if tensor is not None)
    return functools.reduce(torch.promote_types, given, torch.float32)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves operations on x's device alone; some devices, as meta, have none."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
