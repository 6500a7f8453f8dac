"""The built-in expert tokens; importing this module registers them.

A Axon, Ag AGaLiTe, X Transformer-XL, M mLSTM, S sLSTM, L LSTM, G GRU, C causal convolution. X^, M^ and S^ have Axon
projections in place of linear ones.
"""

from cognexis.cortex_layers.config import (
    AGaLiTeCellConfig,
    AxonConfig,
    BlockConfig,
    CausalConv1dConfig,
    GRUCellConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
    PostUpGatedBlockConfig,
    PreUpBlockConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.cortex_layers.registry import register_token


@register_token("A")
def axon_token() -> BlockConfig:
    return PostUpBlockConfig(cell=AxonConfig())


@register_token("Ag")
def agalite_token() -> BlockConfig:
    return PostUpGatedBlockConfig(cell=AGaLiTeCellConfig())


@register_token("X")
def xl_token() -> BlockConfig:
    return PostUpGatedBlockConfig(cell=XLCellConfig())


@register_token("X^")
def xl_axon_token() -> BlockConfig:
    return PostUpGatedBlockConfig(cell=XLCellConfig(use_axon_qkv=True))


@register_token("M")
def mlstm_token() -> BlockConfig:
    return PreUpBlockConfig(cell=mLSTMCellConfig())


@register_token("M^")
def mlstm_axon_token() -> BlockConfig:
    return PreUpBlockConfig(cell=mLSTMCellConfig(use_axon_layer=True, use_axon_qkv=True))


@register_token("S")
def slstm_token() -> BlockConfig:
    return PostUpBlockConfig(cell=sLSTMCellConfig())


@register_token("S^")
def slstm_axon_token() -> BlockConfig:
    return PostUpBlockConfig(cell=sLSTMCellConfig(use_axon_layer=True))


@register_token("L")
def lstm_token() -> BlockConfig:
    return PassThroughBlockConfig(cell=LSTMCellConfig())


@register_token("G")
def gru_token() -> BlockConfig:
    return PassThroughBlockConfig(cell=GRUCellConfig())


@register_token("C")
def conv_token() -> BlockConfig:
    return PassThroughBlockConfig(cell=CausalConv1dConfig())


BUILT_IN_TOKENS = ("A", "Ag", "X", "X^", "M", "M^", "S", "S^", "L", "G", "C")
