"""The same order for a plain ``DataLoader``, as with accelerate, which shares the batches out itself.

Give the sampler to a ``DataLoader`` without a rank; a prepared loader deals its batches to the processes in turn, so
that together they follow the stream as :class:`TrainingLoader` does. An iteration ends with its epoch, and the next
one begins there. Such loaders fetch ahead, so the sampler cannot know which rows were used: after an iteration that
was cut short, tell it with :meth:`RowSampler.seek`. There is no ``set_epoch``: prepared loaders would call it with
the number of their own iterations and lose the position.
"""

from collections.abc import Iterator

from torch.utils.data import Sampler

from cognexis.errors import InvalidConfigError
from cognexis.training.data.order import RowOrder

_POSITIONS_AT_ONCE = 4096


class RowSampler(Sampler[int]):
    """Row numbers in stream order, from a position to the end of its epoch.

    Args:
        order: which row stands where in the stream.
        position: where to begin.
    """

    def __init__(self, order: RowOrder, position: int = 0) -> None:
        self.order = order
        self.seek(position)

    def seek(self, position: int) -> None:
        """Begin the next iteration at ``position`` of the stream: rows used by all processes so far."""
        if type(position) is not int or position < 0:
            raise InvalidConfigError(
                f"position={position!r}: must be a whole number of 0 or more", path="position", value=position
            )
        self.position = position

    def __len__(self) -> int:
        return self.order.rows_per_epoch - self.position % self.order.rows_per_epoch

    def __iter__(self) -> Iterator[int]:
        stop = self.position + len(self)
        for start in range(self.position, stop, _POSITIONS_AT_ONCE):
            yield from self.order.rows(start, min(stop, start + _POSITIONS_AT_ONCE)).tolist()
        self.position = stop
