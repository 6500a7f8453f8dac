"""Gradients before the optimizer sees them: norms by stage, clipping, balance over loops.

    norm      = sqrt(sum_p ||g_p||^2)
    clip      g_p <- g_p min(1, c / norm), c the largest norm, over all parameters or for each by itself
    by_loops  g_p <- g_p / L for the parameters of the core, which L loops shared

A parameter without a gradient counts as 0.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.errors import BackendError, InvalidConfigError

_STAGES = {"model.embed_tokens": "embedding", "model.prelude": "prelude", "model.recurrent": "core"}
_STAGES |= {"model.coda": "coda", "model.final_norm": "head", "lm_head": "head", "model.value_head": "value_head"}


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Cut the common norm of all gradients to ``max_norm``; returns the norm before.

    Raises:
        InvalidConfigError: ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise InvalidConfigError(f"max_norm={max_norm!r}: must be positive", path="max_norm", value=max_norm)
    return nn.utils.clip_grad_norm_(list(parameters), max_norm)


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Cut the norm of every parameter's gradient to ``max_norm`` by itself."""
    for parameter in parameters:
        if parameter.grad is not None:
            clip_by_norm([parameter], max_norm)


@torch.no_grad()
def stage_norms(model: nn.Module) -> dict[str, Tensor]:
    """Gradient norm of each stage: embedding, prelude, core, coda, head, value_head and other."""
    squares: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
            squares.setdefault(stage_of(name), []).append(gradient.float().square().sum())
    return {stage: torch.stack(values).sum().sqrt() for stage, values in squares.items()}


def stage_of(name: str) -> str:
    """The stage that a parameter belongs to, by its name; prefixes of wrappers do not matter."""
    return next((stage for part, stage in _STAGES.items() if f".{part}." in f".{name}."), "other")


@torch.no_grad()
def divide_core_gradients(core: nn.Module, num_loops: int) -> None:
    """Divide the gradients of the core's parameters by the loops that added them up."""
    for parameter in core.parameters():
        if parameter.grad is not None:
            parameter.grad /= num_loops


def require_core_gradients(core: Any) -> None:
    """Raise if the core should learn and got no gradient at all: it would stay as it is, without a word.

    Raises:
        BackendError: no trainable parameter of the core has a gradient.
    """
    trainable = [parameter for parameter in core.parameters() if parameter.requires_grad]
    if trainable and all(parameter.grad is None for parameter in trainable):
        raise BackendError(
            f"no gradient reached the {len(trainable)} trainable parameters of the recurrent core: its loops ran "
            "without gradient (torch.no_grad or inference_mode around the forward pass), or autocast reused weights "
            "that were cast without gradient (call torch.clear_autocast_cache() after a forward pass under no_grad)"
        )
