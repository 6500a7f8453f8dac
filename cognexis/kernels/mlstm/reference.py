"""The mLSTM recurrence token by token; the truth for the other forms."""

import torch
from torch import Tensor

from cognexis.kernels.mlstm.step import mlstm_step
from cognexis.kernels.precision import wide_dtype


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    resets: Tensor | None,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See :func:`cognexis.kernels.mlstm.mlstm_sequence`; ``chunk_size`` does not matter here."""
    wide = wide_dtype(q, k, v, i, f, *state)
    c, n, m = (part.to(wide) for part in state)
    outputs = []
    for t in range(q.shape[2]):
        if resets is not None:
            fresh = resets[:, t, None]
            m = torch.where(fresh, 0, m)
            n = torch.where(fresh[..., None], 0, n)
            c = torch.where(fresh[..., None, None], 0, c)
        q_t, k_t, v_t, i_t, f_t = (part[:, :, t].to(wide) for part in (q, k, v, i, f))
        h, (c, n, m) = mlstm_step(q_t, k_t, v_t, i_t, f_t, (c, n, m), eps)
        outputs.append(h)
    last = (c.to(state[0].dtype), n.to(state[1].dtype), m.to(state[2].dtype))
    return torch.stack(outputs, 2).to(v.dtype), last
