"""Names for what passes between cells, blocks, columns and stacks."""

from typing import TypeAlias

from tensordict import TensorDict
from torch import Tensor

State: TypeAlias = TensorDict
MaybeState: TypeAlias = TensorDict | None
ResetMask: TypeAlias = Tensor
"""0/1 in any dtype: ``[B]`` or ``[B, 1]`` for a step; ``[B, T]``, or ``[B]`` (first token), for a sequence."""
