"""Relative attention over blocks of queries, each with the keys that its band reaches.

The position scores of a block are computed for all distances and then shifted, so that row t starts at its own
distance: a column is put in front, and the rows are read anew with one entry less.
"""

import torch
from torch import Tensor

from cognexis.kernels.relative_attention.inputs import RelativeInputs

QUERY_BLOCK = 256


def relative_attention_vectorised(
    inputs: RelativeInputs, segments: Tensor, M: int, scale: float, window: int | None, dropout: float
) -> Tensor:
    """See ``attend_relative``."""
    q, k, v, r, u, v_bias = inputs
    T = q.shape[2]
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(T, start + QUERY_BLOCK)
        low = 0 if window is None else max(0, M + start - window)
        keys = slice(low, M + stop)
        codes = r[:, r.shape[1] - (M + stop - low) :]
        block = RelativeInputs(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], codes, u, v_bias)
        outputs.append(_attend_block(block, segments[:, keys], M + start - low, scale, window, dropout))
    return torch.zeros_like(q) if not outputs else outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _attend_block(
    inputs: RelativeInputs, segments: Tensor, M: int, scale: float, window: int | None, dropout: float
) -> Tensor:
    q, k, v, r, u, v_bias = inputs
    T, L = q.shape[2], k.shape[2]
    content = (q + u.unsqueeze(1)) @ k.transpose(-1, -2)
    position = _shift((q + v_bias.unsqueeze(1)) @ r.transpose(-1, -2))
    distance = M + torch.arange(T, device=q.device).unsqueeze(1) - torch.arange(L, device=q.device)
    band = distance >= 0
    if window is not None:
        band &= distance <= window
    allowed = band & (segments[:, M:].unsqueeze(2) == segments.unsqueeze(1)) & (segments >= 0).unsqueeze(1)
    scores = ((content + position) * scale).masked_fill(~allowed.unsqueeze(1), torch.finfo(q.dtype).min)
    return torch.dropout(scores.softmax(-1), dropout, dropout > 0) @ v


def _shift(scores: Tensor) -> Tensor:
    """Move row t by T - 1 - t to the left; what comes in from the right lies in the future."""
    B, N, T, L = scores.shape
    padded = torch.cat([scores.new_zeros(B, N, T, 1), scores], -1)
    return padded.view(B, N, L + 1, T)[:, :, 1:].reshape(B, N, T, L)
