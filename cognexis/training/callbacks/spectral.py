"""Largest singular values of the core's output matrices, watched and, if wanted, bounded.

    v <- W^T u / ||W^T u||,  u <- W v / ||W v||,  sigma = u . W v          power iteration from a seeded random u
    W <- W / max(1, sigma / target)                                        normalisation

A random start is needed: a constant one is orthogonal to the answer for [[1, -1], [1, -1]]. A matrix of zeros has
sigma 0; one that is not finite has sigma NaN, and is never normalised.
Reference: Miyato et al. 2018, "Spectral normalization for generative adversarial networks".
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from cognexis.errors import InvalidConfigError
from cognexis.training.callbacks.metrics import MetricBuffer

_NAMES = ("o_proj.weight", "down_proj.weight", "gate.proj.weight")


@torch.no_grad()
def spectral_norm(weight: Tensor, iterations: int = 100, seed: int = 0) -> float:
    """Largest singular value of a matrix ``[m, n]``; higher axes are flattened behind the first.

    Args:
        iterations: at most so many; ends early when the value changes by less than 1e-6 of itself.
        seed: of the start.
    """
    matrix = weight.detach().flatten(1).float()
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(matrix.shape[0], generator=generator).to(matrix.device)
    sigma = 0.0
    for _ in range(iterations):
        v = matrix.T @ u
        u = matrix @ (v / v.norm().clamp(min=torch.finfo(v.dtype).tiny))
        last, sigma = sigma, u.norm().item()
        if not math.isfinite(sigma) or sigma == 0.0 or abs(sigma - last) < 1e-6 * sigma:
            break
        u = u / sigma
    return sigma


@torch.no_grad()
def spectral_normalise(weight: Tensor, target: float) -> float:
    """Scale a matrix down so that its largest singular value is at most ``target``; returns the value before.

    Raises:
        InvalidConfigError: ``target`` is not finite and positive.
    """
    if not 0 < target < math.inf:
        raise InvalidConfigError(f"target={target!r}: must be finite and positive", path="target", value=target)
    sigma = spectral_norm(weight)
    if math.isfinite(sigma) and sigma > target:
        weight.mul_(target / sigma)
    return sigma


def core_matrices(core: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of the core that write into the state: output and down projections, and the gate's."""
    for name, parameter in core.named_parameters():
        if name.endswith(_NAMES):
            yield name, parameter


class SpectralMonitor(TrainerCallback):
    """Measures ``core_matrices`` every few steps, and keeps them below a target if one is given.

    Args:
        metrics: gets ``spectral/<name>``.
        every: optimizer steps between measurements.
        target: largest singular value that is allowed; None only watches.
        limit: a larger value raises an alert; None never does.
    """

    def __init__(
        self, metrics: MetricBuffer, every: int = 100, target: float | None = None, limit: float | None = None
    ) -> None:
        if type(every) is not int or every < 1:
            raise InvalidConfigError(f"every={every!r}: must be a positive integer", path="every", value=every)
        if target is not None and not 0 < target < math.inf:
            raise InvalidConfigError(f"target={target!r}: must be finite and positive", path="target", value=target)
        self.metrics, self.every, self.target, self.limit = metrics, every, target, limit

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure, and normalise where asked to."""
        if state.global_step % self.every:
            return
        for name, weight in core_matrices(_core_of(model)):
            sigma = spectral_norm(weight) if self.target is None else spectral_normalise(weight.data, self.target)
            self.metrics.add(f"spectral/{name.removesuffix('.weight')}", sigma)
            if self.limit is not None and not sigma <= self.limit:
                self.metrics.alert("spectral_norm", f"core {name}: {sigma:.3g} exceeds the limit {self.limit}")


def _core_of(model: Any) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.split(".")[-1] == "recurrent")
