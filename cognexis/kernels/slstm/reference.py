"""The sLSTM recurrence token by token; the truth for the other forms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cognexis.kernels.precision import wide_dtype

SMALLEST = 1e-6


def slstm_reference(wx: Tensor, r: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`cognexis.kernels.slstm.slstm_sequence`."""
    wide = wide_dtype(wx, r, b, state)
    y, c, n, m = state.to(wide).unbind(0)
    outputs, others = [], []
    for t in range(wx.shape[1]):
        if resets is not None:
            y, c, n, m = (torch.where(resets[:, t, None, None], 0, part) for part in (y, c, n, m))
        recurrent = torch.einsum("gnoi,bni->gbno", r.to(wide), y)
        i, f, z, o = wx[:, t].to(wide).transpose(0, 1) + recurrent + b.to(wide)[:, None]
        forgotten = m + F.logsigmoid(f)
        m = torch.where((n == 0) | (i >= forgotten), i, forgotten)
        write = (i - m).clamp(max=0).exp()
        keep = (forgotten - m).clamp(max=0).exp()
        c = keep * c + write * z.tanh()
        n = keep * n + write
        y = o.sigmoid() * c / (n + SMALLEST)
        outputs.append(y)
        others.append(torch.stack([c, n, m]))
    return torch.stack(outputs, 1).to(wx.dtype), torch.stack(others, 1)
