"""A stack as a component of a reinforcement-learning agent: TensorDict in, TensorDict out.

    rollout   (bptt = 1)   one step per environment; states are kept by environment id between calls
    training  (bptt > 1)   sequences ``[B, T]``; each starts from the state that its row had in the rollout

The input is a flat batch of B * T rows. A done or truncation seen with an observation resets the state before that
observation is consumed, in both branches, so training sees what the rollout saw. Rows at the beginning of a segment
(``t_in_row`` = 0) leave the state that they had before the step under their ``row_id``, for training.

Keys: ``bptt``, ``batch`` (counts); ``training_env_ids``, ``dones``, ``truncateds`` ``[B]``, ``[B, 1]`` or ``[B, T]``;
``row_id``, ``t_in_row``. Letters: B batch, T time, D width of the stack.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.config import CortexStackConfig
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.stacks.build import build_cortex
from cognexis.cortex_layers.state_store import StateStore

_DTYPES = {
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}
_NONLINEARITIES: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "linear": nn.Identity,
}


class CortexTDConfig(BaseModel):
    """Settings of :class:`CortexTD`.

    Give either ``stack_cfg`` or a built ``stack``. ``store_dtype`` is another name of ``dtype``: that of the stack's
    parameters and of what is stored. With ``compute_dtype`` the stack computes in that one and stores in ``dtype``.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    in_key: str
    out_key: str
    name: str = "cortex"
    d_hidden: int = Field(default=128, ge=1)
    out_features: int | None = Field(default=None, ge=1)
    output_nonlinearity: str = "silu"
    stack_cfg: CortexStackConfig | None = None
    stack: CortexStack | None = Field(default=None, exclude=True)
    key_prefix: str = "cortex_state"
    dtype: str = "float32"
    compute_dtype: str | None = None
    store_dtype: str | None = None
    pass_state_during_training: bool = True

    @model_validator(mode="after")
    def _check(self) -> "CortexTDConfig":
        if self.stack_cfg is None and self.stack is not None:
            self.__dict__["stack_cfg"] = self.stack.config
        if self.stack_cfg is None and self.stack is None:
            raise ValueError("stack_cfg: is required, or a built stack")
        if self.store_dtype is not None:
            if "dtype" in self.model_fields_set and _DTYPES.get(self.dtype) != _DTYPES.get(self.store_dtype):
                raise ValueError(
                    f"store_dtype={self.store_dtype!r} contradicts dtype={self.dtype!r}; give one of them"
                )
            self.__dict__["dtype"] = self.store_dtype
        for name in ("dtype", "compute_dtype"):
            value = getattr(self, name)
            if value is not None and value not in _DTYPES:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(_DTYPES)}")
        if self.output_nonlinearity not in _NONLINEARITIES:
            raise ValueError(
                f"output_nonlinearity={self.output_nonlinearity!r}: must be one of {', '.join(_NONLINEARITIES)}"
            )
        return self

    def make_component(self, env: Any = None) -> "CortexTD":
        """Build the component; ``env`` is not needed."""
        return CortexTD(self)


