"""The sLSTM as a cell: a causal convolution, gates per head, and a scalar memory per channel.

    xc = SiLU(conv(x))                           (xc = x without a convolution)
    i, f = A_i xc, A_f xc,  z, o = A_z x, A_o x  A block-diagonal over heads; or with AxonLayers: i, f = if_fused(xc),
                                                 z, o = zo_fused(x), both H to 2 H
    h = recurrence(i, f, z, o)                   with recurrent_kernel and bias; see cognexis.kernels.slstm
    y = norm per head (dropout(h))

A_* start as normal noise of variance 2 / (5 D), the recurrent kernel at zero, the forget bias at 3 to 6 over the
channels of a head, other biases at zero. ``recurrent_kernel [N, 4 D, D]`` and ``bias [N, 4, D]`` hold the gates in the
order i, f, z, o.

State: ``y`` (before the norm), ``c``, ``n``, ``m``, each ``[B, H]``, and ``conv [B, K, H]`` unless the convolution is
off; the group ``slstm`` (if_fused, zo_fused) with AxonLayers. All start at zero.

Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory".
Letters: B batch, T time, H hidden, N heads, D head width, K taps.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.convolved import ConvolvedCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer
from cognexis.cortex_layers.cells.head_norm import MultiHeadLayerNorm, bias_linspace_init_
from cognexis.cortex_layers.config import sLSTMCellConfig
from cognexis.cortex_layers.state import accumulator_dtype
from cognexis.kernels.slstm import slstm_sequence


class HeadwiseLinear(nn.Module):
    """A block-diagonal matrix: one ``[D, D]`` per head, without a bias."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, head_dim))  # [N, D in, D out]
        nn.init.normal_(self.weight, std=(2 / (5 * head_dim)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, N, D]`` to ``[B, T, N, D]``."""
        return torch.einsum("btni,nio->btno", x, self.weight)


class sLSTMCell(ConvolvedCell):
    """Scalar LSTM with heads.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_size``.
    """

    memory_keys = ("y", "c", "n", "m")

    def __init__(self, cfg: sLSTMCellConfig) -> None:
        super().__init__(cfg.hidden_size, cfg.conv1d_kernel_size)  # type: ignore[arg-type]
        width, heads = self.hidden_size, cfg.num_heads
        self.cfg = cfg
        self.norm = MultiHeadLayerNorm(width, heads)  # refuses heads that do not divide
        self.head_dim = width // heads
        if cfg.use_axon_layer:
            self.if_fused = AxonLayer(width, 2 * width, cfg.axon_layer_config, name="if_fused", group="slstm")
            self.zo_fused = AxonLayer(width, 2 * width, cfg.axon_layer_config, name="zo_fused", group="slstm")
        else:
            self.gates = nn.ModuleDict({gate: HeadwiseLinear(heads, self.head_dim) for gate in "ifzo"})
        self.recurrent_kernel = nn.Parameter(torch.zeros(heads, 4 * self.head_dim, self.head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, 4, self.head_dim))
        for head in range(heads):
            bias_linspace_init_(self.bias.data[head, 1])
        self.dropout = nn.Dropout(cfg.dropout)

    def fresh_memories(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        dtypes = dict.fromkeys(self.memory_keys, accumulator_dtype(dtype)) | {"y": dtype}
        return {key: torch.zeros(batch, self.hidden_size, device=device, dtype=dtypes[key]) for key in dtypes}

    def recur(
        self, x: Tensor, mixed: Tensor, parent: TensorDict, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        heads, width = self.cfg.num_heads, self.head_dim
        wide = accumulator_dtype(x.dtype)
        held = torch.stack([parent[key].to(wide).unflatten(-1, (heads, width)) for key in self.memory_keys])
        h, others = slstm_sequence(
            self._from_input(x, mixed, parent, mask),
            self.recurrent_kernel.unflatten(1, (4, width)).transpose(0, 1),
            self.bias.transpose(0, 1),
            held,
            resets=mask,
        )
        last = dict(zip("cnm", others[:, -1].flatten(-2), strict=True))
        y = self.norm(self.dropout(h)).to(x.dtype)
        return y, {"y": h[:, -1].flatten(-2).to(parent["y"].dtype)} | last

    def _from_input(self, x: Tensor, mixed: Tensor, parent: TensorDict, mask: Tensor | None) -> Tensor:
        """What x and its convolution give to the gates: ``[B, T, 4, N, D]``."""
        heads = (self.cfg.num_heads, self.head_dim)
        if self.cfg.use_axon_layer:
            pairs = (self.if_fused(mixed, parent, resets=mask), self.zo_fused(x, parent, resets=mask))
            return torch.cat([pair.unflatten(-1, (2, *heads)) for pair in pairs], 2)
        sources = {"i": mixed, "f": mixed, "z": x, "o": x}
        return torch.stack([self.gates[gate](source.unflatten(-1, heads)) for gate, source in sources.items()], 2)


__all__ = ["HeadwiseLinear", "sLSTMCell"]
