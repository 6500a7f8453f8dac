"""The layers of torch inside the LSTM and the GRU cell."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from cognexis.cortex_layers.config import GRUCellConfig, LSTMCellConfig

_Layer = TypeVar("_Layer", bound=nn.RNNBase)


def recurrent_layer(build: Callable[..., _Layer], cfg: LSTMCellConfig | GRUCellConfig, bias: float) -> _Layer:
    """A layer of ``cfg``'s width and depth whose matrices start orthogonal and whose biases start at ``bias``."""
    layer = build(
        cfg.hidden_size,
        cfg.hidden_size,
        num_layers=cfg.num_layers,
        bias=cfg.bias,
        batch_first=True,
        dropout=cfg.dropout if cfg.num_layers > 1 else 0.0,  # torch warns of dropout that stands nowhere
    )
    for name, parameter in layer.named_parameters():
        if name.startswith("weight"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.constant_(parameter, bias)
    return layer


__all__ = ["recurrent_layer"]
