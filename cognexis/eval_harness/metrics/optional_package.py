"""Packages that only some metrics need."""

from importlib import import_module
from typing import Any

from cognexis.errors import BackendError


def needed_package(module: str, package: str, purpose: str) -> Any:
    """Import ``module`` of ``package``.

    Raises:
        BackendError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendError(f"{purpose} needs the package {package}: pip install {package} ({error})") from error
