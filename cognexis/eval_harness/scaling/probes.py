"""What may go wrong inside a model that loops too often, measured on a few rows.

    attention entropy   mean of -sum_k p_k ln p_k over heads, queries and core blocks, by loop, in nats
    gain of a loop      largest singular value of J = d h_t / d h_(t-1) at the last loop t, mean over rows:
                        v <- J^T J v / |J^T J v|, gain = |J v|, with J v by central differences of size eps |h|
    repetition rate     1 - distinct / all four-token sequences of greedy continuations (several texts: all together)

A gain below 1 means that the loop brings neighbouring states together, so that they settle; above 1 it drives some
apart. J belongs to a whole row, so the gain sees what tokens do to each other. The power iteration starts from
seeded noise; its result is a lower bound that comes close after a few rounds.

References: Miyato et al. 2018, "Spectral normalization for generative adversarial networks" (power iteration);
Welleck et al. 2020, "Neural text generation with unlikelihood training" (repetition).
Letters: B rows, T tokens, H hidden width, N heads, S keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROUNDS, _STEP, _SIZE = 8, 1e-2, 4


@dataclass(frozen=True)
class DepthProbe:
    """What a few rows showed at one depth.

    Attributes:
        attention_entropies: by loop; None without attention in the core.
        loop_gain: of the last loop; None in 16-bit numbers, which are too coarse for differences.
    """

    attention_entropies: list[float] | None
    loop_gain: float | None


def probe_depth(model: Any, ids: Tensor, num_loops: int) -> DepthProbe:
    """Look into one run of ``num_loops`` loops over ``ids`` ``[B, T]``."""
    entropies = _attention_entropies(model, ids, num_loops)
    wide = model.dtype in (torch.float32, torch.float64)
    return DepthProbe(entropies, _loop_gain(model, ids, num_loops) if wide else None)


def continue_greedily(model: Any, prompts: Tensor, num_loops: int, num_new_tokens: int) -> list[list[int]]:
    """The most likely continuations of ``prompts`` ``[B, T]`` without padding, up to the end-of-text token."""
    output = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        num_loops=num_loops,
        allow_extrapolation=True,
        max_new_tokens=num_new_tokens,
        do_sample=False,
    )
    end, found = model.config.eos_token_id, []
    for row in output[:, prompts.shape[1] :].tolist():
        found.append(row[: row.index(end)] if end in row else row)
    return found


def repetition_rate(texts: Sequence[Sequence[Any]], size: int = _SIZE) -> float | None:
    """Share of the sequences of ``size`` tokens that occurred before in their text; None where all are shorter."""
    pieces = [[tuple(text[at : at + size]) for at in range(len(text) - size + 1)] for text in texts]
    count = sum(map(len, pieces))
    return 1 - sum(len(set(some)) for some in pieces) / count if count else None


def _attention_entropies(model: Any, ids: Tensor, num_loops: int) -> list[float] | None:
    recurrent = model.model.recurrent
    recurrent.add_sites(num_loops)
    sums, counts = torch.zeros(2, num_loops, dtype=torch.float64)

    def watch(loop_index: int) -> Any:
        def see(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
            if output[1] is not None:
                weights = output[1].double()  # [B, N, T, S]
                sums[loop_index] += torch.special.entr(weights).sum(-1).mean().cpu()
                counts[loop_index] += 1

        return see

    handles = [
        site.register_forward_hook(watch(loop_index))
        for block in recurrent.blocks
        if hasattr(block, "attention")
        for loop_index, site in enumerate(block.attention.sites[:num_loops])
    ]
    if not handles:
        return None
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(input_ids=ids, num_loops=num_loops, allow_extrapolation=True, use_cache=False)
    finally:
        model.set_attn_implementation(previous)
        for handle in handles:
            handle.remove()
    return (sums / counts).tolist()


@contextmanager
def _arguments_of(recurrent: Any) -> Iterator[dict[str, Any]]:
    """What the core is called with, and under ``states`` the state after every loop."""
    found: dict[str, Any] = {"states": []}

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.update(args=args, kwargs=kwargs)

    handles = [
        recurrent.register_forward_pre_hook(begin, with_kwargs=True),
        recurrent.loop_state.register_forward_hook(lambda module, inputs, state: found["states"].append(state)),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _loop_gain(model: Any, ids: Tensor, num_loops: int) -> float:
    recurrent = model.model.recurrent
    with torch.no_grad(), _arguments_of(recurrent) as found:
        model(input_ids=ids, num_loops=num_loops, allow_extrapolation=True, use_cache=False)
    given = dict(zip(("h0", "num_loops", "masks", "position_embeddings", "position_ids"), found["args"], strict=False))
    given |= found["kwargs"]
    h0 = given["h0"]
    for name in ("num_loops", "record"):
        given.pop(name, None)
    start = recurrent.initial_state(h0, given["position_ids"])
    before = (found["states"][-2] if num_loops > 1 else start).detach()
    given["memories"] = recurrent.memories(h0, given["position_embeddings"], None)
    given["past_key_values"] = None

    def loop(state: Tensor) -> Tensor:
        return recurrent.loop(state, loop_index=num_loops - 1, **given)[0]

    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0), dtype=before.dtype)
    direction = _unit(noise.to(before.device))
    step = _STEP * _size(before)
    gain = torch.zeros(())
    for _ in range(_ROUNDS):
        with torch.no_grad():
            moved = (loop(before + step * direction) - loop(before - step * direction)) / (2 * step)
        gain = _size(moved).mean()
        with torch.enable_grad():
            source = before.clone().requires_grad_()
            (back,) = torch.autograd.grad(loop(source), source, moved)
        direction = _unit(back)
    return float(gain)


def _size(x: Tensor) -> Tensor:
    """Norm of each row, ``[B, 1, 1]``."""
    return x.flatten(1).norm(dim=1)[:, None, None]


def _unit(x: Tensor) -> Tensor:
    return x / _size(x).clamp_min(torch.finfo(x.dtype).tiny)
