"""What all synthetic tasks share: seeded generation, distinct samples, splits that share no sequence.

A data set draws ``num_samples`` sequences from a generator of its own, seeded with ``seed``; the global random state
is neither read nor changed. A sequence that was drawn before is drawn again, so all samples differ in content and any
split by index is a split by content. ``num_samples``, ``seed`` and the difficulty fix the data completely.

Letters: S samples, T time.
"""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cognexis.errors import InvalidConfigError

_MAX_ROUNDS = 50


class SequenceTask(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set of pairs (token ids ``[T]``, label).

    Args:
        num_samples: how many distinct sequences are drawn.
        seed: seed of the data set's own generator.
        start_idx: first sample that belongs to this part.
        end_idx: the sample behind the last one; None means the end.

    A subclass sets its difficulty, then calls this constructor, and defines ``draw``. It says in ``title`` what the
    task tests, and in ``length``, ``vocab_size`` and ``num_classes`` how large sequences, vocabulary and answer are.

    Attributes:
        ids: int64 ``[S, T]``.
        labels: int64 ``[S]``.

    Raises:
        InvalidConfigError: a setting is out of range, or there are fewer different sequences than samples.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    length: int
    vocab_size: int
    num_classes: int
    ids: Tensor
    labels: Tensor

    def __init__(self, num_samples: int, *, seed: int, start_idx: int = 0, end_idx: int | None = None) -> None:
        require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
        require(0 <= seed < 2**63, "seed", seed, "must be between 0 and 2^63 - 1")
        end = num_samples if end_idx is None else end_idx
        require(
            0 <= start_idx <= end <= num_samples, "end_idx", end_idx, f"[{start_idx}, {end}) is no part of the data"
        )
        ids, labels = self._distinct(num_samples, torch.Generator().manual_seed(seed))
        self.ids, self.labels = ids[start_idx:end], labels[start_idx:end]

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``count`` samples: ids ``[count, T]`` and labels ``[count]``."""

    def _distinct(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen: set[bytes] = set()
        all_ids: list[Tensor] = []
        all_labels: list[Tensor] = []
        for _ in range(_MAX_ROUNDS):
            ids, labels = self.draw(num_samples, generator)
            fresh = []
            for row, content in enumerate(contents(ids)):
                if len(seen) < num_samples and content not in seen:
                    seen.add(content)
                    fresh.append(row)
            all_ids.append(ids[fresh])
            all_labels.append(labels[fresh])
            if len(seen) == num_samples:
                return torch.cat(all_ids), torch.cat(all_labels)
        raise InvalidConfigError(
            f"num_samples={num_samples}: {self.name} found only {len(seen)} different sequences at this difficulty; "
            "ask for fewer samples or for longer sequences",
            path="num_samples",
            value=num_samples,
        )

    @classmethod
    def splits(cls, num_samples: int = 2000, *, seed: int = 42, **difficulty: Any) -> "Splits":
        """Draw once and cut into 80 % training, 10 % validation and 10 % test, which share no sequence."""
        require(num_samples >= 10, "num_samples", num_samples, "must be at least 10, so that no split is empty")
        unknown = sorted(set(difficulty) - set(cls.difficulty()))
        require(not unknown, ", ".join(unknown), None, f"{cls.name} knows {', '.join(cls.difficulty())}")
        whole = cls(num_samples, seed=seed, **difficulty)
        first, second = num_samples * 8 // 10, num_samples * 9 // 10
        parts = Splits(whole._part(0, first), whole._part(first, second), whole._part(second, num_samples))
        check_disjoint(parts)
        return parts

    @classmethod
    def difficulty(cls) -> dict[str, Any]:
        """The settings that make the task harder or easier, with their defaults."""
        shared = ("self", "num_samples", "seed", "start_idx", "end_idx")
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {parameter.name: parameter.default for parameter in parameters if parameter.name not in shared}

    @classmethod
    def easier(cls, num_samples: int, *, seed: int, **difficulty: Any) -> list["SequenceTask"]:
        """Data sets of shorter sequences, the shortest first, that help to learn the task; none unless it has some.

        Args:
            num_samples: the most samples of each.
            seed: of the task itself; theirs follow from it.
            difficulty: of the task itself.
        """
        return []

    def _part(self, start: int, end: int) -> Self:
        part = type(self).__new__(type(self))
        part.__dict__ |= self.__dict__ | {"ids": self.ids[start:end], "labels": self.labels[start:end]}
        return part

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.ids[index], self.labels[index]


class Splits(NamedTuple):
    """The three parts of a data set."""

    train: SequenceTask
    val: SequenceTask
    test: SequenceTask


def require(is_right: bool, path: str, value: Any, reason: str) -> None:
    """Raise an InvalidConfigError that names the setting, unless it is right."""
    if not is_right:
        shown = path if value is None else f"{path}={value!r}"
        raise InvalidConfigError(f"{shown}: {reason}", path=path, value=value, reason=reason)


def require_chance(path: str, value: float) -> None:
    """Raise unless ``value`` is a probability."""
    require(0 <= value <= 1, path, value, "must be between 0 and 1")


def contents(ids: Tensor) -> list[bytes]:
    """One key per row ``[S, T]``, equal exactly for equal sequences."""
    return [row.tobytes() for row in ids.numpy()]


def check_disjoint(parts: Sequence[SequenceTask]) -> None:
    """Raise if a sequence occurs twice, within a part or in two of them.

    Raises:
        InvalidConfigError: says how many sequences repeat earlier ones.
    """
    keys = [key for part in parts for key in contents(part.ids)]
    if repeated := len(keys) - len(set(keys)):
        raise InvalidConfigError(f"{repeated} sequences occur more than once, so a test would measure memorising")
