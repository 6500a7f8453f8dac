"""Scores by a judge: a function of the caller reads an answer and grades it on named criteria.

The judge may be a person, a program or a model; this module only holds it to its word: every criterion is graded once,
within its range. The score of an answer is the weighted mean of its grades on a scale of 0 to 1.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cognexis.errors import BackendError, InvalidConfigError


@dataclass(frozen=True)
class Criterion:
    """One thing to be graded from 0 to ``max_grade``; ``weight`` is relative to the other criteria."""

    name: str
    description: str
    max_grade: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidConfigError("name='': a criterion needs a name")
        for field in ("max_grade", "weight"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise InvalidConfigError(f"{self.name}.{field}={value!r}: must be a finite number above 0")


# Prompt, answer and criteria -> grade by name of the criterion.
Judge = Callable[[str, str, Sequence[Criterion]], Mapping[str, float]]


@dataclass(frozen=True)
class RubricScore:
    """Score of one answer, 0 to 1, and the grades it is made of."""

    score: float
    grades: dict[str, float]


def rubric_score(prompt: str, answer: str, criteria: Sequence[Criterion], judge: Judge) -> RubricScore:
    """Let ``judge`` grade an answer.

    Raises:
        InvalidConfigError: no criteria, or two of one name.
        BackendError: the judge left a criterion out, graded an unknown one, or gave a grade out of range.
    """
    names = [criterion.name for criterion in criteria]
    if not names or len(set(names)) < len(names):
        raise InvalidConfigError(f"criteria={names!r}: must be one or more, with different names")
    grades = {name: float(grade) for name, grade in judge(prompt, answer, criteria).items()}
    if set(grades) != set(names):
        raise BackendError(f"the judge graded {sorted(grades)}: must be exactly {sorted(names)}")
    for criterion in criteria:
        if not 0 <= grades[criterion.name] <= criterion.max_grade:
            raise BackendError(
                f"the judge gave {criterion.name}={grades[criterion.name]!r}: must be 0 to {criterion.max_grade}"
            )
    total = math.fsum(criterion.weight for criterion in criteria)
    earned = math.fsum(grades[c.name] / c.max_grade * c.weight for c in criteria)
    return RubricScore(earned / total, grades)
