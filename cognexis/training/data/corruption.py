"""What happens to records that cannot be used.

    fail         the first one ends the reading, with file, place and reason
    skip         it is counted and left out
    quarantine   as skip, and a row {path, line_number, byte_offset, reason} says which it was; never its content

A record that is empty, or that a quality filter leaves out, is no fault: it is counted under its own name.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cognexis.errors import InvalidConfigError

POLICIES = ("fail", "skip", "quarantine")

REASONS = {
    "too_long": "the record is longer than is read",
    "not_utf8": "the record is not UTF-8",
    "invalid_json": "the record is no strict JSON",
    "not_an_object": "the record must be one object",
    "missing_field": "the record needs exactly one of text, input_ids and messages",
    "wrong_type": "a field has the wrong type",
    "token_id": "a token id is no whole number below the vocabulary's size",
    "not_text": "the text is no Unicode text",
    "control_token": "the text holds a control token",
    "bad_chat": "the chat breaks a rule",
    "no_target": "nothing in the record is to be learned",
    "cut_off": "the file ends in the middle of a record",
}


class RecordFault(Exception):
    """A record cannot be used; ``reason`` is a key of :data:`REASONS`, ``detail`` is for the ``fail`` message only."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{REASONS[self.reason]}{': ' if self.detail else ''}{self.detail}"


@dataclass(frozen=True)
class Place:
    """Where a record stands.

    Attributes:
        path: the file, or the name of the source.
        number: line or row, from 1.
        offset: its first byte; None where the format has no such thing.
    """

    path: str
    number: int
    offset: int | None = None

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}" if self.offset is not None else f"{self.path}, row {self.number}"


@dataclass
class RecordCounts:
    """How many records were read and what became of them.

    Attributes:
        read: records that were found.
        loaded: records that became documents.
        empty: records without any text or token.
        skipped: faults, by reason.
        filtered: records that a quality filter left out, by its reason.
        tokenise_seconds: time spent on encoding.
    """

    read: int = 0
    loaded: int = 0
    empty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    tokenise_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For a manifest; the time is left out, so that equal data give equal manifests."""
        return {
            "read": self.read,
            "loaded": self.loaded,
            "empty": self.empty,
            "skipped": dict(sorted(self.skipped.items())),
            "filtered": dict(sorted(self.filtered.items())),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RecordCounts":
        """The counts that :meth:`as_dict` gave."""
        plain = {name: content[name] for name in ("read", "loaded", "empty")}
        return cls(**plain, skipped=Counter(content["skipped"]), filtered=Counter(content["filtered"]))


class FaultHandler:
    """Applies a policy.

    Args:
        policy: ``fail``, ``skip`` or ``quarantine``.
        counts: where faults are counted.
        quarantine: receives a row for each fault under ``quarantine``.

    Raises:
        InvalidConfigError: an unknown policy.
    """

    def __init__(
        self, policy: str, counts: RecordCounts, quarantine: Callable[[dict[str, Any]], None] = lambda row: None
    ) -> None:
        check_policy(policy)
        self.policy, self.counts, self.quarantine = policy, counts, quarantine

    def handle(self, place: Place, fault: RecordFault) -> None:
        """Count a fault.

        Raises:
            InvalidConfigError: under ``fail``; names the place and the reason.
        """
        if self.policy == "fail":
            raise InvalidConfigError(
                f"{place}: {fault} (corruption policy fail; skip and quarantine leave such records out)",
                path=place.path,
                reason=str(fault),
            )
        self.counts.skipped[fault.reason] += 1
        if self.policy == "quarantine":
            row = {"path": place.path, "line_number": place.number, "byte_offset": place.offset}
            self.quarantine({**row, "reason": fault.reason})


def check_policy(policy: str) -> None:
    """Raise InvalidConfigError unless ``policy`` is one of :data:`POLICIES`."""
    if policy not in POLICIES:
        raise InvalidConfigError(
            f"corruption_policy={policy!r}: must be one of {', '.join(POLICIES)}",
            path="corruption_policy",
            value=policy,
        )
