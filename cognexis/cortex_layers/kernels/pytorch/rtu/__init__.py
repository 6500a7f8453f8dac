"""Recurrent trace units."""

from cognexis.kernels.rtu import rtu_stream_diag_pytorch, rtu_stream_full_pytorch

__all__ = ["rtu_stream_diag_pytorch", "rtu_stream_full_pytorch"]
