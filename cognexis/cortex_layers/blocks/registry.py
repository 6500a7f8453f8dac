"""Which class builds a block from its configuration."""

from collections.abc import Callable
from typing import TypeVar

from cognexis.cortex_layers.blocks.base import BaseBlock
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.cells.registry import build_cell
from cognexis.cortex_layers.config import _BLOCKS, BlockConfig, register_config
from cognexis.cortex_layers.config_edits import edited

_BLOCK_CLASSES: dict[type[BlockConfig], type[BaseBlock]] = {}
_Block = TypeVar("_Block", bound=type[BaseBlock])


def register_block(config_class: type[BlockConfig], *, override: bool = False) -> Callable[[_Block], _Block]:
    """Decorate a block class: it is what builds blocks of ``config_class``, in Python and from JSON.

    ``config_class`` may leave out the default of ``block_type``; then the tag is derived from its name.

    Raises:
        ValueError: the configuration belongs to another block already (unless ``override``), or its tag to another
            configuration.
        TypeError: the decorated class is no ``BaseBlock``.
    """

    def decorate(block_class: _Block) -> _Block:
        if not (isinstance(block_class, type) and issubclass(block_class, BaseBlock)):
            raise TypeError(f"{block_class!r} is registered as a block, but is no subclass of BaseBlock")
        known = _BLOCK_CLASSES.get(config_class)
        names = [(each.__module__, each.__qualname__) for each in (known, block_class) if each is not None]
        if len(set(names)) > 1 and not override:
            raise ValueError(
                f"{config_class.__name__} builds {names[0][1]} already; override=True makes it build {names[1][1]}"
            )
        register_config(config_class)
        _BLOCK_CLASSES[config_class] = block_class
        return block_class

    return decorate


def get_block_class(config: BlockConfig) -> type[BaseBlock]:
    """The class registered for the configuration's type, or for the nearest of its base classes.

    Raises:
        ValueError: there is none.
    """
    for config_class in type(config).__mro__:
        if config_class in _BLOCK_CLASSES:
            return _BLOCK_CLASSES[config_class]
    raise ValueError(f"no block is registered for {type(config).__name__}; decorate one with @register_block")


def get_block_config_class(tag: str) -> type[BlockConfig]:
    """The configuration class with this ``block_type``.

    Raises:
        ValueError: there is none.
    """
    if tag not in _BLOCKS:
        raise ValueError(f"block_type={tag!r}: must be one of {', '.join(sorted(_BLOCKS))}")
    return _BLOCKS[tag]


def build_block(config: BlockConfig, d_hidden: int, cell: MemoryCell | None = None) -> BaseBlock:
    """Build a block around a cell that fits it; adapters and columns build their own and take None."""
    return get_block_class(config)(config=config, d_hidden=d_hidden, cell=cell)  # type: ignore[call-arg]


def build_block_at_width(config: BlockConfig, d_hidden: int) -> BaseBlock:
    """Build a block and its cell; the cell's ``hidden_size`` follows from the block, whatever it was."""
    if config.cell is None:
        return build_block(config, d_hidden, None)
    cell_config = edited(config.cell, hidden_size=config.get_cell_hidden_size(d_hidden))
    return build_block(config, d_hidden, build_cell(cell_config))
