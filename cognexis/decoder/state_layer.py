"""A layer with memory over time in place of a transformer block: a Cortex stack, or a layer of the user's own.

    y = x + a (stack(x) - x)

The stack brings its own norms, residuals and feed-forward layers, so ``a`` is 1 outside the core, and in the core the
residual scale of the recurrence (``config.residual_scale``, or learned). Letters: B batch, T time, H hidden width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from cognexis.configuration_rules import (
    LAYER_TYPES,
    REGISTERED_LAYER_TYPES,
    has_time_state,
)
from cognexis.errors import InvalidConfigError

LayerBuilder = Callable[[Any, str, Sequence[int]], nn.Module]
_BUILDERS: dict[str, LayerBuilder] = {}


def register_layer_type(name: str, builder: LayerBuilder, *, has_state: bool = True) -> None:
    """Make ``name`` a layer type, for ``prelude_layer_types``, ``core_layer_types`` and ``coda_layer_types``.

    Args:
        name: the layer type; not one of the package's own.
        builder: called as ``builder(config, stage, slots)``, with ``stage`` "prelude", "core" or "coda" and the
            key/value slots of the layer, one per loop in the core; returns the layer.
        has_state: the layer is called like a ``CortexStack``, ``y, state = layer(x, state, resets=mask)`` on
            ``[B, T, H]``, and has ``init_state``. Otherwise it is called like a transformer block,
            ``y = layer(x, position_embeddings=..., attention_mask=..., past_key_values=..., loop_index=...)``.

    A folder that such a model is saved to loads only where the same name has been registered.

    Raises:
        InvalidConfigError: the name is one of the package's, or belongs to another builder.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidConfigError(f"name={name!r}: must be an identifier, such as 'my_memory'", path="name", value=name)
    if name in LAYER_TYPES or _BUILDERS.get(name, builder) is not builder:
        raise InvalidConfigError(f"name={name!r}: is a layer type already", path="name", value=name)
    if not callable(builder):
        raise InvalidConfigError(f"builder={builder!r}: must be callable", path="builder", value=builder)
    _BUILDERS[name] = builder
    REGISTERED_LAYER_TYPES[name] = bool(has_state)


class StackStart:
    """The start values of a stack's parameters, for those that a checkpoint lacks; drawn when first asked for."""

    def __init__(self, config: Any, layer_type: str, stage: str, stack: nn.Module) -> None:
        self.config, self.layer_type, self.stage = config, layer_type, stage
        self.is_drawn = not any(parameter.is_meta for parameter in stack.parameters())
        self._fresh: dict[str, Tensor] | None = None
        for name, module in stack.named_modules():  # transformers initialises module by module
            module.own_start = (self, f"{name}." if name else "")

    def draw(self, module: nn.Module, prefix: str) -> None:
        """Give ``module``, whose tensors have names that begin with ``prefix``, its start where it has none yet."""
        if self.is_drawn:
            return
        if self._fresh is None:
            with torch.device("cpu"):
                stack = _build(self.config, self.layer_type, self.stage, ())
            self._fresh = dict(stack.named_parameters()) | dict(stack.named_buffers())
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            init.copy_(tensor, self._fresh[prefix + name].detach())


class StateLayer(nn.Module):
    """A stack in the residual stream.

    Args:
        config: the model's configuration.
        layer_type: "cortex", or a registered type with a state.
        stage: "prelude", "core" or "coda".
        slots: slot of each loop in the cache (one entry outside the core).
        residual_mode: "fixed" keeps ``residual_scale``; "learned_scalar" and "learned_vector" train it.
        residual_scale: ``a`` of the equation, or its start value.
    """

    def __init__(
        self,
        config: Any,
        layer_type: str,
        stage: str,
        slots: Sequence[int],
        *,
        residual_mode: str = "fixed",
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.slots = list(slots)
        self.stack = _build(config, layer_type, stage, slots)
        self.residual_scale_init = residual_scale
        self.residual_scale: float | nn.Parameter = residual_scale
        if residual_mode in ("learned_scalar", "learned_vector"):
            shape = (1,) if residual_mode == "learned_scalar" else (config.hidden_size,)
            self.residual_scale = nn.Parameter(torch.full(shape, residual_scale))
        StackStart(config, layer_type, stage, self.stack)

    def add_slot(self, slot: int) -> None:
        """Serve one loop more."""
        self.slots.append(slot)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        loop_index: int = 0,
        resets: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map ``[B, T, H]`` to ``[B, T, H]``.

        Args:
            hidden_states: input of the layer.
            past_key_values: holds the state between calls; None begins anew.
            loop_index: loop from 0; chooses the slot.
            resets: bool ``[B, T]``, the state begins anew before these tokens.
        """
        if past_key_values is None:
            rows, device, dtype = len(hidden_states), hidden_states.device, hidden_states.dtype
            state = self.stack.init_state(rows, device=device, dtype=dtype, traces=False)  # type: ignore[operator]
            update, _ = self.stack(hidden_states, state, resets=resets)
        else:
            update = past_key_values.advance(self.stack, hidden_states, self.slots[loop_index], resets)
        if isinstance(self.residual_scale, float) and self.residual_scale == 1.0:
            return update
        return hidden_states + self.residual_scale * (update - hidden_states)


class CognexisStateBlock(GradientCheckpointingLayer, StateLayer):
    """A layer of the prelude or the coda: recomputed in the backward pass when checkpointing is on."""


class ForeignBlock(GradientCheckpointingLayer):
    """A registered layer without a state over time, called like a transformer block."""

    def __init__(self, config: Any, layer_type: str, stage: str, slots: Sequence[int]) -> None:
        super().__init__()
        self.layer = _build(config, layer_type, stage, slots)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, T, H]`` to ``[B, T, H]``."""
        return self.layer(hidden_states, **kwargs)


def _build(config: Any, layer_type: str, stage: str, slots: Sequence[int]) -> nn.Module:
    if layer_type == "cortex":
        from cognexis.cortex_layers.layer_settings import build_layer

        return build_layer(config.cortex, stage, config.hidden_size)
    return _BUILDERS[layer_type](config, stage, slots)


def compiles_as_one_graph(model: nn.Module) -> bool:
    """Whether a step of ``model`` can be one compiled graph; torch's own LSTM and GRU layers cannot be part of one."""
    return not any(isinstance(module, nn.RNNBase) for module in model.modules())


def is_attention(layer_type: str) -> bool:
    """Whether this is one of the package's attention layers."""
    return layer_type in LAYER_TYPES and not has_time_state(layer_type)
