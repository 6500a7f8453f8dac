"""mLSTM: one step, and a sequence in chunks."""

from cognexis.kernels.mlstm import mlstm_chunkwise_simple, mlstm_recurrent_step_stabilized_simple

__all__ = ["mlstm_chunkwise_simple", "mlstm_recurrent_step_stabilized_simple"]
