"""The settings of a run configuration as the rows of the documentation."""

from typing import Any, get_args

from pydantic import BaseModel

from cognexis.artifacts.run_config.faults import literals, section_at
from cognexis.artifacts.run_config.model_section import ModelSection
from cognexis.artifacts.run_config.run_config import SECTIONS, RunConfig, _plain

_OWN_RANGES = {
    "training.precision.loss_scale": "`dynamic`, `none`, a number above 0",
    "training.loop_curriculum.milestones": "step to loops, ascending",
    **{
        f"training.activation_checkpointing.{stage}": "`none`, `every_block`, `every_<k>_loops`"
        for stage in ("prelude", "recurrent", "coda")
    },
}
_TYPES = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}


def field_rows(section: str) -> list[tuple[str, str, str, str]]:
    """Rows (path below the section, default, range, meaning) of every setting of ``section``."""
    model: Any = section_at(RunConfig, (section,))
    return list(_rows(model, section, ""))


def field_table(section: str) -> str:
    """The rows of a section as a Markdown table."""
    lines = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | `{default}` | {span} | {text} |" for name, default, span, text in field_rows(section)]
    return "\n".join(lines)


def field_tables() -> dict[str, str]:
    """The table of each section; that of ``model`` holds only what CognexisConfig does not have."""
    return {section: field_table(section) for section in SECTIONS}


def _rows(model: type[BaseModel], section: str, prefix: str) -> Any:
    for name, field in model.model_fields.items():
        inner = section_at(model, (name,))
        is_list = "tuple" in str(field.annotation)
        if inner is not None and inner is not ModelSection and not is_list:
            yield from _rows(inner, section, f"{prefix}{name}.")
            continue
        default = _yaml_word(field.get_default(call_default_factory=True))
        path = f"{section}.{prefix}{name}"
        yield f"{prefix}{name}", default, _OWN_RANGES.get(path) or _span(model, name, field), field.description or ""


def _yaml_word(value: Any) -> str:
    value = _plain(value, only_given=False)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml_word, value))}]"
    return "{}" if value == {} else str(value)


def _span(model: type[BaseModel], name: str, field: Any) -> str:
    choices = literals(model, (name,))
    optional = type(None) in get_args(field.annotation)
    if choices:
        words = ", ".join(f"`{choice}`" for choice in choices)
        words = f"list of {words}" if "tuple" in str(field.annotation) else words
    else:
        words = _bounds(field)
    return f"{words}, `null`" if optional else words


def _bounds(field: Any) -> str:
    kind = _kind(field.annotation)
    limits: dict[str, float] = {}
    for item in [*field.metadata, *_metadata(field.annotation)]:
        limits |= {k: getattr(item, k) for k in ("gt", "ge", "lt", "le") if getattr(item, k, None) is not None}
        for inner in getattr(item, "metadata", ()):
            limits |= {k: getattr(inner, k) for k in ("gt", "ge", "lt", "le") if getattr(inner, k, None) is not None}
    words = [f"{text} {limits[k]:g}" for k, text in (("gt", "above"), ("lt", "below")) if k in limits]
    low, high = limits.get("ge"), limits.get("le")
    if low is not None and high is not None and high < 2**31 - 1:
        words.append(f"{low:g} to {int(high) if high > 99 else format(high, 'g')}")
    elif low is not None:
        words.append(f"{low:g} or more")
    elif high is not None:
        words.append(f"at most {high:g}")
    base = _TYPES.get(kind, "list")
    if "tuple" in str(field.annotation):
        base = "list" if kind is None or kind is str else f"list of {base}s"
    return " ".join([base, *([" and ".join(words)] if words else [])])


def _kind(annotation: Any) -> Any:
    if annotation in _TYPES:
        return annotation
    kinds = [kind for part in get_args(annotation) if (kind := _kind(part))]
    return kinds[0] if kinds else None


def _metadata(annotation: Any) -> list[Any]:
    found = list(getattr(annotation, "__metadata__", ()))
    return found + [item for part in get_args(annotation) for item in _metadata(part)]
