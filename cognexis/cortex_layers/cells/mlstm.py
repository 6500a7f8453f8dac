"""The mLSTM as a cell: a causal convolution, gates from queries, keys and values, and a matrix memory per head.

    xc = SiLU(conv(x))                           (xc = x without a convolution)
    q = k = xc, v = x                            or with AxonLayers: q = k = SiLU(qk(xc)), v = v(x)
    i = W_i [q, k, v] + b_i, f = W_f [q, k, v] + b_f        one number per head; linear, or AxonLayers
    h = recurrence(q, k, v, i, f)                see cognexis.kernels.mlstm
    y = norm per head (h)

W_i and W_f start at zero, b_f at 3 to 6 over the heads, b_i at normal noise of 0.1. The forget and input gates are
computed in at least float32.

State: ``c [B, N, D, D]``, ``n [B, N, D, 1]``, ``m [B, N, 1, 1]``, ``conv [B, K, H]`` unless the convolution is off;
the groups ``mlstm`` (igate, fgate) and ``mlstm_qkv`` (qk, v) with AxonLayers. All start at zero.

Source: Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory". Different from it: q and k share one projection or
none, and v has none.
Letters: B batch, T time, H hidden, N heads, D head width, K taps.
"""

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from cognexis.cortex_layers.cells.convolved import ConvolvedCell
from cognexis.cortex_layers.cells.core.axon_layer import AxonLayer
from cognexis.cortex_layers.cells.head_norm import MultiHeadLayerNorm, bias_linspace_init_
from cognexis.cortex_layers.config import mLSTMCellConfig
from cognexis.cortex_layers.state import accumulator_dtype
from cognexis.kernels.mlstm import mlstm_sequence
from cognexis.kernels.precision import no_autocast


class mLSTMCell(ConvolvedCell):
    """Matrix LSTM.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_size``.
    """

    memory_keys = ("c", "n", "m")

    def __init__(self, cfg: mLSTMCellConfig) -> None:
        super().__init__(cfg.hidden_size, cfg.conv1d_kernel_size)  # type: ignore[arg-type]
        width, heads = self.hidden_size, cfg.num_heads
        self.cfg = cfg
        self.norm = MultiHeadLayerNorm(width, heads)  # refuses heads that do not divide
        self.head_dim = width // heads
        self.qk: AxonLayer | None = None
        self.v: AxonLayer | None = None
        if cfg.use_axon_qkv:
            self.qk = AxonLayer(width, width, cfg.axon_qkv_config, name="qk", group="mlstm_qkv")
            self.v = AxonLayer(width, width, cfg.axon_qkv_config, name="v", group="mlstm_qkv")
        self.igate: nn.Module = self._gate("igate")
        self.fgate: nn.Module = self._gate("fgate")

    def _gate(self, name: str) -> nn.Module:
        cfg, width = self.cfg, 3 * self.hidden_size
        gate: nn.Module
        if cfg.use_axon_layer:
            gate = AxonLayer(width, cfg.num_heads, cfg.axon_layer_config, name=name, group="mlstm")
        else:
            gate = nn.Linear(width, cfg.num_heads)
        linear = gate.linear if isinstance(gate, AxonLayer) else gate
        nn.init.zeros_(linear.weight)
        if name == "fgate":
            bias_linspace_init_(linear.bias)
        else:
            nn.init.normal_(linear.bias, std=0.1)
        return gate

    def fresh_memories(self, batch: int, *, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        heads, width = self.cfg.num_heads, self.head_dim
        shapes = {"c": (width, width), "n": (width, 1), "m": (1, 1)}
        wide = accumulator_dtype(dtype)
        return {key: torch.zeros(batch, heads, *shape, device=device, dtype=wide) for key, shape in shapes.items()}

    def recur(
        self, x: Tensor, mixed: Tensor, parent: TensorDict, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        qk = mixed if self.qk is None else F.silu(self.qk(mixed, parent, resets=mask))
        v = x if self.v is None else self.v(x, parent, resets=mask)
        gates = torch.cat([qk, qk, v], -1)
        q, v = (part.unflatten(-1, (self.cfg.num_heads, self.head_dim)).transpose(1, 2) for part in (qk, v))
        h, (c, n, m) = mlstm_sequence(
            q,
            q,
            v,
            self._run_gate(self.igate, gates, parent, mask),
            self._run_gate(self.fgate, gates, parent, mask),
            parent["c"],
            parent["n"][..., 0],
            parent["m"][..., 0, 0],
            resets=mask,
            chunk_size=self.cfg.chunk_size,
        )
        y = self.norm(h.transpose(1, 2)).to(x.dtype)
        return y, {"c": c, "n": n[..., None], "m": m[..., None, None]}

    def _run_gate(self, gate: nn.Module, x: Tensor, parent: TensorDict, mask: Tensor | None) -> Tensor:
        """``[B, T, 3 H]`` to ``[B, N, T]``."""
        wide = accumulator_dtype(x.dtype)
        if isinstance(gate, AxonLayer):
            y = gate(x, parent, resets=mask)
        elif type(gate) is nn.Linear:
            with no_autocast(x):
                y = F.linear(x.to(wide), gate.weight.to(wide), gate.bias.to(wide))
        else:  # an adapter around the layer
            y = gate(x).to(wide)
        return y.transpose(1, 2)


__all__ = ["MultiHeadLayerNorm", "bias_linspace_init_", "mLSTMCell"]
