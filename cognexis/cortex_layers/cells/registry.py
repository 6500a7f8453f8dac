"""Which class a cell configuration builds.

The cells of the package are entered by ``cognexis.cortex_layers.cells``; a cell of your own with the decorator:

    class MyCellConfig(CellConfig):
        cell_type: str = "mine"  # may be left out: then "my", the class name without CellConfig

    @register_cell(MyCellConfig)
    class MyCell(MemoryCell): ...
"""

from collections.abc import Callable
from typing import TypeVar

from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import CellConfig, get_registered_cell_config, register_config

_CELL_CLASSES: dict[type[CellConfig], type[MemoryCell]] = {}

CellClass = TypeVar("CellClass", bound=type[MemoryCell])


def register_cell(config_class: type[CellConfig], *, override: bool = False) -> Callable[[CellClass], CellClass]:
    """A class decorator: configurations of ``config_class``, also as JSON with its tag, build the decorated cell.

    Raises:
        ValueError: the configuration belongs to another cell already (unless ``override``), or its tag to another
            configuration.
        TypeError: the decorated class is no ``MemoryCell``.
    """

    def register(cell_class: CellClass) -> CellClass:
        if not (isinstance(cell_class, type) and issubclass(cell_class, MemoryCell)):
            raise TypeError(f"{cell_class!r} is registered as a cell, but is no subclass of MemoryCell")
        known = _CELL_CLASSES.get(config_class)
        same = known is not None and (known.__module__, known.__qualname__) == (
            cell_class.__module__,
            cell_class.__qualname__,
        )
        if known is not None and not same and not override:
            raise ValueError(
                f"{config_class.__name__} builds {known.__name__} already; override=True makes it build "
                f"{cell_class.__name__}"
            )
        register_config(config_class)
        _CELL_CLASSES[config_class] = cell_class
        return cell_class

    return register


def get_cell_class(cfg: CellConfig) -> type[MemoryCell]:
    """The class that ``cfg`` builds.

    Raises:
        ValueError: no cell is registered for exactly this configuration class.
    """
    if type(cfg) not in _CELL_CLASSES:
        known = ", ".join(sorted(config.__name__ for config in _CELL_CLASSES))
        raise ValueError(f"no cell is registered for {type(cfg).__name__}; known: {known}")
    return _CELL_CLASSES[type(cfg)]


def get_cell_config_class(cell_type: str) -> type[CellConfig]:
    """The configuration class of a tag.

    Raises:
        ValueError: no configuration has the tag.
    """
    return get_registered_cell_config(cell_type)


def build_cell(cfg: CellConfig) -> MemoryCell:
    """Build the cell of a configuration; its ``hidden_size`` must be set."""
    return get_cell_class(cfg)(cfg)  # type: ignore[arg-type]


__all__ = ["build_cell", "get_cell_class", "get_cell_config_class", "register_cell"]
