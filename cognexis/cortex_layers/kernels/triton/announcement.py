"""The message that says what runs in place of a Triton kernel."""

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def announce(op: str) -> None:
    """Say once that the operation chooses its form itself."""
    logger.info("%s: runs in the form that cognexis.kernels.dispatch chooses, vectorised where no kernel can run", op)
