"""Finds what must not be in untrusted text: control strings, and code points that are no text.

A tokenizer recognises a control string such as ``<|end|>`` wherever it stands. In text from outside it is a fault
(``raise``) or just letters (``text``); an error names the token and never what stands around it.
"""

import re
from collections.abc import Iterable
from typing import Any

from cognexis.errors import InvalidConfigError, TokenizerError

ON_CONTROL = ("text", "raise")


class ControlGuard:
    """The control strings of one tokenizer as one pattern; longer ones come first.

    Args:
        reserved: the control strings.
    """

    def __init__(self, reserved: Iterable[str]) -> None:
        self.reserved = tuple(sorted(set(reserved), key=lambda token: (-len(token), token)))
        self.pattern = re.compile("|".join(map(re.escape, self.reserved)) or "(?!)")

    def find(self, text: str) -> str | None:
        """The first control string in ``text``; None if there is none."""
        match = self.pattern.search(text)
        return match[0] if match else None

    def refuse(self, text: str, remedy: str) -> None:
        """Raise where ``text`` holds a control string.

        Raises:
            TokenizerError: names the token, then ``remedy``.
        """
        if token := self.find(text):
            raise TokenizerError(f"the text holds the control token {token}; {remedy}")


def check_on_control(value: str) -> None:
    """Raise InvalidConfigError unless ``value`` is one of :data:`ON_CONTROL`."""
    if value not in ON_CONTROL:
        raise InvalidConfigError(
            f"on_control={value!r}: must be one of {', '.join(ON_CONTROL)}", path="on_control", value=value
        )


def check_text(text: Any, max_characters: int | None = None) -> None:
    """Check that ``text`` is a string that UTF-8 can express, and not too long.

    Raises:
        TokenizerError: another type, more than ``max_characters`` characters, or a lone surrogate.
    """
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a string, got {type(text).__name__}")
    if max_characters is not None and len(text) > max_characters:
        raise TokenizerError(f"the text has {len(text)} characters, at most {max_characters} are allowed")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds a lone surrogate (U+{ord(text[error.start]):04X} at character {error.start}), "
                "which is no Unicode text; decode the bytes with errors='replace' first"
            ) from None


def strings_in(value: Any) -> Iterable[str]:
    """Every string in nested dictionaries and lists, keys included."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, str):
            yield current
        elif isinstance(current, dict):
            waiting += current.keys()
            waiting += current.values()
        elif isinstance(current, list | tuple):
            waiting += current
