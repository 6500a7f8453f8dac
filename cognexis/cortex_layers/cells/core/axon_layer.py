"""AxonLayer: a linear map with a recurrence beside it, in the place of ``nn.Linear``.

    y = Linear(x) + AxonCell(x)

The layer returns only y. Its state lives in the parent's, at ``state[group][name]``, where it is looked up and written
back in place; so a cell that owns such layers hands them a shallow copy of its own state:

    parent = state.copy()
    gate = self.igate(x, parent, resets=mask)
    next_state = update_parent_state(TensorDict({...}, batch_size=[B]), parent)

A sub-state that is missing is made fresh, one of another batch size is replaced, one of another dtype or device is
converted. Letters: B batch, T time.
"""

import logging
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.cells.core.axon_cell import AxonCell
from cognexis.cortex_layers.config import AxonConfig
from cognexis.cortex_layers.state import accumulator_dtype, check_input, has_keys, row_mask
from cognexis.cortex_layers.types import MaybeState, ResetMask

logger = logging.getLogger(__name__)


class AxonLayer(nn.Module):
    """``nn.Linear`` with local memory.

    Args:
        in_features: width of the input, and of the recurrence.
        out_features: width of the output.
        cfg: of the recurrence; its widths are replaced and its activation is the identity. None: mixed by a Hadamard
            transform where ``in_features`` is a power of two, else by a matrix.
        name: key of the state inside the group, unique there.
        group: key of the group inside the parent.

    Raises:
        ValueError: no name.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        cfg: AxonConfig | None = None,
        *,
        name: str | None = None,
        group: str = "axon",
    ) -> None:
        super().__init__()
        if not name or not group:
            raise ValueError(f"AxonLayer: name={name!r}, group={group!r}: both must be given; they address the state")
        if cfg is None:
            is_power = in_features & (in_features - 1) == 0
            cfg = AxonConfig(use_srht=is_power, use_untraced_linear=not is_power)
        widths = {"hidden_size": in_features, "out_dim": out_features, "activation": "identity"}
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.group = group
        self.linear = nn.Linear(in_features, out_features)
        self.cell = AxonCell(cfg.model_copy(update=widths), enforce_out_dim_eq_hidden=False)

    def state_path(self) -> tuple[str, str]:
        """Where the parent keeps the layer's state: group and name."""
        return self.group, self.name

    def init_into(
        self,
        parent: TensorDict,
        batch: int,
        device: torch.device | str,
        dtype: torch.dtype,
        traces: bool = True,
    ) -> TensorDict:
        """Put a fresh sub-state into ``parent`` and return ``parent``."""
        self._store(parent, self.cell.init_state(batch, device=device, dtype=dtype, traces=traces))
        return parent

    def forward(self, x: Tensor, state: MaybeState = None, *, resets: ResetMask | None = None) -> Tensor:
        """Map ``[B, in]`` or ``[B, T, in]``; ``state``, the parent's, is changed.

        Raises:
            ValueError: no parent state, or another width.
        """
        check_input(x, self.in_features, f"AxonLayer {self.group}/{self.name}")
        if state is None:
            raise ValueError(f"AxonLayer {self.group}/{self.name}: needs the parent's state, a TensorDict, not None")
        y, after = self.cell(x, self._find(state, x), resets=resets)
        self._store(state, after)
        return self.linear(x) + y

    @torch.no_grad()
    def reset_state(self, mask: Tensor, state: MaybeState) -> TensorDict:
        """Zero the rows of ``mask`` ``[B]`` in the parent, in place, and return the parent.

        Raises:
            ValueError: no parent state.
        """
        if state is None:
            raise ValueError(f"AxonLayer {self.group}/{self.name}: needs the parent's state, a TensorDict, not None")
        found = self._stored(state)
        if found is not None:
            rows = row_mask(mask, found.batch_size[0], "AxonLayer")
            for key, value in list(found.items()):
                shaped = rows.to(value.device).view(-1, *(1,) * (value.dim() - 1))
                found[key] = value.masked_fill(shaped, 0)
        return state

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, path={self.group}/{self.name}"

    def _stored(self, parent: TensorDict) -> Any:
        group: Any = parent.get(self.group, None)
        return None if group is None else group.get(self.name, None)

    def _find(self, parent: TensorDict, x: Tensor) -> TensorDict | None:
        found = self._stored(parent)
        if found is None or not has_keys(found, "hc1", "hc2"):
            return None
        if found.batch_size[0] != x.shape[0]:
            logger.warning(
                "AxonLayer %s/%s: state of %d rows replaced by a fresh one of %d",
                *(self.group, self.name, found.batch_size[0], x.shape[0]),
            )
            return self.cell.init_state(x.shape[0], device=x.device, dtype=x.dtype, traces=has_keys(found, "E_nu_c1"))
        dtype = accumulator_dtype(x.dtype)
        if found["hc1"].dtype == dtype and found["hc1"].device == x.device:
            return found
        parts = {key: value.to(x.device, dtype) for key, value in found.items()}
        return TensorDict(parts, batch_size=found.batch_size, device=x.device)

    def _store(self, parent: TensorDict, sub_state: Any) -> None:
        group: Any = parent.get(self.group, None)
        if group is None or group.batch_size[:1] != sub_state.batch_size:
            group = TensorDict({}, batch_size=sub_state.batch_size, device=parent.device)
            parent[self.group] = group
            group = parent[self.group]
        group[self.name] = sub_state


def update_parent_state(parent: TensorDict, source: MaybeState) -> TensorDict:
    """Give ``parent`` every top-level entry of ``source`` that it lacks, and return it."""
    for key, value in () if source is None else source.items():
        if key not in parent.keys():  # noqa: SIM118 (no mapping)
            parent[key] = value
    return parent


__all__ = ["AxonLayer", "update_parent_state"]
