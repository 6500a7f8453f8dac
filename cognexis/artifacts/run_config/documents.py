"""Reading YAML and JSON that nobody vouches for into plain dictionaries.

YAML is read as its version 1.2 reads scalars, so that both formats agree: ``1e-4`` is a number, and only ``true``
and ``false`` are booleans (``on``, ``yes``, ``0o17``, ``1:30`` and dates stay text). Nothing is ever constructed but
dictionaries, lists, text, numbers, booleans and null.

Refused with the place of the fault, before anything large is built: more than ``MAX_BYTES`` or ``MAX_NODES``, nesting
beyond ``MAX_DEPTH``, anchors, aliases and tags, a key given twice or no text, several documents in one file, bytes
that are not UTF-8, numbers that are not finite. A byte order mark at the start is skipped, as some editors write it.
"""

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from cognexis.checkpoints.json_file import MAX_DEPTH
from cognexis.configuration_rules import parse_json
from cognexis.errors import ConfigFault, InvalidConfigError

MAX_BYTES = 256 * 2**10
MAX_NODES = 50_000
_BOM = b"\xef\xbb\xbf"
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def read_document(source: str | bytes | Path) -> dict[str, Any]:
    """Read a file (a path), or parse text.

    A string is taken for text if it holds a line break, a brace or a colon followed by a blank; otherwise it is a
    path. Files ending in ``.yaml`` or ``.yml`` are YAML, other files JSON; text is JSON if it begins with a brace.

    Raises:
        InvalidConfigError: the file is missing, or the document breaks a rule of this module.
    """
    if isinstance(source, Path) or (isinstance(source, str) and not re.search(r"[\n{]|:\s|:$", source)):
        return _read_file(Path(source))
    data = _utf8(source, "text") if isinstance(source, str) else bytes(source)
    return parse_document(data, is_yaml=not data.removeprefix(_BOM).lstrip().startswith(b"{"), name="text")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            fault = ConfigFault(str(path), reason="no such file")
            raise InvalidConfigError(fault, faults=[fault])
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        if isinstance(error, InvalidConfigError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidConfigError(f"{path}: cannot be read: {reason}", path=str(path), reason=reason) from error
    return parse_document(data, is_yaml=path.suffix.lower() in (".yaml", ".yml"), name=path.name)


def parse_document(data: bytes, *, is_yaml: bool, name: str) -> dict[str, Any]:
    """Parse one mapping; ``name`` stands in the messages."""
    data = data.removeprefix(_BOM)
    if not is_yaml:
        return parse_json(data, name, MAX_BYTES)
    value = _parse_yaml(data, name)
    if not isinstance(value, dict):
        _refuse(name, f"must hold a mapping of sections, got {type(value).__name__}")
    return value


def parse_value(text: str, name: str) -> Any:
    """Parse one value as it would stand in a YAML file."""
    return _parse_yaml(_utf8(text, name), name)


def _refuse(name: str, reason: str) -> NoReturn:
    raise InvalidConfigError(f"{name}: {reason}", path=name, reason=reason)


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        _refuse(name, f"not UTF-8: {error.reason} at character {error.start}")


def _parse_yaml(data: bytes, name: str) -> Any:
    if len(data) > MAX_BYTES:
        _refuse(name, f"larger than {MAX_BYTES} bytes")
    try:
        return _TreeBuilder(name).build(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse(name, f"not UTF-8: {error.reason} at byte {error.start}")
    except yaml.YAMLError as error:
        _refuse(name, "not valid YAML: " + " ".join(str(error).split()))


class _TreeBuilder:
    """Builds values from the parser's events with a list as stack, so that no depth can exhaust Python's own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stack: list[tuple[Any, list[str]]] = []  # open containers, each with the key that waits for its value
        self.result: Any = None
        self.nodes = 0

    def build(self, text: str) -> Any:
        documents = 0
        for event in yaml.parse(text, Loader=_YAML_LOADER):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.refuse(event, "one file holds one document")
            elif isinstance(event, yaml.AliasEvent):
                self.refuse(event, "aliases are not supported")
            elif isinstance(event, yaml.NodeEvent):
                self.open_node(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                self.stack.pop()
        return self.result

    def open_node(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.refuse(event, f"more than {MAX_NODES} values")
        if event.anchor is not None:
            self.refuse(event, "anchors are not supported")
        if event.tag is not None:
            self.refuse(event, "tags are not supported")
        if isinstance(event, yaml.ScalarEvent):
            parent, key = self.stack[-1] if self.stack else (None, [])
            waits_for_key = isinstance(parent, dict) and not key
            self.place(event, event.value if waits_for_key else self.scalar(event))
            return
        container: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.place(event, container)
        self.stack.append((container, []))
        if len(self.stack) > MAX_DEPTH:
            self.refuse(event, f"nested more than {MAX_DEPTH} deep")

    def place(self, event: Any, value: Any) -> None:
        if not self.stack:
            self.result = value
            return
        parent, key = self.stack[-1]
        if isinstance(parent, list):
            parent.append(value)
        elif key:
            parent[key.pop()] = value
        elif not isinstance(value, str):
            self.refuse(event, "a key must be text")
        elif value in parent:
            self.refuse(event, f"the key {value[:100]!r} is given twice")
        else:
            key.append(value)

    def scalar(self, event: Any) -> Any:
        text = event.value
        if event.style:  # quoted
            return text
        if text in _WORDS:
            return _WORDS[text]
        try:
            if _INTEGER.fullmatch(text):
                return int(text)
            number = float(text) if _FLOAT.fullmatch(text) else None
        except ValueError as error:  # thousands of digits
            self.refuse(event, str(error))
        if _NOT_FINITE.fullmatch(text) or (number is not None and not math.isfinite(number)):
            self.refuse(event, f"the number {text[:40]} is not finite")
        return text if number is None else number

    def refuse(self, event: Any, reason: str) -> NoReturn:
        _refuse(self.name, f"line {event.start_mark.line + 1}: {reason}")


class _Dumper(yaml.SafeDumper):
    """Writes what this module reads back as the same value: text that looks like a number or a word is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def yaml_text(document: dict[str, Any]) -> str:
    """The document as YAML, keys in the given order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
