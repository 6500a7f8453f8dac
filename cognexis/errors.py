"""The error classes of cognexis.

Every fault a user can meet is one of these classes. Each has a stable ``code`` for logs and servers, and is also
a built-in exception (ValueError, RuntimeError, ...), so that callers who know nothing of cognexis still catch it.
A message names the field, the value it got and what is allowed.
"""

from typing import Any


class CognexisError(Exception):
    """Base of all cognexis errors."""

    code = "cognexis_error"


class InvalidConfigError(CognexisError, ValueError):
    """A setting is missing, contradictory or out of range.

    Args:
        message: the sentence for the user; with several faults it lists every one.
        path: dotted name of the setting, when there is a single one.
        value: the value that was given.
        reason: what is wrong with it, without the name and the value.
    """

    code = "invalid_config"

    def __init__(self, message: str, *, path: str | None = None, value: Any = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.value = value
        self.reason = reason


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
