"""Seeds and determinism for experiments."""

import os
import random

import numpy as np
import torch


def seed_everything(seed: int, /) -> None:
    """Seed Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # also seeds every CUDA device, now or when CUDA starts


def set_tf32_precision(enabled: bool, /) -> None:
    """Allow or forbid TF32 in matrix products and cuDNN; does nothing without CUDA."""
    if not torch.cuda.is_available():
        return
    torch.backends.cuda.matmul.allow_tf32 = bool(enabled)
    torch.backends.cudnn.allow_tf32 = bool(enabled)


def enable_determinism() -> None:
    """Deterministic algorithms everywhere, and no TF32. A CUDA context must not exist yet."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_tf32_precision(False)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
