"""A stack as one layer of a language model, described by plain JSON.

The description is either a whole stack, ``{"stack": {...}}`` (its ``d_hidden`` may be left out), or a pattern of
columns with what goes with it; see :class:`LayerSettings`. ``{"core": {...}}``, and likewise "prelude" and "coda",
describes the layers of one stage and replaces the rest there.
"""

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from cognexis.cortex_layers.config import (
    AnyBlock,
    BlockConfig,
    CellConfig,
    CortexStackConfig,
    Count,
    RouterConfig,
    StrictConfig,
    config_by_tag,
)
from cognexis.cortex_layers.matmul_cost import stack_matmul_flops
from cognexis.cortex_layers.stacks.auto import build_cortex_auto_config
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.stacks.build import build_cortex

LAYER_STAGES = ("prelude", "core", "coda")

_AnyConfig = Annotated[SerializeAsAny[CellConfig] | SerializeAsAny[BlockConfig], BeforeValidator(config_by_tag)]


class LayerSettings(StrictConfig):
    """What a layer is made of.

    Attributes:
        stack: a whole stack; goes with nothing else.
        pattern: one pattern of experts, or a list with one per column.
        num_layers: columns of a single pattern.
        custom_tokens: blocks by symbol, for the pattern.
        overrides: cells or blocks; the fields that they set go into every one of their type.
        router: settings of every column's router.
        use_axonlayers: put a caret on every token that has such a form.
        post_norm: a norm behind the columns; the model has norms of its own.
    """

    stack: dict[str, Any] | None = None
    pattern: str | list[str] | None = None
    num_layers: Annotated[Count, Field(ge=1, le=1024)] = 1
    custom_tokens: dict[str, AnyBlock] = Field(default_factory=dict)
    overrides: list[_AnyConfig] = Field(default_factory=list)
    router: RouterConfig | None = None
    use_axonlayers: bool = False
    post_norm: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> "LayerSettings":
        others = sorted(self.model_fields_set - {"stack"})
        if self.stack is None and not self.pattern:
            raise ValueError("pattern: is required, or a whole stack; for example 'AXMS'")
        if self.stack is not None and others:
            raise ValueError(f"stack: is complete by itself; leave out {', '.join(others)}")
        if isinstance(self.pattern, list) and "num_layers" in self.model_fields_set:
            raise ValueError("num_layers: a list of patterns has one column each; leave it out")
        return self

    def stack_config(self, width: int) -> CortexStackConfig:
        """The stack at ``width``.

        Raises:
            ValueError: an unknown token, or a stack of another width.
        """
        if self.stack is not None:
            config = CortexStackConfig.model_validate({"d_hidden": width, **self.stack})
            if config.d_hidden != width:
                raise ValueError(f"stack.d_hidden={config.d_hidden}: must be hidden_size={width}")
            return config
        assert self.pattern is not None
        return build_cortex_auto_config(
            d_hidden=width,
            num_layers=self.num_layers if isinstance(self.pattern, str) else None,
            pattern=self.pattern,
            custom_map=self.custom_tokens,
            router=self.router,
            post_norm=self.post_norm,
            override_global_configs=self.overrides,
            use_axonlayers=self.use_axonlayers,
        )


def stage_settings(settings: Mapping[str, Any], stage: str) -> dict[str, Any] | None:
    """The description of the layers of ``stage``; None where there is none."""
    shared = {key: value for key, value in settings.items() if key not in LAYER_STAGES}
    return settings.get(stage, shared or None)


def layer_stack_config(settings: Mapping[str, Any], stage: str, width: int) -> CortexStackConfig:
    """The stack of a layer of ``stage`` at ``width``.

    Raises:
        ValidationError, ValueError: the description is wrong.
    """
    return LayerSettings.model_validate(stage_settings(settings, stage)).stack_config(width)


def layer_faults(settings: Mapping[str, Any], stage: str, width: int) -> list[tuple[str, str]]:
    """What is wrong with the description of ``stage``: dotted names and reasons; built without memory to find out."""
    try:
        with torch.device("meta"):
            build_cortex(layer_stack_config(settings, stage, width))
    except ValidationError as error:
        return [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    except (ValueError, TypeError) as error:
        return [("", str(error))]
    return []


def build_layer(settings: Mapping[str, Any], stage: str, width: int) -> CortexStack:
    """The stack of a layer of ``stage`` at ``width``."""
    return build_cortex(layer_stack_config(settings, stage, width))


def layer_flops(settings: Mapping[str, Any], stage: str, width: int, num_tokens: int) -> int:
    """Operations of a layer's matrix products for one row of ``num_tokens`` tokens; see ``stack_matmul_flops``."""
    return _flops(*_described(settings, stage, width), num_tokens)


def layer_state_size(settings: Mapping[str, Any], stage: str, width: int) -> int:
    """Numbers in the state of one row of a layer."""
    return _state_size(*_described(settings, stage, width))


def _described(settings: Mapping[str, Any], stage: str, width: int) -> tuple[str, int]:
    return json.dumps(stage_settings(settings, stage), sort_keys=True), width


@functools.lru_cache(maxsize=64)
def _without_memory(description: str, width: int) -> CortexStack:
    with torch.device("meta"):
        return build_cortex(LayerSettings.model_validate(json.loads(description)).stack_config(width))


@functools.lru_cache(maxsize=4096)
def _flops(description: str, width: int, num_tokens: int) -> int:
    return stack_matmul_flops(_without_memory(description, width), num_tokens)


@functools.lru_cache(maxsize=64)
def _state_size(description: str, width: int) -> int:
    state = _without_memory(description, width).init_state(1, device="meta", traces=False)
    return sum(t.numel() for t in state.values(True, True))
