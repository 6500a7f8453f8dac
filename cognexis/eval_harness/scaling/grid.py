"""The depths of a study: doubling up to the largest, and the largest itself."""

from collections.abc import Iterable

from cognexis.errors import InvalidConfigError


def default_grid(max_loops: int, milestones: Iterable[int] = ()) -> list[int]:
    """1, 2, 4, ... and ``max_loops``; with ``milestones``, such as those of a curriculum, up to it.

    Raises:
        InvalidConfigError: ``max_loops`` is below 1.
    """
    if max_loops < 1:
        raise InvalidConfigError(f"max_loops={max_loops!r}: must be 1 or more")
    doubling = (2**power for power in range(max_loops.bit_length()))
    return sorted({depth for depth in (*doubling, *milestones, max_loops) if 1 <= depth <= max_loops})


def parse_depths(text: str) -> list[int]:
    """Depths from a text such as "8, 1, 4,4", sorted and each once.

    Raises:
        InvalidConfigError: an entry is no integer of 1 or more, or there is none.
    """
    depths = set()
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdigit()) or int(word) < 1:
            raise InvalidConfigError(
                f"depths={text!r}: {word.strip()!r} must be an integer of 1 or more; separate depths by commas"
            )
        depths.add(int(word))
    return sorted(depths)
