"""States of many rows by id: one tensor ``[capacity, ...]`` per leaf of the state tree.

A row that nobody stored is the fresh state. Every leaf keeps its own dtype, so that counters stay integers and a
stored row comes back bit for bit, unless floating leaves are to be stored in another one.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor


class StateStore:
    """Rows of states by integer id.

    Args:
        template: a fresh state of one row; gives leaves, shapes, dtypes and defaults.
        dtype: dtype in which floating leaves are stored; None means their own.
    """

    def __init__(self, template: TensorDict, dtype: torch.dtype | None = None) -> None:
        self.template = template
        self.paths: list[Any] = sorted(template.keys(True, True), key=str)
        self.leaves = [self._stored(template[path], dtype)[:0].clone() for path in self.paths]
        self.slots: dict[int, int] = {}

    @staticmethod
    def _stored(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
        return leaf if dtype is None or not leaf.is_floating_point() else leaf.to(dtype)

    def put(self, ids: list[int], state: TensorDict, rows: list[int] | None = None) -> None:
        """Store rows of a state (all, or those of ``rows``) under ``ids``."""
        if not ids:
            return
        for each in ids:
            self.slots.setdefault(each, len(self.slots))
        self._grow(len(self.slots))
        for leaf, path in zip(self.leaves, self.paths, strict=True):
            value = state[path].detach()
            value = value if rows is None else value[torch.tensor(rows, device=value.device)]
            target = torch.tensor([self.slots[each] for each in ids], device=leaf.device)
            leaf.index_copy_(0, target, value.to(leaf))

    def _grow(self, size: int) -> None:
        capacity = self.leaves[0].shape[0] if self.leaves else size
        if capacity >= size:
            return
        more = max(size, 2 * capacity) - capacity
        for i, path in enumerate(self.paths):
            fresh = self.template[path].to(self.leaves[i]).expand(more, *self.leaves[i].shape[1:])
            self.leaves[i] = torch.cat([self.leaves[i], fresh])

    def get(self, ids: list[int]) -> TensorDict:
        """A state with one row per id; fresh where none was stored."""
        result = self.template.expand(len(ids)).clone()
        known = [row for row, each in enumerate(ids) if each in self.slots]
        for leaf, path in zip(self.leaves, self.paths, strict=True):
            if known:
                rows = torch.tensor(known, device=leaf.device)
                slots = torch.tensor([self.slots[ids[row]] for row in known], device=leaf.device)
                result[path] = result[path].index_copy(0, rows, leaf[slots].to(result[path].dtype))
        return result

    def dump(self) -> dict[str, Any]:
        """What :meth:`load` takes: leaves in slot order, ids, and the fresh state."""
        used = len(self.slots)
        return {
            "leaves": [leaf[:used].clone() for leaf in self.leaves],
            "ids": list(self.slots),
            "paths": [list(path) if isinstance(path, tuple) else [path] for path in self.paths],
            "template": [self.template[path].clone() for path in self.paths],
        }

    def load(self, dumped: dict[str, Any]) -> None:
        """Take the place of what is stored.

        Raises:
            ValueError: it was made for states of another structure.
        """
        own = self.dump()
        shapes = [tuple(leaf.shape[1:]) for leaf in self.leaves]
        given = [tuple(leaf.shape[1:]) for leaf in dumped["leaves"]]
        if dumped.get("paths") != own["paths"] or given != shapes:
            raise ValueError(
                f"memory of {len(given)} leaves {given} does not fit this stack, whose states have "
                f"{len(shapes)} leaves {shapes}"
            )
        self.leaves = [value.to(leaf).clone() for value, leaf in zip(dumped["leaves"], self.leaves, strict=True)]
        self.slots = {int(each): slot for slot, each in enumerate(dumped["ids"])}
