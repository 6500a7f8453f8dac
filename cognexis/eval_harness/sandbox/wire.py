"""Plain values between two processes that do not trust each other: JSON with tags, each message after its length.

What is not plain stays where it is and travels as a number, behind which the other side finds the object again.
Nothing received is executed, and a value arrives as the built-in type that it is made of, whatever its class says
about equality. This file also runs inside the sandbox, so it uses the standard library only, and imports late what
few programs need.

    None, bool, float, str, int up to 63 bits     as they are
    list                                          [items]
    other built-in types                          {"t": name, "v": parts}
    any other object                              {"t": "object", "v": number}
"""

import json
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 200


class Disconnected(Exception):
    """The other side is gone."""


class TooLarge(Exception):
    """A message exceeds what was agreed."""


class Channel:
    """JSON values, one by one; ``limit`` is the most bytes of one message. A transport gives the two methods below."""

    limit: int

    def send_bytes(self, data: bytes) -> None:
        """Hand over one message."""
        raise NotImplementedError

    def receive_bytes(self) -> bytes:
        """Wait for one message of at most ``limit`` bytes."""
        raise NotImplementedError

    def send(self, message: Any) -> None:
        """Send one JSON value."""
        data = json.dumps(message).encode()
        if len(data) > self.limit:
            raise TooLarge(f"a message of {len(data)} bytes; at most {self.limit}")
        self.send_bytes(data)

    def receive(self) -> Any:
        """The next JSON value."""
        return json.loads(self.receive_bytes())


def encode(value: Any, keep: Callable[[Any], int], depth: int = 0) -> Any:
    """A JSON form of ``value``; ``keep`` takes an object that is not plain and returns its number."""
    if depth > MAX_DEPTH:
        raise RecursionError(f"a value nested more than {MAX_DEPTH} deep")

    def inner(part: Any) -> Any:
        return encode(part, keep, depth + 1)

    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__index__(value)
        return number if abs(number) < 2**63 else {"t": "int", "v": hex(number)}
    if isinstance(value, float):
        return float.__add__(value, 0.0) if value == value else {"t": "float", "v": "nan"}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [inner(part) for part in list.__iter__(value)]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[inner(key), inner(part)] for key, part in dict.items(value)]}
    bases: tuple[Any, ...] = (tuple, set, frozenset, deque)
    for base in bases:
        if isinstance(value, base):
            return {"t": base.__name__, "v": [inner(part) for part in base.__iter__(value)]}
    for kind, raw in (("bytes", bytes), ("bytearray", bytearray)):
        if isinstance(value, raw):
            return {"t": kind, "v": bytes(value).hex()}
    if type(value) is complex:
        return {"t": "complex", "v": [inner(value.real), inner(value.imag)]}
    if type(value) is range:
        return {"t": "range", "v": [inner(part) for part in (value.start, value.stop, value.step)]}
    if type(value) is getattr(sys.modules.get("decimal"), "Decimal", ()):
        return {"t": "Decimal", "v": str(value)}
    if type(value) is getattr(sys.modules.get("fractions"), "Fraction", ()):
        return {"t": "Fraction", "v": [inner(value.numerator), inner(value.denominator)]}
    return {"t": "object", "v": keep(value)}


_MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
}
_READERS: dict[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}


def decode(value: Any, find: Callable[[int], Any]) -> Any:
    """The value of a JSON form; ``find`` returns what stands for the object of a number."""
    if isinstance(value, list):
        return [decode(part, find) for part in value]
    if not isinstance(value, dict):
        return value
    kind, body = value["t"], value["v"]
    if kind == "object":
        return find(int(body))
    if kind == "dict":
        return {decode(key, find): decode(part, find) for key, part in body}
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(body)
    if kind == "Fraction":
        from fractions import Fraction

        return Fraction(*(decode(part, find) for part in body))
    if kind in _READERS:
        return _READERS[kind](body)
    return _MAKERS[kind]([decode(part, find) for part in body])
