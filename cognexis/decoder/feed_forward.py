"""Feed-forward layer, applied to each token by itself.

    swiglu: y = (silu(x W_gate) * (x W_up)) W_down          geglu: the same with gelu
    gelu:   y = gelu(x W_up) W_down                          relu: the same with relu

GELU is the exact form with the error function, not the tanh approximation. Dropout acts on the output; residual
scaling belongs to the block. Gated and plain weights are not interchangeable: their parameter names differ.
Reference: Shazeer 2020, "GLU Variants Improve Transformer", equations 5 and 6.
"""

from torch import Tensor, nn

from cognexis.configuration_cognexis import BlockSpec
from cognexis.configuration_rules import GATED_ACTIVATIONS

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "swiglu": nn.SiLU,
    "geglu": nn.GELU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


class GatedFeedForward(nn.Module):
    """SwiGLU or GeGLU on ``[..., H]``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = _ACTIVATIONS[spec.ffn_activation]()
        self.dropout = nn.Dropout(spec.ffn_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.dropout(self.down_proj(gated))


class PlainFeedForward(nn.Module):
    """Two-matrix GELU or ReLU layer on ``[..., H]``."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        self.activation = _ACTIVATIONS[spec.ffn_activation]()
        self.dropout = nn.Dropout(spec.ffn_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.activation(self.up_proj(hidden_states))))


def build_feed_forward(spec: BlockSpec) -> nn.Module:
    """Return the layer that ``spec.ffn_activation`` names."""
    return (GatedFeedForward if spec.ffn_activation in GATED_ACTIVATIONS else PlainFeedForward)(spec)