@dataclass(frozen=True)
class ExperienceField:
    """Shape (without the batch) and dtype of what a rollout must record."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CortexTD(nn.Module):
    """A stack with memory between calls.

    Raises:
        ValueError: the stack has another width than ``d_hidden``.
    """

    def __init__(self, config: CortexTDConfig) -> None:
        super().__init__()
        self.config = config
        self.in_key, self.out_key, self.name = config.in_key, config.out_key, config.name
        if config.stack is not None:
            self.stack = config.stack
        else:
            assert config.stack_cfg is not None
            self.stack = build_cortex(config.stack_cfg)
        width = self.stack.d_hidden
        if width != config.d_hidden:
            raise ValueError(f"d_hidden={config.d_hidden}: the stack has d_hidden={width}")
        self.head: nn.Module = nn.Identity()
        if config.out_features is not None and config.out_features != width:
            activation = _NONLINEARITIES[config.output_nonlinearity]()
            self.head = nn.Sequential(nn.Linear(width, config.out_features), activation)
        self.dtype = _DTYPES[config.compute_dtype or config.dtype]
        if self.dtype != torch.float32:
            self.stack.to(self.dtype)
            self.head.to(self.dtype)
        self._rollout_store: StateStore | None = None
        self._row_store: StateStore | None = None
        self._live_ids: list[int] | None = None
        self._live_state: TensorDict | None = None

    def forward(self, td: TensorDict) -> TensorDict:
        """Read ``in_key`` ``[B * T, D]``, write ``out_key`` ``[B * T, F]``; returns the same TensorDict.

        Raises:
            ValueError: counts and shapes do not fit each other.
            KeyError: training without ``row_id``, where states are passed on.
        """
        x = td[self.in_key]
        length, rows = (int(td[key].reshape(-1)[0]) for key in ("bptt", "batch"))
        if length < 1 or rows < 1 or x.shape[0] != rows * length:
            raise ValueError(
                f"{self.name}: bptt={length} and batch={rows} must be positive and their product the "
                f"{x.shape[0]} rows of {self.in_key!r}"
            )
        resets = self._resets(td, rows, length)
        tokens = x.to(self.dtype)
        if length == 1:
            y = self._rollout(td, tokens, resets[:, 0])
        else:
            y = self._train(td, tokens.reshape(rows, length, -1), resets).flatten(0, 1)
        td[self.out_key] = self.head(y).to(x.dtype)
        return td

    def _resets(self, td: TensorDict, rows: int, length: int) -> Tensor:
        masks = [_by_row(td[key], key, rows, length) for key in ("dones", "truncateds") if key in td.keys()]  # noqa: SIM118
        resets = torch.zeros(rows, length, dtype=torch.bool, device=td[self.in_key].device)
        for mask in masks:
            mask = mask.to(resets.device) != 0
            if mask.shape[1] == length:
                resets |= mask
            else:
                resets[:, :1] |= mask[:, :1]
        return resets

    def _rollout(self, td: TensorDict, x: Tensor, resets: Tensor) -> Tensor:
        rows = x.shape[0]
        if "training_env_ids" not in td.keys():  # noqa: SIM118 (no mapping)
            td["training_env_ids"] = torch.arange(rows, device=x.device).reshape(rows, 1)
        ids = _by_row(td["training_env_ids"], "training_env_ids", rows, 1)[:, 0].tolist()
        if len(set(ids)) != rows:
            raise ValueError(f"{self.name}: training_env_ids must differ within a batch")
        rollout, row_store = self._stores(x.device)
        if ids != self._live_ids or self._live_state is None:
            self._flush()
            self._live_ids, self._live_state = ids, rollout.get(ids)
        state = self._live_state
        if "row_id" in td.keys() and "t_in_row" in td.keys():  # noqa: SIM118
            first = (_by_row(td["t_in_row"], "t_in_row", rows, 1)[:, 0] == 0).nonzero()[:, 0].tolist()
            row_ids = _by_row(td["row_id"], "row_id", rows, 1)[:, 0].tolist()
            row_store.put([row_ids[row] for row in first], state, first)
        y, next_state = self.stack(x, state, resets=resets)
        self._live_state = next_state.detach()
        return y

    def _train(self, td: TensorDict, x: Tensor, resets: Tensor) -> Tensor:
        state = None
        if self.config.pass_state_during_training:
            if "row_id" not in td.keys():  # noqa: SIM118
                raise KeyError("row_id: training needs it where pass_state_during_training=True")
            ids = _by_row(td["row_id"], "row_id", x.shape[0], x.shape[1])[:, 0].tolist()
            state = self._stores(x.device)[1].get(ids)
        y, _ = self.stack(x, state, resets=resets)
        return y

    def _stores(self, device: torch.device | str) -> tuple[StateStore, StateStore]:
        if self._rollout_store is None or self._row_store is None:
            template = self.stack.init_state(1, device=device, dtype=self.dtype)
            stored = _DTYPES[self.config.dtype] if self.config.compute_dtype is not None else None
            self._rollout_store, self._row_store = StateStore(template, stored), StateStore(template, stored)
        return self._rollout_store, self._row_store

    def _flush(self) -> None:
        if self._live_state is not None and self._live_ids is not None and self._rollout_store is not None:
            self._rollout_store.put(self._live_ids, self._live_state)

    def reset_memory(self) -> None:
        """Does nothing: memory is reset by ``dones`` and ``truncateds``."""

    def get_memory(self) -> dict[str, Any]:
        """All that is remembered, as plain tensors and lists; a component that gets it goes on bit for bit."""
        self._flush()
        rollout, row_store = self._stores(self._device())
        return {"rollout_store": rollout.dump(), "row_store": row_store.dump()}

    def set_memory(self, memory: dict[str, Any]) -> None:
        """Restore what :meth:`get_memory` gave.

        Raises:
            ValueError: it belongs to another stack; nothing is changed then.
        """
        rollout, row_store = self._stores(self._device())
        before = rollout.dump()
        rollout.load(memory["rollout_store"])
        try:
            row_store.load(memory["row_store"])
        except ValueError:
            rollout.load(before)
            raise
        self._live_ids = self._live_state = None

    def _device(self) -> torch.device | str:
        return next((parameter.device for parameter in self.stack.parameters()), "cpu")

    def experience_keys(self) -> dict[str, tuple[int, ...]]:
        """What a rollout must record for training: shapes by key, without the batch."""
        return {"training_env_ids": (1,), "row_id": (), "t_in_row": (), "dones": (), "truncateds": ()}

    def get_agent_experience_spec(self) -> dict[str, ExperienceField]:
        """Shapes and dtypes of :meth:`experience_keys`: long for ids, float32 for flags."""
        return {
            key: ExperienceField(shape, torch.float32 if key in ("dones", "truncateds") else torch.long)
            for key, shape in self.experience_keys().items()
        }


def _by_row(value: Tensor, key: str, rows: int, length: int) -> Tensor:
    """``[B, T]``, or ``[B, 1]`` for one value per row."""
    if value.numel() == rows * length:
        return value.reshape(rows, length)
    if value.numel() == rows:
        return value.reshape(rows, 1)
    if value.dim() == 2 and value.shape[0] == rows and length == 1 and value.shape[1]:
        return value
    raise ValueError(f"{key}: shape {list(value.shape)}, expected [{rows}], [{rows}, 1] or [{rows}, {length}]")
