"""Expert tokens: short symbols, each with a function that makes the configuration of a block.

A symbol may end in one caret, which asks for the variant with Axon projections: ``M`` and ``M^`` are two
registrations. The built-in symbols are in ``tokens.py``.
"""

import re
from collections.abc import Callable
from typing import TypeVar

from cognexis.cortex_layers.config import BlockConfig

TokenBuilder = Callable[[], BlockConfig]
_Builder = TypeVar("_Builder", bound=TokenBuilder)
_TOKENS: dict[str, TokenBuilder] = {}


def register_token(symbol: str, *, override: bool = False) -> Callable[[_Builder], _Builder]:
    """Make a symbol known in patterns; decorates a function without arguments that returns a block configuration.

    Args:
        symbol: without white space and commas; a caret only at the end.
        override: replace another builder of this symbol.

    Raises:
        ValueError: the symbol cannot stand in a pattern, or another builder has it.
    """
    if not re.fullmatch(r"[^\s,^]+\^?", symbol):
        raise ValueError(f"token {symbol!r}: must have no white space or comma, and a caret only at the end")

    def decorate(builder: _Builder) -> _Builder:
        known = _TOKENS.get(symbol)
        if known is not None and not override and _origin(known) != _origin(builder):
            raise ValueError(f"token {symbol!r} is taken by {'.'.join(_origin(known))}; override=True replaces it")
        _TOKENS[symbol] = builder
        return builder

    return decorate


def _origin(builder: TokenBuilder) -> tuple[str, str]:
    return getattr(builder, "__module__", ""), getattr(builder, "__qualname__", repr(builder))


def block_config_for_token(token: str) -> BlockConfig | None:
    """A new configuration for a registered token; None if nobody registered it.

    Raises:
        ValueError: the base is registered and its caret form is not.
    """
    if token in _TOKENS:
        return _TOKENS[token]()
    if token.endswith("^") and token[:-1] in _TOKENS:
        carets = sorted(known for known in _TOKENS if known.endswith("^"))
        raise ValueError(f"token {token!r}: {token[:-1]!r} has no caret form; those that have: {', '.join(carets)}")
    return None


def can_use_caret(base: str) -> bool:
    """Whether ``base`` has a registered caret form."""
    return f"{base}^" in _TOKENS


def get_registered_tokens() -> tuple[str, ...]:
    """All symbols as they were registered."""
    return tuple(_TOKENS)


def get_single_char_symbols() -> tuple[str, ...]:
    """The symbols of one letter, without carets."""
    bases = (token.removesuffix("^") for token in _TOKENS)
    return tuple(dict.fromkeys(base for base in bases if len(base) == 1))
