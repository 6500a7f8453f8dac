"""The state of a loader: where it stands in the stream, and which stream that is."""

from typing import Any

from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.order import RowOrder

STATE_VERSION = 1


def make_state(position: int, order: RowOrder, data_checksum: str | None) -> dict[str, Any]:
    """What a checkpoint keeps: plain JSON, less than 1 KiB however large the data are."""
    return {
        "schema_version": STATE_VERSION,
        "position": position,
        "epoch": position // order.rows_per_epoch,
        "row_in_epoch": position % order.rows_per_epoch,
        "seed": order.seed,
        "num_rows": order.num_rows,
        "rows_per_epoch": order.rows_per_epoch,
        "order": order.fingerprint(),
        "data_checksum": data_checksum,
    }


def check_state(state: Any, order: RowOrder, data_checksum: str | None, end: int | None, force: bool = False) -> int:
    """The position that a state stands for; see ``TrainingLoader.load_state_dict``.

    Args:
        end: the first position behind the stream; None where it has no end.
    """
    expected = make_state(0, order, data_checksum)
    if not isinstance(state, dict) or set(state) != set(expected):
        given = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise InvalidConfigError(f"loader state: must have the keys {sorted(expected)}, got {given}")
    if state["schema_version"] != STATE_VERSION:
        raise InvalidConfigError(f"loader state: schema_version={state['schema_version']!r}: must be {STATE_VERSION}")
    position = state["position"]
    if type(position) is not int or position < 0:
        raise InvalidConfigError(
            f"loader state: position={position!r}: must be a whole number of 0 or more",
            path="position",
            value=position,
        )
    fixed = ["seed", "num_rows", "rows_per_epoch", "order"]
    if state["data_checksum"] is not None and data_checksum is not None:
        fixed.append("data_checksum")
    changes = [
        f"{name} was {state[name]!r} and is {expected[name]!r}" for name in fixed if state[name] != expected[name]
    ]
    if changes and not force:
        raise ArtifactMismatchError(
            f"loader state: taken from another stream: {'; '.join(changes)}. Resume with the same data and settings, "
            "or pass force=True to keep the position only",
            path="loader state",
        )
    epoch, row = divmod(position, order.rows_per_epoch)
    if not force and (state["epoch"], state["row_in_epoch"]) != (epoch, row):
        raise InvalidConfigError(
            f"loader state: position={position} is row {row} of epoch {epoch}, the state says row "
            f"{state['row_in_epoch']!r} of epoch {state['epoch']!r}",
            path="position",
            value=position,
        )
    if end is not None and position > end:
        raise InvalidConfigError(
            f"loader state: position={position}: the stream ends at {end}", path="position", value=position
        )
    return position
