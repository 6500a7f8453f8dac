"""The choice between two functions by device, for callers that bring functions of their own.

What runs inside the package is chosen in ``cognexis.kernels.dispatch``; this obeys the same environment variables.
"""

import functools
import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

from cognexis.kernels.dispatch import requested_form, triton_is_installed

logger = logging.getLogger(__name__)

BackendFunction = Callable[..., Any] | str


def triton_available() -> bool:
    """Whether Triton is installed, has a CUDA device and is not switched off."""
    return triton_is_installed() and torch.cuda.is_available() and requested_form() in ("auto", "triton")


TRITON_AVAILABLE = triton_available()


def select_backend(
    triton_fn: BackendFunction | None,
    pytorch_fn: BackendFunction,
    tensor: torch.Tensor,
    *,
    allow_triton: bool = True,
    cuda_fn: BackendFunction | None = None,
    allow_cuda: bool = False,
) -> Callable[..., Any]:
    """The Triton function if it can be loaded and run on this tensor, else the PyTorch function.

    Args:
        triton_fn: a function, or "module:attribute", loaded only where it would run.
        pytorch_fn: likewise.
        tensor: the input, whose device counts.
        cuda_fn: accepted for compatibility; there are no CUDA extensions.
        allow_cuda: likewise.
    """
    if allow_cuda and cuda_fn is not None:
        _warn_about_cuda()
    if allow_triton and TRITON_AVAILABLE and tensor.is_cuda and triton_fn is not None:
        function = _load(triton_fn)
        if function is not None:
            return function
    function = _load(pytorch_fn)
    if function is None:
        raise ImportError(f"{pytorch_fn}: cannot be loaded")
    return function


@functools.cache
def _warn_about_cuda() -> None:
    warnings.warn("allow_cuda is ignored: there are no CUDA extensions", DeprecationWarning, stacklevel=3)


def _load(function: BackendFunction) -> Callable[..., Any] | None:
    if not isinstance(function, str):
        return function
    module, _, attribute = function.partition(":")
    try:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        logger.debug("%s cannot be loaded: %s", function, error)
        return None
    return loaded
