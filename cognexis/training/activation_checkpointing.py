"""Which activations the backward pass computes again, by stage.

    none             all are kept
    every_block      the input of each block is kept; in the core that is every loop
    every_<k>_loops  the core only: the state before every k-th loop is kept, the k loops of a segment are recomputed

Gradients stay exact. With k loops in a segment, L loops keep L / k states beside the activations of k loops.
"""

import re
from typing import Any

from cognexis.decoder.recurrent_core import RecurrentCore
from cognexis.errors import InvalidConfigError

_LOOPS = re.compile(r"every_([1-9][0-9]{0,4})_loops")


def set_activation_checkpointing(
    model: Any, prelude: str = "none", recurrent: str = "none", coda: str = "none"
) -> dict[str, int]:
    """Switch recomputation on and off in every stage of ``model``, a Cognexis model of any kind.

    Returns:
        Stage -> modules that recompute; for the core the loops of a segment.

    Raises:
        InvalidConfigError: a stage other than the core counts in loops, or an unknown setting.
    """
    wanted = {"prelude": prelude, "recurrent": recurrent, "coda": coda}
    every = 1
    for stage, value in wanted.items():
        loops = _LOOPS.fullmatch(value)
        if loops and stage == "recurrent":
            every = int(loops[1])
        elif value not in ("none", "every_block"):
            allowed = "none, every_block" + (" or every_<k>_loops" if stage == "recurrent" else "; it has no loops")
            raise InvalidConfigError(
                f"activation_checkpointing.{stage}={value!r}: must be {allowed}",
                path=f"activation_checkpointing.{stage}",
                value=value,
            )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "every_k_loops": every})
    body = model.model if hasattr(model, "model") else model
    counts: dict[str, int] = {}
    for stage, value in wanted.items():
        modules = [m for m in getattr(body, stage).modules() if hasattr(m, "gradient_checkpointing")]
        for module in modules:
            module.gradient_checkpointing = value != "none" and (
                stage != "recurrent" or isinstance(module, RecurrentCore)
            )
        counts[stage] = sum(module.gradient_checkpointing for module in modules)
    return counts | ({"recurrent": every} if recurrent != "none" else {})
