"""The mLSTM recurrence in chunks: attention inside a chunk, a loop over chunks for the state only.

Chunks have equal sizes: 65 tokens in chunks of at most 64 are 33 and 32, so that the time grows evenly with T. The
last chunk is filled up with tokens that write nothing (i = -inf) and forget nothing (lf = 0), which leave the state as
it is. The equations stand in ``cognexis.kernels.mlstm``.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cognexis.kernels.mlstm.reference import mlstm_reference
from cognexis.kernels.mlstm.step import LARGEST_EXPONENT
from cognexis.kernels.precision import wide_dtype


def mlstm_vectorised(
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
    """See :func:`cognexis.kernels.mlstm.mlstm_sequence`."""
    length, width = q.shape[2:]
    if length == 1:
        return mlstm_reference(q, k, v, i, f, state, resets, chunk_size, eps)
    wide = wide_dtype(q, k, v, i, f, *state)
    size = chunk_length(length, chunk_size)
    q, k, v_wide = (_chunks(part.to(wide), size) for part in (q, k * width**-0.5, v))  # [B, N, G, C, D]
    gate = _chunks(i.to(wide)[..., None], size, -math.inf)[..., 0]  # [B, N, G, C]
    forget = _chunks(F.logsigmoid(f.to(wide))[..., None], size)[..., 0]

    reaches = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()  # A: [.., C, C]
    untouched = None  # where the state before the chunk still counts: [B, 1, G, C]
    summed = forget.cumsum(-1)
    path = summed
    if resets is not None:
        episode = _chunks(resets[:, None, :, None].to(torch.int32), size)[..., 0].cumsum(-1)  # [B, 1, G, C]
        reaches = reaches & (episode[..., :, None] == episode[..., None, :])
        untouched = episode == 0
        path = (reaches.to(wide) @ forget[..., None])[..., 0]
    weight = summed[..., :, None] - summed[..., None, :] + gate[..., None, :]
    weight = torch.where(reaches, weight, -math.inf)  # D: [B, N, G, C, C]
    top = weight.amax(-1)

    starts, last = _states_of_chunks(k, v_wide, weight[..., -1, :], top[..., -1], path[..., -1], untouched, state)
    c, n, m = starts
    carried = path + (m[..., None] if untouched is None else torch.where(untouched, m[..., None], 0))
    scale = torch.maximum(top, carried)  # S
    reach = (carried - scale).exp()
    if untouched is not None:
        reach = torch.where(untouched, reach, 0)
    weight = (q @ k.transpose(-1, -2)) * (weight - scale[..., None]).exp()
    above = weight @ v_wide + reach[..., None] * (q @ c)
    below = weight.sum(-1) + reach * (q @ n[..., None])[..., 0]
    floor = (-scale).clamp(max=LARGEST_EXPONENT).exp()
    h = above / (torch.maximum(below.abs(), floor) + eps)[..., None]
    return h.flatten(2, 3)[:, :, :length].to(v.dtype), last


def chunk_length(length: int, chunk_size: int) -> int:
    """Tokens of a chunk where ``length`` tokens are cut into equal chunks of at most ``chunk_size``."""
    return math.ceil(length / math.ceil(length / chunk_size))


def _chunks(x: Tensor, size: int, filler: float = 0.0) -> Tensor:
    """``[B, N, T, D]`` to ``[B, N, G, C, D]``."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size), value=filler).unflatten(2, (-1, size))


def _states_of_chunks(
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    top: Tensor,
    path: Tensor,
    untouched: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor],
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The states before each chunk, stacked along G, and the one after the last.

    Args:
        weight: D of the last token of each chunk ``[B, N, G, C]``, and its largest value ``top [B, N, G]``.
        path: r of the last token without m0 ``[B, N, G]``.
    """
    written = k * (weight - top[..., None]).exp()[..., None]
    new_c, new_n = written.transpose(-1, -2) @ v, written.sum(-2)
    c, n, m = (part.to(k.dtype) for part in state)
    befores = []
    for g in range(k.shape[2]):
        befores.append((c, n, m))
        kept = None if untouched is None else untouched[:, :, g, -1]
        carried = path[:, :, g] + (m if kept is None else torch.where(kept, m, 0))
        m = torch.maximum(carried, top[:, :, g])
        keep = (carried - m).exp()
        if kept is not None:
            keep = torch.where(kept, keep, 0)
        add = (top[:, :, g] - m).exp()
        c = keep[..., None, None] * c + add[..., None, None] * new_c[:, :, g]
        n = keep[..., None] * n + add[..., None] * new_n[:, :, g]
    last = (c.to(state[0].dtype), n.to(state[1].dtype), m.to(state[2].dtype))
    before_c, before_n, before_m = (torch.stack(parts, 2) for parts in zip(*befores, strict=True))
    return (before_c, before_n, before_m), last
