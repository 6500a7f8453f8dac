"""Watches over the repeated core: learned residual scales and non-finite states.

Repeating one map L times multiplies its faults: a residual scale above one grows the state in every loop, and a
single infinity reaches every later loop. The checks here are read once per step, never once per loop.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from cognexis.errors import NonFiniteError

logger = logging.get_logger(__name__)


def residual_scale_report(core: Any, limit: float = 2.0) -> dict[str, tuple[float, float]]:
    """Smallest and largest residual scale by block and branch; warns about magnitudes above ``limit``.

    Args:
        core: the recurrent core.
        limit: largest magnitude that passes without a warning.
    """
    report = {}
    for index, block in enumerate(core.blocks):
        for branch in ("attention", "feed_forward"):
            scale = torch.as_tensor(getattr(block, f"{branch}_residual_scale")).detach().float()
            report[f"blocks.{index}.{branch}"] = (scale.min().item(), scale.max().item())
            if (largest := scale.abs().max().item()) > limit:
                logger.warning(f"core blocks.{index}.{branch}: residual scale {largest:.3g} exceeds the limit {limit}")
    return report


def all_finite(states: Tensor) -> Tensor:
    """Whether no value is NaN or infinite: a flag on the device. Both show in the extremes, found in one pass."""
    if states.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=states.device)
    return torch.isfinite(torch.stack(torch.aminmax(states))).all()


def require_finite_states(is_finite: Tensor | None) -> None:
    """Raise if a flag of ``is_finite`` ``[L + 1]`` (entry 0 is the core's input) is False.

    Raises:
        NonFiniteError: names the first loop whose state holds NaN or infinity.
    """
    if is_finite is None or is_finite.is_meta or bool(is_finite.all()):
        return
    loop = int((~is_finite).nonzero()[0])
    place = "entering the recurrent core" if loop == 0 else f"after loop {loop}"
    raise NonFiniteError(f"hidden_states: NaN or infinity {place} (of {len(is_finite) - 1} loops)")
