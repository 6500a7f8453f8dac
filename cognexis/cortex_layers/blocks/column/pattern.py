"""The grammar of expert patterns.

    pattern = words, separated by white space or commas
    word    = tokens one after another, cut greedily: the longest known symbol first
    token   = symbol, or symbol^ for its form with Axon projections

Known are the registered symbols and those of ``custom_map``; upper and lower case differ. "AXMSLC Ag", "Y X^ Q" and
"M^X^S^" are patterns. A caret after a symbol that has no such form is an error, as is a second caret.
"""

import copy
from collections.abc import Mapping

from cognexis.cortex_layers.config import (
    AdapterBlockConfig,
    BlockConfig,
    CellConfig,
    XLCellConfig,
    mLSTMCellConfig,
    sLSTMCellConfig,
)
from cognexis.cortex_layers.config_edits import edited
from cognexis.cortex_layers.registry import block_config_for_token, can_use_caret, get_registered_tokens
from cognexis.cortex_layers.tokens import BUILT_IN_TOKENS as _BUILT_IN_TOKENS  # noqa: F401 (registers them)

CustomMap = Mapping[str, BlockConfig]
# What a caret switches on in a configuration that a caller brought.
_AXON_FLAGS: dict[type[CellConfig], tuple[str, ...]] = {
    mLSTMCellConfig: ("use_axon_layer", "use_axon_qkv"),
    sLSTMCellConfig: ("use_axon_layer",),
    XLCellConfig: ("use_axon_qkv",),
}


def cut_pattern(pattern: str | None, custom_map: CustomMap | None = None) -> list[str]:
    """The tokens of a pattern; None and "" mean "AXMS".

    Raises:
        ValueError: no tokens, or something unknown; names the position.
    """
    pattern = pattern or "AXMS"
    known = {token.removesuffix("^") for token in (*get_registered_tokens(), *(custom_map or {}))}
    symbols = sorted(known, key=len, reverse=True)
    tokens, position = [], 0
    while position < len(pattern):
        if pattern[position].isspace() or pattern[position] == ",":
            position += 1
            continue
        symbol = next((symbol for symbol in symbols if pattern.startswith(symbol, position)), None)
        if symbol is None:
            raise ValueError(
                f"pattern {pattern!r}: unknown token at position {position} ({pattern[position:]!r}); "
                f"known are {', '.join(sorted(known))}"
            )
        token = symbol + "^" * pattern.startswith("^", position + len(symbol))
        tokens.append(token)
        position += len(token)
    if not tokens:
        raise ValueError(f"pattern {pattern!r}: has no experts")
    return tokens


def expert_for_token(token: str, custom_map: CustomMap | None = None) -> BlockConfig:
    """A configuration of its own for one token.

    Raises:
        ValueError: the token is unknown, or its caret has no meaning.
    """
    custom = custom_map or {}
    base = token.removesuffix("^")
    if token in custom:
        return copy.deepcopy(custom[token])
    if base in custom:
        return with_axon_layers(copy.deepcopy(custom[base]), token)
    config = block_config_for_token(token)
    if config is None:
        raise ValueError(f"token {token!r}: must be one of {', '.join(sorted({*get_registered_tokens(), *custom}))}")
    return copy.deepcopy(config)


def caret_form(token: str, custom_map: CustomMap | None = None) -> str:
    """The token with a caret where that has a meaning, else the token."""
    custom = custom_map or {}
    if token.endswith("^") or token not in custom:
        return f"{token}^" if not token.endswith("^") and can_use_caret(token) else token
    supported = f"{token}^" in custom or _axon_flags(custom[token]) is not None
    return f"{token}^" if supported else token


def with_axon_layers(config: BlockConfig, token: str) -> BlockConfig:
    """The configuration with Axon projections in its cell.

    Raises:
        ValueError: the cell has none.
    """
    if isinstance(config, AdapterBlockConfig) and config.cell is None:
        return edited(config, base_block=with_axon_layers(config.base_block, token))
    flags = _axon_flags(config)
    if flags is None or config.cell is None:
        carets = ", ".join(sorted(known for known in get_registered_tokens() if known.endswith("^")))
        raise ValueError(f"token {token!r}: its cell has no Axon projections; mLSTM, XL and sLSTM have ({carets})")
    return edited(config, cell=edited(config.cell, **dict.fromkeys(flags, True)))


def _axon_flags(config: BlockConfig) -> tuple[str, ...] | None:
    if isinstance(config, AdapterBlockConfig) and config.cell is None:
        return _axon_flags(config.base_block)
    matching = [flags for cell_class, flags in _AXON_FLAGS.items() if isinstance(config.cell, cell_class)]
    return matching[0] if matching else None
