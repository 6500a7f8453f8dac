"""pydantic's findings in our words: the dotted name, the value, what is allowed, the nearest name."""

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cognexis.configuration_rules import nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError

_REASONS = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "needs at least {min_length} entries",
    "string_pattern_mismatch": "must match {pattern}",
}


def faults_of(error: ValidationError, root: type[BaseModel]) -> list[ConfigFault]:
    """Every finding of a validation error of ``root``."""
    return [fault for found in error.errors(include_url=False) for fault in _faults(found, root)]


def _faults(found: Any, root: type[BaseModel]) -> list[ConfigFault]:
    path, kind, value, context = dotted(found["loc"]), found["type"], found["input"], found.get("ctx") or {}
    cause = context.get("error")
    if isinstance(cause, InvalidConfigError):
        return [fault.below(path) if path else fault for fault in cause.faults]
    if kind == "missing":
        return [ConfigFault(path, reason=_REASONS[kind])]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        section = section_at(root, found["loc"][:-1])
        near = nearest_name(str(found["loc"][-1]), section.model_fields) if section else ""
        return [ConfigFault(path, reason=f"unknown key{near}")]
    if kind in ("model_type", "model_attributes_type"):
        return [ConfigFault(path, value, "must be a mapping of settings")]
    if kind == "literal_error":
        allowed = [str(x) for x in literals(root, found["loc"])]
        near = nearest_name(value, allowed) if isinstance(value, str) else ""
        return [ConfigFault(path, value, f"must be one of {', '.join(allowed) or context.get('expected')}{near}")]
    if kind == "value_error":
        return [ConfigFault(path, value, str(cause))]
    reason = _REASONS.get(kind)
    return [ConfigFault(path, value, reason.format(**context) if reason else found["msg"])]


def dotted(place: tuple[Any, ...]) -> str:
    """("a", "b", 2, "c") as "a.b[2].c"."""
    text = ""
    for part in place:
        part = "''" if part == "" else part
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def section_at(root: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section class that stands at ``place`` below ``root``."""
    section: type[BaseModel] | None = root
    for part in place:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = next(iter(sections_in(field.annotation)), None) if field else None
    return section


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Section classes that occur in a type: itself, in a union, or as the entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def literals(root: type[BaseModel], place: tuple[Any, ...]) -> list[Any]:
    """The values that the choice at ``place`` allows."""
    names = [part for part in place if not isinstance(part, int)]
    section = section_at(root, tuple(names[:-1]))
    field = section.model_fields.get(names[-1]) if section and names else None
    return [] if field is None else _choices(field.annotation)


def _choices(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for part in get_args(annotation):
        found += [part] if isinstance(part, str) else _choices(part)
    return found
