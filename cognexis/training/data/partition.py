"""Which of n rows belong to which rank.

    contiguous   rank r of W takes floor(r n / W) .. floor((r + 1) n / W) - 1
    strided      rank r of W takes r, r + W, r + 2 W, ...

Either way every row has one rank, and two ranks differ by at most one row.
"""

from cognexis.errors import InvalidConfigError

PARTITIONS = ("contiguous", "strided")


def rank_indices(num_rows: int, rank: int, world_size: int, partition: str = "strided") -> range:
    """The rows of ``rank``, in order.

    Raises:
        InvalidConfigError: no rank, a rank outside 0 to ``world_size`` - 1, or an unknown partition.
    """
    check_rank(rank, world_size)
    check_partition(partition)
    if partition == "strided":
        return range(rank, num_rows, world_size)
    return range(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


def check_rank(rank: int, world_size: int) -> None:
    """Raise InvalidConfigError unless ``rank`` lies in 0 to ``world_size`` - 1."""
    if type(world_size) is not int or world_size < 1:
        raise InvalidConfigError(
            f"world_size={world_size!r}: must be a whole number of 1 or more", path="world_size", value=world_size
        )
    if type(rank) is not int or not 0 <= rank < world_size:
        raise InvalidConfigError(
            f"rank={rank!r}: must be a whole number from 0 to {world_size - 1}", path="rank", value=rank
        )


def check_partition(partition: str) -> None:
    """Raise InvalidConfigError unless ``partition`` is one of :data:`PARTITIONS`."""
    if partition not in PARTITIONS:
        raise InvalidConfigError(
            f"partition={partition!r}: must be one of {', '.join(PARTITIONS)}", path="partition", value=partition
        )
