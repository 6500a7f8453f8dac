"""Equality of mathematical answers, by the package math-verify: 1/2, 0.5 and \\frac{1}{2} are one answer.

Both texts are searched for an answer (a boxed expression, LaTeX between dollar signs, or a plain number or formula)
and compared as values. An answer that cannot be read counts as wrong; a reference that cannot be read is a fault of
the data. The comparison has a time limit, which works in the main thread only; elsewhere it runs without one.
"""

import threading
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.optional_package import needed_package


def maths_equal(prediction: str, reference: str, timeout_s: int = 5) -> float:
    """1.0 if both texts state the same value.

    Args:
        timeout_s: seconds for reading one text, and again for the comparison.

    Raises:
        InvalidConfigError: the reference holds no answer that can be read.
        BackendError: math-verify is not installed.
    """
    package = needed_package("math_verify", "math-verify", "Equality of mathematical answers")
    limit = timeout_s if threading.current_thread() is threading.main_thread() else None
    gold = _parsed(package, reference, limit)
    if not gold:
        raise InvalidConfigError(f"reference={reference!r}: no mathematical answer found in it")
    answer = _parsed(package, prediction, limit)
    return float(bool(answer) and package.verify(gold, answer, timeout_seconds=limit))


def _parsed(package: Any, text: str, limit: int | None) -> list[Any]:
    kinds = [package.LatexExtractionConfig(), package.ExprExtractionConfig()]
    return package.parse(text, extraction_config=kinds, parsing_timeout=limit) or package.parse(
        f"${text}$", extraction_config=kinds, parsing_timeout=limit
    )
