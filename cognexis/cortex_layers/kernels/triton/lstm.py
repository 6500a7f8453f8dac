"""LSTM over a sequence."""

from typing import Any

from cognexis.cortex_layers.kernels.triton.announcement import announce
from cognexis.kernels.lstm import lstm_sequence_pytorch


def lstm_sequence_triton(*args: Any, **kwargs: Any) -> Any:
    """``lstm_sequence_pytorch``, with the same arguments."""
    announce("lstm_sequence_triton")
    return lstm_sequence_pytorch(*args, **kwargs)


__all__ = ["lstm_sequence_triton"]
