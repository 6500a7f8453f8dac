"""Recurrent trace unit with a weight per channel."""

from typing import Any

from cognexis.cortex_layers.kernels.triton.announcement import announce
from cognexis.kernels.rtu import rtu_stream_diag_pytorch


def rtu_stream_diag_triton(*args: Any, **kwargs: Any) -> Any:
    """``rtu_stream_diag_pytorch``, with the same arguments."""
    announce("rtu_stream_diag_triton")
    return rtu_stream_diag_pytorch(*args, **kwargs)


__all__ = ["rtu_stream_diag_triton"]
