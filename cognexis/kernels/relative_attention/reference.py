"""Relative attention one query at a time."""

import torch
from torch import Tensor


def relative_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    seg_full: Tensor,
    u: Tensor,
    v_bias: Tensor,
    M: int,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """See ``attend_relative``."""
    length, outputs = k.shape[2], []
    for t in range(q.shape[2]):
        now = M + t
        low = 0 if window is None else max(0, now - window)
        keys = k[:, :, low : now + 1]
        codes = r[:, length - 1 - (now - low) : length]  # distance now - low down to 0
        content = torch.einsum("bhd,bhjd->bhj", q[:, :, t] + u, keys)
        position = torch.einsum("bhd,hjd->bhj", q[:, :, t] + v_bias, codes)
        segments = seg_full[:, low : now + 1]
        allowed = (segments == seg_full[:, now : now + 1]) & (segments >= 0)
        scores = ((content + position) * scale).masked_fill(~allowed.unsqueeze(1), torch.finfo(q.dtype).min)
        weights = torch.dropout(scores.softmax(-1), dropout, dropout > 0)
        outputs.append(torch.einsum("bhj,bhjd->bhd", weights, v[:, :, low : now + 1]))
    return torch.stack(outputs, 2) if outputs else torch.zeros_like(q)
