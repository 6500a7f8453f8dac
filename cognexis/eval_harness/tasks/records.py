"""Examples from JSONL: strict JSON objects, one per line, with the fields that a task names.

Evaluation data are not repaired: a damaged line, a field too many or too few, a wrong type, two examples of one id, or
a file without examples ends the evaluation before anything is measured, and the message names the line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError

_IGNORED = ("source", "licence")


def read_records(path: Path, required: Mapping[str, type], optional: Mapping[str, type]) -> list[dict[str, Any]]:
    """The records of a file, each with an ``id``; where it has none, that is the number of its line.

    Args:
        required: field -> type.
        optional: likewise; ``id`` (text), ``source`` and ``licence`` (ignored) are always allowed.

    Raises:
        InvalidConfigError: the file is missing, empty or damaged; names the line.
    """
    if not path.is_file():
        raise InvalidConfigError(f"path={str(path)!r}: no such file", path="path", value=str(path))
    known = {**required, **optional, "id": str, **dict.fromkeys(_IGNORED, str)}
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue

        def refuse(reason: str, number: int = number) -> NoReturn:
            raise InvalidConfigError(f"{path}: line {number}: {reason}", path=f"line {number}")

        record = parse_strict_json(line, refuse)
        if not isinstance(record, dict):
            refuse("must be an object")
        for name, value in record.items():
            if name not in known:
                refuse(f"unknown field {name!r}{nearest_name(name, known)}; known are {', '.join(known)}")
            if type(value) is not known[name]:
                refuse(f"{name}={value!r}: must be of type {_TYPE_NAMES[known[name]]}")
        if missing := [name for name in required if name not in record]:
            refuse(f"the field {missing[0]!r} is missing")
        name = record.setdefault("id", str(number))
        if name in records:
            refuse(f"id={name!r}: another example has it")
        records[name] = record
    if not records:
        raise InvalidConfigError(f"{path}: holds no examples", path="path", value=str(path))
    return list(records.values())


_TYPE_NAMES = {str: "text", int: "whole number", list: "list", bool: "true or false"}


def text_list(record: Mapping[str, Any], field: str, path: Path, least: int = 1) -> tuple[str, ...]:
    """A field as texts.

    Raises:
        InvalidConfigError: it is no list of ``least`` or more texts.
    """
    values = record[field]
    if len(values) < least or not all(isinstance(value, str) and value for value in values):
        raise InvalidConfigError(
            f"{path}: example {record['id']!r}: {field}={values!r}: must be a list of {least} or more texts"
        )
    return tuple(values)
