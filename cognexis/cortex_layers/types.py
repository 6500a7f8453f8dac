"""Names for what passes between cells, blocks, columns and stacks."""

from typing import TypeAlias

import torch
from tensordict import TensorDict

Tensor: TypeAlias = torch.Tensor
State: TypeAlias = TensorDict
MaybeState: TypeAlias = TensorDict | None
ResetMask: TypeAlias = torch.Tensor
"""0/1 in any dtype: ``[B]`` or ``[B, 1]`` for a step; ``[B, T]``, or ``[B]`` (first token), for a sequence."""
