"""Columns from patterns such as "AXMS"; ``pattern.py`` has the grammar, ``tokens.py`` the built-in symbols."""

from cognexis.cortex_layers.blocks.column.column import ColumnBlock
from cognexis.cortex_layers.blocks.column.pattern import CustomMap, caret_form, cut_pattern, expert_for_token
from cognexis.cortex_layers.config import ColumnBlockConfig, RouterConfig


def build_column_auto_config(
    *,
    d_hidden: int,
    pattern: str | None = None,
    router: RouterConfig | None = None,
    custom_map: CustomMap | None = None,
    use_axonlayers: bool = False,
) -> ColumnBlockConfig:
    """The configuration of a column with one expert per token.

    Args:
        d_hidden: width of the column; sizes inside follow from it when it is built.
        pattern: None means "AXMS".
        router: None means the defaults.
        custom_map: configurations by symbol; they win over registered tokens.
        use_axonlayers: put a caret on every token that has such a form.

    Raises:
        ValueError: the pattern has an unknown token, or a caret where there is no such form.
    """
    if d_hidden < 1:
        raise ValueError(f"d_hidden={d_hidden}: must be positive")
    tokens = cut_pattern(pattern, custom_map)
    if use_axonlayers:
        tokens = [caret_form(token, custom_map) for token in tokens]
    experts = [expert_for_token(token, custom_map) for token in tokens]
    return ColumnBlockConfig(
        experts=experts, router=RouterConfig() if router is None else router.model_copy(deep=True)
    )


def build_column_auto_block(
    *,
    d_hidden: int,
    pattern: str | None = None,
    router: RouterConfig | None = None,
    custom_map: CustomMap | None = None,
    use_axonlayers: bool = False,
) -> ColumnBlock:
    """The column itself; arguments as for :func:`build_column_auto_config`."""
    config = build_column_auto_config(
        d_hidden=d_hidden, pattern=pattern, router=router, custom_map=custom_map, use_axonlayers=use_axonlayers
    )
    return ColumnBlock(config=config, d_hidden=d_hidden)
