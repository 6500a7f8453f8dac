"""Changed copies of configurations: always validated anew, nested models stay models, arguments stay as they are."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from cognexis.cortex_layers.config import CellConfig

_Model = TypeVar("_Model", bound=BaseModel)
_TAGS = ("cell_type", "block_type")


def edited(config: _Model, **changes: Any) -> _Model:
    """A validated copy with some fields changed; only fields that are set, or changed here, count as set.

    Objects that a dump would leave out or turn into dicts (modules, nested models) are carried over as they are.

    Raises:
        ValidationError: the result breaks a rule of its class.
    """
    names = [*type(config).model_fields, *(config.model_extra or {})]
    values = {name: getattr(config, name) for name in names if name in config.model_fields_set}
    return type(config).model_validate(values | changes)


def apply_overrides(config: _Model, overrides: Sequence[BaseModel], matched: set[int] | None = None) -> _Model:
    """Merge overrides into every configuration of their type, at any depth.

    The fields that were explicitly set on an override win; all overrides that match apply, in order; what was merged
    is searched further. ``hidden_size`` of a cell and the tags stay, since builders decide them.

    Args:
        matched: receives the positions of the overrides that found something.
    """
    for position, override in enumerate(overrides):
        if isinstance(config, type(override)):
            config = _merged(config, override)
            if matched is not None:
                matched.add(position)
    changes: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            changes[name] = apply_overrides(value, overrides, matched)
        elif isinstance(value, list) and any(isinstance(item, BaseModel) for item in value):
            changes[name] = [
                apply_overrides(item, overrides, matched) if isinstance(item, BaseModel) else item for item in value
            ]
    return edited(config, **changes) if changes else config


def _merged(config: _Model, override: BaseModel) -> _Model:
    changes: dict[str, Any] = {}
    for name in override.model_fields_set:
        if name in _TAGS or (name == "hidden_size" and isinstance(config, CellConfig)):
            continue
        value, current = getattr(override, name), getattr(config, name, None)
        if isinstance(value, BaseModel):
            value = _merged(current, value) if isinstance(current, type(value)) else value.model_copy(deep=True)
        changes[name] = value
    return edited(config, **changes)
