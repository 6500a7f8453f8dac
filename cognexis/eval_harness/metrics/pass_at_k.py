"""pass@k: the chance that one of k drawn programs passes, estimated without bias from n programs of which c pass.

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i < k} (n - c - i) / (n - i)

It is 1 where fewer than k programs fail. Source: M. Chen et al., Evaluating Large Language Models Trained on Code,
2021, equation 1.
"""

import math

from cognexis.errors import InvalidConfigError


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate for one problem.

    Args:
        num_samples: programs that were run, n.
        num_passed: how many of them passed, c.
        k: programs that may be tried, 1 to n.

    Raises:
        InvalidConfigError: a count is out of range.
    """
    if num_samples < 1:
        raise InvalidConfigError(f"num_samples={num_samples!r}: must be 1 or more")
    if not 0 <= num_passed <= num_samples:
        raise InvalidConfigError(f"num_passed={num_passed!r}: must be 0 to num_samples={num_samples}")
    if not 1 <= k <= num_samples:
        raise InvalidConfigError(f"k={k!r}: must be 1 to num_samples={num_samples}")
    failed = num_samples - num_passed
    return 1.0 - math.prod(max(failed - i, 0) / (num_samples - i) for i in range(k))
