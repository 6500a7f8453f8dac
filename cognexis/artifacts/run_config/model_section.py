"""The ``model`` section: the fields of CognexisConfig, checked by CognexisConfig, plus ``variant`` and ``dtype``.

There is no second copy of the architecture rules here. The section accepts the class's aliases and the nested
groups ``attention``, ``rope``, ``ffn`` and ``recurrent``; what it stores and writes is the flat form. Attributes hold
the effective values, derived ones included; which of them were given is remembered.
"""

import copy
import inspect
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

from cognexis.artifacts.run_config.section import DTYPE_ALIASES, spelled
from cognexis.configuration_cognexis import CognexisConfig
from cognexis.configuration_rules import config_error, nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError

ARCHITECTURE_FIELDS = tuple(
    name for name, kind in inspect.get_annotations(CognexisConfig).items() if ClassVar not in (kind, get_origin(kind))
)
# Nested spelling -> flat field. Those with a meaning of their own are handled in _spread.
NESTED: dict[str, dict[str, str]] = {
    "attention": {
        **{name: name for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias")},
        **{name: name for name in ("sliding_window", "global_tokens")},
        "num_kv_heads": "num_key_value_heads",
        "bias": "attention_bias",
        "dropout": "attention_dropout",
    },
    "rope": {"max_position_embeddings": "max_position_embeddings"},
    "ffn": {
        "activation": "ffn_activation",
        "intermediate_dim": "intermediate_size",
        "intermediate_size": "intermediate_size",
        "multiple_of": "ffn_multiple_of",
        "bias": "mlp_bias",
        "dropout": "ffn_dropout",
    },
    "recurrent": {
        **{name: name for name in ("max_loops", "min_loops", "default_loops", "trained_max_loops", "kv_slots")},
        **{name: name for name in ("backprop_loops", "input_injection", "injection_scale", "injection_site")},
        **{name: name for name in ("injection_projection", "gate_loop_embedding", "gate_init_bias")},
        **{name: name for name in ("state_retention", "selected_states")},
        "residual_scale": "recurrent_residual_scale",
        "residual_scale_mode": "recurrent_residual_mode",
        "gating": "recurrent_gating",
        "norm": "recurrent_norm",
        "init": "recurrent_init",
        "stochastic_depth": "recurrent_stochastic_depth",
    },
}
SPELLINGS = (*ARCHITECTURE_FIELDS, *CognexisConfig.attribute_map, *NESTED, "rope_theta")
_OWN_NESTED = {
    "attention": ("variant",),
    "rope": ("theta", "partial_rotary_factor", "scaling"),
    "ffn": (),
    "recurrent": ("return_intermediate_states",),
}
_VARIANTS = ("mha", "gqa", "mqa")


def flat_model_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a ``model`` section under their canonical flat names.

    Raises:
        InvalidConfigError: a group is no mapping, a nested name is unknown, or a setting is given twice.
    """
    flat: dict[str, Any] = {}
    origin: dict[str, str] = {}
    faults: list[ConfigFault] = []

    def put(name: str, value: Any, spelling: str) -> None:
        if name in flat:
            faults.append(ConfigFault(spelling, reason=f"given twice, also as {origin[name]!r}"))
        flat[name], origin[name] = value, spelling

    for key, value in given.items():
        if key == "rope_theta":
            put("rope_parameters", {"rope_type": "default", "rope_theta": value}, key)
            continue
        if key not in NESTED:
            put(CognexisConfig.attribute_map.get(key, key), value, key)
            continue
        if not isinstance(value, dict):
            faults.append(ConfigFault(key, value, "must be a mapping of settings"))
            continue
        for name, inner in value.items():
            spelling = f"{key}.{name}"
            if name in NESTED[key]:
                put(NESTED[key][name], inner, spelling)
            elif name not in _OWN_NESTED[key]:
                near = nearest_name(str(name), (*NESTED[key], *_OWN_NESTED[key]))
                faults.append(ConfigFault(spelling, reason=f"unknown key{near}"))
        for field, inner, spelling, fault in _spread(key, value):
            if fault:
                faults.append(ConfigFault(spelling, inner, fault))
            else:
                put(field, inner, spelling)
    recurrent = given.get("recurrent")
    if isinstance(recurrent, dict):  # the nested form knows one maximum, and its scale is meant to be used
        if "max_loops" in recurrent and "trained_max_loops" not in flat:
            flat["trained_max_loops"] = recurrent["max_loops"]
        if "residual_scale" in recurrent and "recurrent_residual_mode" not in flat:
            flat["recurrent_residual_mode"] = "fixed"
    faults += _variant_faults(given.get("attention"), flat)
    if faults:
        raise config_error(faults)
    return flat


def _spread(group: str, settings: dict[str, Any]) -> list[tuple[str, Any, str, str]]:
    """Nested settings that are no plain renaming: rows (field, value, spelling, fault)."""
    rows: list[tuple[str, Any, str, str]] = []
    if group == "rope" and any(name in settings for name in _OWN_NESTED["rope"]):
        scaling = settings.get("scaling") or {"type": "none"}
        scaling = {"type": scaling} if isinstance(scaling, str) else scaling
        if not isinstance(scaling, dict):
            return [("", scaling, "rope.scaling", "must be a mapping with the key type")]
        kind = scaling.get("type", scaling.get("rope_type", "none"))
        rope = {"rope_type": "default" if kind == "none" else kind}
        rope |= {k: v for k, v in scaling.items() if k not in ("type", "rope_type")}
        rope |= {"rope_theta": settings["theta"]} if "theta" in settings else {}
        rope |= {k: settings[k] for k in ("partial_rotary_factor",) if k in settings}
        rows.append(("rope_parameters", rope, "rope", ""))
    if group == "recurrent" and "return_intermediate_states" in settings:
        value, spelling = settings["return_intermediate_states"], "recurrent.return_intermediate_states"
        if not isinstance(value, bool):
            rows.append(("", value, spelling, "must be true or false"))
        elif "state_retention" not in settings:
            rows.append(("state_retention", "all" if value else "final_only", spelling, ""))
        elif value != (settings["state_retention"] == "all"):
            rows.append(("", value, spelling, "contradicts recurrent.state_retention"))
    return rows


def _variant_faults(attention: Any, flat: dict[str, Any]) -> list[ConfigFault]:
    """``attention.variant`` follows from the head counts here, so it fills them in or must agree with them."""
    variant = attention.get("variant") if isinstance(attention, dict) else None
    if variant is None:
        return []
    if variant not in _VARIANTS:
        reason = f"must be one of {', '.join(_VARIANTS)}; sliding windows are chosen by the layer types"
        return [ConfigFault("attention.variant", variant, reason)]
    heads = flat.get("num_attention_heads", CognexisConfig.num_attention_heads)
    if variant != "gqa":
        flat.setdefault("num_key_value_heads", heads if variant == "mha" else 1)
    kv = flat.get("num_key_value_heads")
    actual = "mha" if kv == heads else "mqa" if kv == 1 else "gqa"
    if kv is None or actual == variant:
        return []
    return [ConfigFault("attention.variant", variant, f"{heads} heads with {kv} key/value heads are {actual}")]


class ModelSection(BaseModel):
    """The architecture, flat. ``variant`` names a preset that the other settings change."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="allow", protected_namespaces=(), use_attribute_docstrings=True
    )

    variant: str | None = None
    """preset whose settings hold unless they are given too"""
    dtype: Annotated[Literal["bf16", "fp16", "fp32", "fp64"], spelled(DTYPE_ALIASES)] | None = "bf16"
    """format of the weights; null: as they are stored"""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="wrap")
    @classmethod
    def _through_the_configuration(cls, data: Any, handler: Any) -> Any:
        if not isinstance(data, dict):
            return handler(data)
        given = flat_model_settings(data)
        architecture = {name: copy.deepcopy(value) for name, value in given.items() if name not in cls.model_fields}
        strange = {name for name in architecture if name not in ARCHITECTURE_FIELDS}
        if strange:
            known = (*SPELLINGS, *cls.model_fields)
            faults = [
                ConfigFault(name or "''", reason=f"unknown key{nearest_name(str(name), known)}") for name in strange
            ]
            for name in strange:
                del architecture[name]
            raise config_error(sorted(faults) + _faults_of(given.get("variant"), architecture)[1])
        config, faults = _faults_of(given.get("variant"), architecture)
        if faults:
            raise config_error(faults)
        own = {name: given[name] for name in cls.model_fields if name in given}
        section = handler(own | {name: copy.deepcopy(getattr(config, name)) for name in ARCHITECTURE_FIELDS})
        object.__setattr__(section, "__pydantic_fields_set__", set(given))
        return section

    def config(self) -> CognexisConfig:
        """The configuration that a model is built from; its ``dtype`` is set."""
        names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
        values: dict[str, Any] = {name: copy.deepcopy(getattr(self, name)) for name in ARCHITECTURE_FIELDS}
        if self.dtype is not None:
            values["dtype"] = names[self.dtype]
        return CognexisConfig(**values)


def _faults_of(variant: Any, settings: dict[str, Any]) -> tuple[CognexisConfig | None, list[ConfigFault]]:
    try:
        if variant is None:
            return CognexisConfig(**settings), []
        return CognexisConfig.from_variant(variant, **settings), []
    except InvalidConfigError as error:
        return None, error.faults
