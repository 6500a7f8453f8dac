"""What both forms of relative attention take."""

from typing import NamedTuple

from torch import Tensor


class RelativeInputs(NamedTuple):
    """Queries, keys, values, codes of the distances and the biases; see ``attend_relative`` for the shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor
    u: Tensor
    v_bias: Tensor
