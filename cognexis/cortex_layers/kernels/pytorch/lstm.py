"""LSTM over a sequence."""

from cognexis.kernels.lstm import lstm_sequence_pytorch

__all__ = ["lstm_sequence_pytorch"]
