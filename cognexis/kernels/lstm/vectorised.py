"""LSTM and GRU by torch's own layers; with resets, all episodes run side by side.

A reset cuts a row into episodes that know nothing of each other. So each episode becomes a row of one packed batch,
longest first, and what torch runs over time is only as long as the longest episode: resets make the call faster, not
slower. Only the first episode of a row starts from the given state, and only the last one ends in the new state.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from cognexis.kernels.lstm.packed import run_packed_lstm
from cognexis.kernels.precision import wide_dtype


def rnn_vectorised(
    net: nn.RNNBase, x: Tensor, states: tuple[Tensor, ...], resets: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See :func:`cognexis.kernels.lstm.reference.rnn_reference`."""
    compute = wide_dtype(x, *net.parameters())
    held = tuple(state.to(compute) for state in states)
    if resets is not None:
        held = tuple(torch.where(resets[:, 0, None, None], 0, state) for state in held)
    if resets is not None and x.shape[1] > 1 and not resets.is_meta and bool(resets[:, 1:].any()):
        y, last = _run_episodes(net, x.to(compute), held, resets)
    else:
        y, last = _run_layer(net, x.to(compute), held)
    return y.to(x.dtype), tuple(new.to(given.dtype) for new, given in zip(last, states, strict=True))


def _run_layer(net: nn.RNNBase, inputs: Tensor | PackedSequence, held: tuple[Tensor, ...]) -> tuple:
    """Call the layer on states ``[B, L, H]``, in the dtype of the inputs."""
    first = [state.transpose(0, 1).contiguous() for state in held]
    given = (inputs, tuple(first) if len(first) == 2 else first[0])
    if net.weight_ih_l0.dtype == held[0].dtype:
        y, last = net(*given)
    else:
        weights = {name: weight.to(held[0].dtype) for name, weight in net.named_parameters()}
        y, last = torch.func.functional_call(net, weights, given)
    return y, tuple(state.transpose(0, 1) for state in (last if isinstance(last, tuple) else (last,)))


def _run_episodes(net: nn.RNNBase, x: Tensor, held: tuple[Tensor, ...], resets: Tensor) -> tuple:
    rows, length = resets.shape
    starts = resets.clone()
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]  # place of each episode's first token in [B * T]
    episode = starts.flatten().cumsum(0) - 1  # [B * T]
    place = torch.arange(rows * length, device=x.device) - first[episode]  # of a token in its episode
    sizes = torch.diff(first, append=first.new_tensor([rows * length]))
    longest_first = sizes.argsort(descending=True, stable=True)
    rank = torch.empty_like(longest_first)
    rank[longest_first] = torch.arange(len(sizes), device=x.device)
    order = (place * len(sizes) + rank[episode]).argsort()

    opens_row = (first % length == 0)[longest_first, None, None]
    row = (first // length)[longest_first]
    started = tuple(torch.where(opens_row, state[row], 0) for state in held)
    tokens, counts = x.flatten(0, 1)[order], place.bincount().cpu()
    if isinstance(net, nn.LSTM) and x.device.type == "cpu":  # torch's own is slow backwards on packed input there
        with torch.autocast("cpu", enabled=False):
            y, last = run_packed_lstm(net, tokens, counts.tolist(), started)
    else:
        packed, last = _run_layer(net, PackedSequence(tokens, counts), started)
        y = packed.data
    back = torch.empty_like(order)
    back[order] = torch.arange(rows * length, device=x.device)
    closes_row = rank[episode.view(rows, length)[:, -1]]
    return y[back].view(rows, length, -1), tuple(state[closes_row] for state in last)
