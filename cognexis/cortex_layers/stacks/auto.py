"""Stacks of columns from patterns; ``blocks/column/pattern.py`` has the grammar."""

import logging
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from cognexis.cortex_layers.blocks.column.auto import build_column_auto_config
from cognexis.cortex_layers.blocks.column.pattern import CustomMap
from cognexis.cortex_layers.config import BlockConfig, CortexStackConfig, RouterConfig
from cognexis.cortex_layers.config_edits import apply_overrides
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.stacks.build import build_cortex

logger = logging.getLogger(__name__)


def build_cortex_auto_config(
    *,
    d_hidden: int,
    num_layers: int | None = None,
    pattern: str | Sequence[str | None] | None = "AXMS",
    custom_map: CustomMap | None = None,
    router: RouterConfig | None = None,
    post_norm: bool = True,
    compile_blocks: bool = False,
    override_global_configs: Iterable[BaseModel] | None = None,
    use_axonlayers: bool = False,
) -> CortexStackConfig:
    """The configuration of a stack of columns.

    Args:
        num_layers: None means as many as there are patterns in a list, and 2 for a single pattern.
        pattern: one pattern for all layers, or a list with one per layer.
        custom_map: configurations by symbol; they win over registered tokens.
        router: for every column.
        override_global_configs: the fields that are set on each of these go into every configuration of its type
            (or a type derived from it), in order.
        use_axonlayers: put a caret on every token that has such a form.

    Raises:
        ValueError: a pattern cannot be read, or there are not ``num_layers`` of them.
    """
    if pattern is None or isinstance(pattern, str):
        layers: list[str | None] = [pattern] * (2 if num_layers is None else num_layers)
    else:
        layers = list(pattern)
    if not layers or (num_layers is not None and len(layers) != num_layers):
        raise ValueError(f"num_layers={num_layers}: there are {len(layers)} patterns, and at least one is needed")
    overrides = list(override_global_configs or ())
    for override in overrides:
        if not isinstance(override, BaseModel):
            raise TypeError(f"override_global_configs: {override!r} is no configuration")
    matched: set[int] = set()
    columns: list[BlockConfig] = [
        build_column_auto_config(
            d_hidden=d_hidden, pattern=layer, router=router, custom_map=custom_map, use_axonlayers=use_axonlayers
        )
        for layer in layers
    ]
    columns = [apply_overrides(column, overrides, matched) for column in columns]
    for position, override in enumerate(overrides):
        if position not in matched:
            logger.warning("override_global_configs: there is no %s to override", type(override).__name__)
    return CortexStackConfig(d_hidden=d_hidden, blocks=columns, post_norm=post_norm, compile_blocks=compile_blocks)


def build_cortex_auto_stack(
    *,
    d_hidden: int,
    num_layers: int | None = None,
    pattern: str | Sequence[str | None] | None = "AXMS",
    custom_map: CustomMap | None = None,
    router: RouterConfig | None = None,
    post_norm: bool = True,
    compile_blocks: bool = False,
    override_global_configs: Iterable[BaseModel] | None = None,
    use_axonlayers: bool = False,
) -> CortexStack:
    """The stack itself; arguments as for :func:`build_cortex_auto_config`, but 4 layers for a single pattern."""
    if num_layers is None and (pattern is None or isinstance(pattern, str)):
        num_layers = 4
    config = build_cortex_auto_config(
        d_hidden=d_hidden,
        num_layers=num_layers,
        pattern=pattern,
        custom_map=custom_map,
        router=router,
        post_norm=post_norm,
        compile_blocks=compile_blocks,
        override_global_configs=override_global_configs,
        use_axonlayers=use_axonlayers,
    )
    return build_cortex(config)
