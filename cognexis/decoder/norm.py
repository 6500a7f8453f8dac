"""Normalisation over the feature axis.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias      (population variance)

Both compute in the larger of the input dtype and float32 and return the input dtype, so that float64 stays exact and
half precision does not overflow. The weights of the recurrent core's norms are shared by all loops.
Reference: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; Ba et al. 2016, "Layer Normalization".
"""

import torch
from torch import Tensor, nn


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms, rotary angles, softmax and gates: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class CognexisRMSNorm(nn.Module):
    """Root-mean-square norm of ``[..., H]`` with a learned weight ``[H]`` that starts at one."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(compute_dtype(hidden_states.dtype))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class CognexisLayerNorm(nn.Module):
    """Layer norm of ``[..., H]`` with weight and bias ``[H]``."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(compute_dtype(hidden_states.dtype))
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype) + self.bias

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


NORMS: dict[str, type[nn.Module]] = {
    "rmsnorm": CognexisRMSNorm,
    "layernorm": CognexisLayerNorm,
    "none": nn.Identity,
}


def build_norm(norm_type: str, hidden_size: int, eps: float) -> nn.Module:
    """Return the norm named ``norm_type`` ("rmsnorm", "layernorm" or "none")."""
    return NORMS[norm_type](hidden_size, eps)
