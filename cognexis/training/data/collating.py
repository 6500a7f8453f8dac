"""From rows to batches.

``RowCollator`` stacks rows and pads shorter ones on the right; padding is marked by ``attention_mask`` 0, label -100
and document -1. ``pad_shifted`` does the same for examples that already come as inputs and targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.training.data.packing import IGNORED_LABEL

_FILL = {"labels": IGNORED_LABEL, "attention_mask": 0, "document_ids": -1}


@dataclass(frozen=True)
class RowCollator:
    """Batches of rows as ``TokenRows`` gives them; other rows need ``input_ids`` at least.

    Attributes:
        pad_token_id: fills ``input_ids``.
        pad_to_multiple_of: the common length is rounded up to a multiple of this.
        need_targets: refuse a batch in which nothing is learned.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1
    need_targets: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors ``[B, T]``; ``domain`` becomes ``domains``, a list of names.

        Raises:
            InvalidConfigError: no rows, rows with different keys, or no token to learn in the whole batch.
            ShapeMismatchError: the tensors of a row are not equally long.
        """
        rows = [self._complete(row, index) for index, row in enumerate(rows)]
        if not rows or any(row.keys() != rows[0].keys() for row in rows):
            raise InvalidConfigError(f"a batch needs rows with equal keys, got {[sorted(row) for row in rows][:3]}")
        length = max(len(row["input_ids"]) for row in rows)
        length += -length % self.pad_to_multiple_of
        batch: dict[str, Any] = {}
        for name in rows[0]:
            if name == "domain":
                batch["domains"] = [row[name] for row in rows]
            else:
                batch[name] = torch.stack([self._padded(name, row[name], length) for row in rows])
        if self.need_targets and not bool((batch["labels"][:, 1:] != IGNORED_LABEL).any()):
            raise InvalidConfigError(
                f"labels: all of the {len(rows)} rows of a batch are masked, so there is no loss; leave such rows out "
                "or check the target masks",
                path="labels",
            )
        return batch

    def _complete(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The row as tensors, with the masks that it leaves out."""
        full = {
            name: value if name == "domain" else torch.as_tensor(value, dtype=torch.long)
            for name, value in row.items()
        }
        if "input_ids" not in full:
            raise InvalidConfigError(f"row {index} has no input_ids, only {sorted(row)}", path="input_ids")
        full.setdefault("attention_mask", torch.ones_like(full["input_ids"]))
        full.setdefault("labels", full["input_ids"].masked_fill(full["attention_mask"] == 0, IGNORED_LABEL))
        for name, value in full.items():
            if name != "domain" and value.shape != full["input_ids"].shape:
                raise ShapeMismatchError(
                    f"{name} of row {index} has shape {tuple(value.shape)}, input_ids "
                    f"{tuple(full['input_ids'].shape)}",
                    expected=tuple(full["input_ids"].shape),
                    actual=tuple(value.shape),
                )
        return full

    def _padded(self, name: str, value: Tensor, length: int) -> Tensor:
        missing = length - len(value)
        if name == "position_ids":
            return torch.cat((value, torch.arange(missing)))
        fill = self.pad_token_id if name == "input_ids" else _FILL.get(name, 0)
        return torch.nn.functional.pad(value, (0, missing), value=fill)


def pad_shifted(
    inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, Tensor]:
    """Pad examples whose targets are already the next tokens.

    Args:
        inputs: token ids of each example.
        targets: the token to predict at each place of it.

    Returns:
        ``input_ids``, ``target_ids``, ``attention_mask``, ``position_ids`` ``[B, T]`` and ``loss_mask`` (float).

    Raises:
        ShapeMismatchError: inputs and targets differ in number or length.
        InvalidConfigError: there is no example, or an empty one.
    """
    lengths, target_lengths = [len(row) for row in inputs], [len(row) for row in targets]
    if lengths != target_lengths:
        raise ShapeMismatchError(
            f"inputs and targets must be equally long, got lengths {lengths} and {target_lengths}",
            expected=lengths,
            actual=target_lengths,
        )
    if not lengths or not all(lengths):
        raise InvalidConfigError(f"inputs: every example needs at least one token, got lengths {lengths}")
    width = max(lengths)
    is_real = torch.arange(width)[None] < torch.tensor(lengths)[:, None]

    def padded(rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows])

    return {
        "input_ids": padded(inputs),
        "target_ids": padded(targets),
        "attention_mask": is_real.long(),
        "position_ids": torch.arange(width).expand(len(lengths), -1).clone(),
        "loss_mask": is_real.float(),
    }
