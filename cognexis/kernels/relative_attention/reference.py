"""Relative attention one query at a time."""

import torch
from torch import Tensor

from cognexis.kernels.relative_attention.inputs import RelativeInputs


def relative_attention_reference(
    inputs: RelativeInputs, segments: Tensor, M: int, scale: float, window: int | None, dropout: float
) -> Tensor:
    """See ``attend_relative``."""
    q, k, v, r, u, v_bias = inputs
    length, outputs = k.shape[2], []
    for t in range(q.shape[2]):
        now = M + t
        low = 0 if window is None else max(0, now - window)
        keys = k[:, :, low : now + 1]
        codes = r[:, length - 1 - (now - low) : length]  # distance now - low down to 0
        content = torch.einsum("bhd,bhjd->bhj", q[:, :, t] + u, keys)
        position = torch.einsum("bhd,hjd->bhj", q[:, :, t] + v_bias, codes)
        seen = segments[:, low : now + 1]
        allowed = (seen == segments[:, now : now + 1]) & (seen >= 0)
        scores = ((content + position) * scale).masked_fill(~allowed.unsqueeze(1), torch.finfo(q.dtype).min)
        weights = torch.dropout(scores.softmax(-1), dropout, dropout > 0)
        outputs.append(torch.einsum("bhj,bhjd->bhd", weights, v[:, :, low : now + 1]))
    return torch.stack(outputs, 2) if outputs else torch.zeros_like(q)
