"""The error classes of cognexis.

Every fault a user can meet is one of these classes. Each has a stable ``code`` for logs and servers, and is also
a built-in exception (ValueError, RuntimeError, ...), so that callers who know nothing of cognexis still catch it.
A message names the field, the value it got and what is allowed.
"""

from collections.abc import Sequence
from typing import Any

_NOT_GIVEN: Any = object()
_SHOWN_CHARACTERS = 500


class CognexisError(Exception):
    """Base of all cognexis errors."""

    code = "cognexis_error"


class ConfigFault(str):
    """One broken rule: the sentence "path=value: reason", with its parts as attributes.

    Args:
        path: dotted name of the setting.
        value: what was given; left out where the setting itself is the fault, as with an unknown name.
        reason: what is wrong, and what is allowed.
    """

    path: str
    value: Any
    reason: str

    def __new__(cls, path: str, value: Any = _NOT_GIVEN, reason: str = "") -> "ConfigFault":
        given = "" if value is _NOT_GIVEN else f"={_shown(value)}"
        text = f"{path}{given}: {reason}" if path else reason
        return cls._of(text, path, None if value is _NOT_GIVEN else value, reason)

    @classmethod
    def _of(cls, text: str, path: str, value: Any, reason: str) -> "ConfigFault":
        fault = super().__new__(cls, text)
        fault.path, fault.value, fault.reason = path, value, reason
        return fault

    def __reduce__(self) -> Any:
        return ConfigFault._of, (str(self), self.path, self.value, self.reason)

    def below(self, prefix: str) -> "ConfigFault":
        """The same fault of a setting that stands inside ``prefix``."""
        return self._of(f"{prefix}.{self}", f"{prefix}.{self.path}", self.value, self.reason)


def _shown(value: Any) -> str:
    """``repr`` that neither fails nor fills the screen: an integer of 5,000 digits has no decimal text."""
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


class InvalidConfigError(CognexisError, ValueError):
    """A setting is missing, contradictory or out of range.

    Args:
        message: the sentence for the user; with several faults it lists every one.
        path: dotted name of the setting; that of the first fault when there are several.
        value: the value that was given.
        reason: what is wrong with it, without the name and the value.
        faults: every fault found; without it the list holds the one that the other arguments describe.
    """

    code = "invalid_config"

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        value: Any = None,
        reason: str | None = None,
        faults: Sequence[ConfigFault] = (),
    ) -> None:
        super().__init__(message)
        self.faults = list(faults) or [ConfigFault(path or "", value, reason or message)]
        self.path = self.faults[0].path if faults else path
        self.value = self.faults[0].value if faults else value
        self.reason = self.faults[0].reason if faults else reason


class UnsafeOverrideError(InvalidConfigError):
    """A setting that is fixed by a checkpoint, or that protects users, was to be changed at run time."""

    code = "unsafe_override"


class ShapeMismatchError(CognexisError, ValueError):
    """A tensor does not have the shape that its name promises; carries ``expected`` and ``actual``."""

    code = "shape_mismatch"

    def __init__(self, message: str, *, expected: Any = None, actual: Any = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class TokenizerError(CognexisError, ValueError):
    """Text or a tokenizer artifact cannot be used."""

    code = "tokenizer"


class InvalidTokenIdError(CognexisError, ValueError, IndexError):
    """A token id lies outside the vocabulary; carries ``token_id``."""

    code = "invalid_token_id"

    def __init__(self, message: str, *, token_id: int | None = None) -> None:
        super().__init__(message)
        self.token_id = token_id


class BackendError(CognexisError, RuntimeError):
    """The computation itself failed."""

    code = "backend"


class NonFiniteError(BackendError):
    """NaN or infinity in a hidden state, the logits or the loss."""

    code = "non_finite"


class CacheError(BackendError):
    """A key/value cache is used in a way that would give wrong results."""

    code = "cache"


class CheckpointError(BackendError):
    """A checkpoint is incomplete, damaged or of another architecture."""

    code = "checkpoint"


class ArtifactMismatchError(InvalidConfigError):
    """Two artifacts that belong together do not match (tokenizer and model, manifest and file)."""

    code = "artifact_mismatch"


class BudgetExceededError(CognexisError, RuntimeError):
    """A request would exceed its compute budget and nothing can be returned."""

    code = "budget_exceeded"


class SafetyError(CognexisError, RuntimeError):
    """A policy refused the request."""

    code = "safety"


class CancelledError(CognexisError, RuntimeError):
    """The caller cancelled the request."""

    code = "cancelled"
