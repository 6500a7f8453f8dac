"""Recurrent trace unit with dense input maps."""

from cognexis.kernels.rtu import rtu_stream_full_pytorch

__all__ = ["rtu_stream_full_pytorch"]
