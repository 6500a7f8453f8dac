"""sLSTM over a sequence."""

from cognexis.kernels.slstm import slstm_sequence_pytorch

__all__ = ["slstm_sequence_pytorch"]
