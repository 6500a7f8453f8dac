"""Compilation of a model by parts, so that one set of graphs serves every loop count.

``torch.compile(model)`` unrolls the loops: each loop count is compiled anew (tens of seconds), and past
``torch._dynamo.config.recompile_limit`` of them torch runs the others without compiling. Here a block of the prelude
or the coda is compiled by itself, and one application of the core, which every loop calls. What stands between them
stays eager, so hooks that observe the loops compile nothing anew.
"""

from typing import Any

from cognexis.decoder.block import TransformerBlock


def compile_for_training(model: Any, **options: Any) -> int:
    """Compile the attention blocks and the core of a Cognexis model, in place; memory cells stay as they are.

    Outside training, the core runs as it is.

    Args:
        model: a Cognexis model of any kind.
        options: keywords of ``torch.compile``.

    Returns:
        The number of compiled parts.
    """
    body = model.model if hasattr(model, "model") else model
    core = body.recurrent
    parts: list[Any] = [m for m in body.modules() if isinstance(m, TransformerBlock)]
    if all(isinstance(block, TransformerBlock) for block in core.blocks):
        parts = [part for part in parts if part not in list(core.blocks)]
        core.compile_loop(**options)
        count = 1
    else:
        count = 0
    for part in parts:
        part.compile(**options)
    return len(parts) + count
