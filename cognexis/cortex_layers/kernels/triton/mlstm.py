"""mLSTM over a sequence in chunks."""

from typing import Any

from cognexis.cortex_layers.kernels.triton.announcement import announce
from cognexis.kernels.mlstm import mlstm_chunkwise_simple


def mlstm_chunkwise_triton(*args: Any, **kwargs: Any) -> Any:
    """``mlstm_chunkwise_simple``, with the same arguments."""
    announce("mlstm_chunkwise_triton")
    return mlstm_chunkwise_simple(*args, **kwargs)


__all__ = ["mlstm_chunkwise_triton"]
