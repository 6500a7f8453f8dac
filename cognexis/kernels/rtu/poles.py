"""What the forms of the RTU share: the pole, its gain, the activations, and the traces at the boundary.

    nu = clamp(nu_log),  r = exp(-e^nu),  th = e^theta_log,  g = r cos th,  p = r sin th,  gam = sqrt(1 - r^2)

``nu_log`` is clamped to [-60, 60], where every product of e^nu with a power of r is finite in float32; 1 - r^2 is
taken as -expm1(-2 e^nu), which stays positive where r rounds to 1. Beyond the clamp the gradient is 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError

NU_LIMIT = 60.0
THETA_LIMIT = 60.0
RTU_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda value: value,
    "linear": lambda value: value,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "tanh": torch.tanh,
}


class Pole(NamedTuple):
    """Pole and gain of every channel, ``[H]`` each, and the two rates that their derivatives need."""

    g: Tensor
    p: Tensor
    gam: Tensor
    rate: Tensor  # e^nu, so that dg/dnu_log = -rate g, dp/dnu_log = -rate p
    theta: Tensor  # e^theta_log, so that dg/dtheta_log = -theta p, dp/dtheta_log = theta g
    gam_slope: Tensor  # dgam/dnu_log = rate r^2 / gam


def pole_of(nu_log: Tensor, theta_log: Tensor) -> Pole:
    """Pole and gain from the two parameters."""
    rate = nu_log.clamp(-NU_LIMIT, NU_LIMIT).exp()
    theta = theta_log.clamp(max=THETA_LIMIT).exp()
    r = torch.exp(-rate)
    gam = torch.sqrt(-torch.expm1(-2 * rate))
    return Pole(r * theta.cos(), r * theta.sin(), gam, rate, theta, rate * r * r / gam)


def rtu_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of a name, in any case.

    Raises:
        InvalidConfigError: there is none.
    """
    if name.lower() not in RTU_ACTIVATIONS:
        known = ", ".join(RTU_ACTIVATIONS)
        raise InvalidConfigError(f"activation={name!r}: must be one of {known}", path="activation", value=name)
    return RTU_ACTIVATIONS[name.lower()]


def attach_traces(start: Tensor, traces: tuple[Tensor, ...], parameters: tuple[Tensor, ...]) -> Tensor:
    """The start state, unchanged in value, with the gradient path of all earlier time steps.

    Adding E_q (q - q), where one q is cut off from the gradient, adds nothing to the value and E_q to the derivative.
    """
    for trace, parameter in zip(traces, parameters, strict=True):
        nothing = parameter - parameter.detach()
        if parameter.dim() == 2:
            start = start + torch.einsum("bdh,dh->bh", trace.detach(), nothing)
        else:
            start = start + trace.detach() * nothing
    return start
