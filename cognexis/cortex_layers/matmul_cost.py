"""Floating-point operations of the matrix products of a stack, for one row of T tokens in one call.

A multiplication and an addition are two operations. Every linear layer costs 2 T in out. On top of that, with N heads
of width D, P = N D, M memory slots and E experts of key width K:

    mLSTM      T = 1: 2 N D^2;  else  G N (4 C^2 D + 4 C D^2 + 2 C D)    G chunks of C tokens, the last filled up
               scores and values 4 C^2 D; memory read and written 4 C D^2; normaliser read 2 C D
    sLSTM      8 T N D^2 for its recurrent matrices, 8 T N D^2 for its block-diagonal gates
    XL         k and v of the M slots again 4 M H P (not with AxonLayers), codes 2 (M + T) H P, and for each block of
               queries 6 t l P: content, position and values; t queries see l = M + t keys (M = 0: all up to them)
    Axon       Hadamard transform 2 T a b (a + b) per block of a b channels; in full rank 4 T H^2
    LSTM, GRU  2 T per weight
    conv       2 T K H^2 where channels mix, 0 else, since its taps are then no matrix product
    column     2 T D per expert for the weighted sum, 4 T E^2 K between experts, and its routers

The memories have a fixed size, so the costs do not depend on the tokens before the call. A reset mask adds products
that are left out, 2 C^2 per chunk and head of an mLSTM. A module of another kind costs its parts and 2 T per number in
its own matrices. torch's counter sees the same products, but for those inside a fused LSTM.

Letters: T time, H hidden, D head width, N heads.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.column.mixer import ExpertMixer
from cognexis.cortex_layers.blocks.column.routers import GlobalContextRouter, TokenRefiner
from cognexis.cortex_layers.cells.conv import CausalConv1d
from cognexis.cortex_layers.cells.core.axon_cell import AxonCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer
from cognexis.cortex_layers.cells.mlstm import mLSTMCell
from cognexis.cortex_layers.cells.slstm import sLSTMCell
from cognexis.cortex_layers.cells.xl import XLCell
from cognexis.kernels.hadamard.blocks import hadamard_blocks
from cognexis.kernels.mlstm.vectorised import chunk_length
from cognexis.kernels.relative_attention.vectorised import QUERY_BLOCK


def stack_matmul_flops(module: nn.Module, num_tokens: int) -> int:
    """Operations of a stack, or of any part of one.

    Args:
        module: may lie on the meta device.
        num_tokens: T, 1 or more.
    """
    own = next((cost for kind, cost in _OWN_COSTS.items() if isinstance(module, kind)), _own_matrices)
    parts = sum(stack_matmul_flops(part, num_tokens) for part in module.children() if not _is_called_alone(part))
    return parts + own(module, num_tokens)


def _is_called_alone(part: nn.Module) -> bool:
    """Whether the cost of what holds ``part`` counts it, since it is not called once per token."""
    return isinstance(part, (ExpertMixer, GlobalContextRouter, TokenRefiner))


def _own_matrices(module: Any, num_tokens: int) -> int:
    return 2 * num_tokens * sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)


def _mlstm(cell: Any, num_tokens: int) -> int:
    heads, width = cell.cfg.num_heads, cell.head_dim
    if num_tokens == 1:
        return 2 * heads * width**2
    size = chunk_length(num_tokens, cell.cfg.chunk_size)
    return math.ceil(num_tokens / size) * heads * (4 * size**2 * width + 4 * size * width**2 + 2 * size * width)


def _slstm(cell: Any, num_tokens: int) -> int:
    return 2 * num_tokens * cell.recurrent_kernel.numel()


def _xl(cell: Any, num_tokens: int) -> int:
    hidden, width, slots = cell.hidden_size, cell.width, cell.cfg.mem_len
    again = 0 if cell.cfg.use_axon_qkv else 4 * slots * hidden * width
    codes = 2 * slots * hidden * width  # those of the T tokens are the linear layer's
    attention = 0
    for start in range(0, num_tokens, QUERY_BLOCK):
        stop = min(num_tokens, start + QUERY_BLOCK)
        keys = slots + stop - start if slots else stop
        attention += 6 * (stop - start) * keys * width
    return again + codes + attention


def _axon(cell: Any, num_tokens: int) -> int:
    if cell.cfg.use_fullrank_rtu:
        return 4 * num_tokens * cell.hidden_size**2
    if not cell.uses_srht:
        return 0
    exponents = [length.bit_length() - 1 for _, length in hadamard_blocks(cell.hidden_size)]
    sides = [(2 ** (exponent // 2), 2 ** (exponent - exponent // 2)) for exponent in exponents]
    return sum(2 * num_tokens * a * b * (a + b) for a, b in sides)


def _conv(cell: Any, num_tokens: int) -> int:
    weight = cell.conv.weight if cell.conv is not None else None
    return 0 if weight is None or weight.shape[1] == 1 else 2 * num_tokens * weight.numel()


def _column(column: Any, num_tokens: int) -> int:
    if column.e_mixer is None:
        return 0
    experts, width = len(column.experts), column.d_hidden
    key = column.e_mixer.d_key
    mixer = num_tokens * (2 * width * key + experts * 6 * width * key + 4 * experts**2 * key)
    router = 2 * (experts * column.router.keys.shape[1] ** 2 + column.router.w_q.weight.numel())
    refiner = 0
    if column.refiner is not None:
        refiner = 2 * num_tokens * (column.refiner.w_t.weight.numel() + column.refiner.keys.numel())
    return 2 * num_tokens * experts * width + mixer + router + refiner


def _nothing(module: Any, num_tokens: int) -> int:
    return 0


# What a module costs besides its parts.
_OWN_COSTS: dict[type[nn.Module], Callable[[Any, int], int]] = {
    mLSTMCell: _mlstm,
    sLSTMCell: _slstm,
    XLCell: _xl,
    AxonCell: _axon,
    AxonLayer: _nothing,
    CausalConv1d: _conv,
    nn.Conv1d: _nothing,
    ColumnBlock: _column,
}

__all__ = ["stack_matmul_flops"]
