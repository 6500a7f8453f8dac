"""The dtype in which operations over time accumulate: the largest of their arguments, at least float32."""

import functools

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The largest dtype of the tensors, at least float32."""
    given = (tensor.dtype for tensor in tensors if tensor is not None)
    return functools.reduce(torch.promote_types, given, torch.float32)
