"""sLSTM over a sequence."""

from typing import Any

from cognexis.cortex_layers.kernels.triton.announcement import announce
from cognexis.kernels.slstm import slstm_sequence_pytorch


def slstm_sequence_triton(*args: Any, **kwargs: Any) -> Any:
    """``slstm_sequence_pytorch``, with the same arguments."""
    announce("slstm_sequence_triton")
    return slstm_sequence_pytorch(*args, **kwargs)


__all__ = ["slstm_sequence_triton"]
