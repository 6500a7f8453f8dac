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
    blocks: list[Any] = [module for module in body.modules() if isinstance(module, TransformerBlock)]
    compiles_core = all(isinstance(block, TransformerBlock) for block in core.blocks)
    if compiles_core:
        core.compile_loop(**options)
        blocks = [block for block in blocks if block not in list(core.blocks)]
    for block in blocks:
        block.compile(**options)
    return len(blocks) + compiles_core
