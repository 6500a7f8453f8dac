"""Recurrent trace unit with a weight per channel."""

from cognexis.kernels.rtu import rtu_stream_diag_pytorch

__all__ = ["rtu_stream_diag_pytorch"]
