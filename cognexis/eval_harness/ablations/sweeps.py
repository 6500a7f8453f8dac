"""Sweeps: one setting, several values, each value an experiment of its own.

A sweep has a name from the table below, or is the path of any setting (``model.injection_scale``). The values of the
table are those that are tried when a plan gives none. Settings that would contradict a value follow it: a core that is
trained to 2 loops cannot draw 8. A value that the base has is the
baseline itself and not run again.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cognexis.artifacts.run_config import RunConfig
from cognexis.artifacts.run_config.inference_section import SCHEDULER_FIELDS, SCHEDULER_NAMES
from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.components import component
from cognexis.eval_harness.ablations.overriding import nested

Settings = Callable[[Any, RunConfig], Mapping[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """Values of one factor.

    Attributes:
        factor: what changes, in words.
        values: those of a plan that gives none.
        settings: the changed settings of a value, by path.
        absent: says why they have no effect in a configuration; empty if they have.
    """

    factor: str
    values: tuple[Any, ...]
    settings: Settings
    absent: Callable[[RunConfig], str] = lambda config: ""


def _sets(*paths: str, also: Mapping[str, Any] | None = None) -> Settings:
    return lambda value, config: {**dict.fromkeys(paths, value), **(also or {})}


def _max_loops(value: Any, config: RunConfig) -> Mapping[str, Any]:
    model: Any = config.model
    settings = {"model.trained_max_loops": value, "model.max_loops": value, "model.kv_slots": value}
    settings |= {"model.default_loops": min(model.default_loops, value), "evaluation.loop_counts": None}
    settings |= {f"inference.{name}": None for name in ("num_loops", "max_loops")}
    if config.training is not None:
        settings |= {"training.loop_curriculum.target_max_loops": None}
        settings |= {"training.loop_curriculum.initial_max_loops": None}
    return settings


def _min_loops(value: Any, config: RunConfig) -> Mapping[str, Any]:
    settings: dict[str, Any] = {"model.min_loops": value, "inference.min_loops": value}
    if config.training is not None:
        settings |= {"training.loop_curriculum.min_loops": value, "training.loop_curriculum.initial_max_loops": None}
    return settings


def _heads(value: Any, config: RunConfig) -> Mapping[str, Any]:
    model: Any = config.model
    kept = model.num_key_value_heads if value % model.num_key_value_heads == 0 else value
    return {"model.num_attention_heads": value, "model.num_key_value_heads": kept, "model.head_dim": None}


def _rope_scaling(value: Any, config: RunConfig) -> Mapping[str, Any]:
    model: Any = config.model
    kept = {name: model.rope_parameters[name] for name in ("rope_theta",) if name in model.rope_parameters}
    return {"model.rope_parameters": {"rope_type": "linear", "factor": value, **kept}}


def _curriculum(value: Any, config: RunConfig) -> Mapping[str, Any]:
    place = "training.loop_curriculum"
    if value == "fixed":
        return {f"{place}.mode": "fixed"}
    return {f"{place}.mode": "ramp_then_sample", f"{place}.sampling_distribution": value}


def _loop_mode(value: Any, config: RunConfig) -> Mapping[str, Any]:
    dependency = "prefix" if value == "adaptive_token" else None
    kind = "fixed" if value == "fixed" else "rule_based"
    same = config.inference.scheduler.type if config.inference.loop_mode != "fixed" and value != "fixed" else kind
    return {
        "inference.loop_mode": value,
        "inference.halt_dependency": dependency,
        "inference.scheduler.type": same,
    }


def _over_range(value: Any, config: RunConfig) -> Mapping[str, Any]:
    model: Any = config.model
    loops = max(1, round(value * model.trained_max_loops))
    return {"inference.num_loops": loops, "inference.max_loops": loops, "inference.research_override": True} | {
        "evaluation.loop_counts": [loops]
    }


def _has_no_gate(config: RunConfig) -> str:
    has_gate = config.model is not None and config.model.recurrent_gating
    return "" if has_gate else "the base has no gate"


def _unread(field: str) -> Callable[[RunConfig], str]:
    """Why a field of the scheduler has no effect."""

    def reason(config: RunConfig) -> str:
        kind = config.inference.scheduler.type
        if config.inference.loop_mode == "fixed":
            return "inference.loop_mode is fixed in the base, so no scheduler is asked"
        return "" if field in SCHEDULER_FIELDS[kind] else f"the base's scheduler {kind} does not read it"

    return reason


def _scheduler_sweep(factor: str, values: tuple[Any, ...], field: str) -> Sweep:
    setting = f"inference.scheduler.{SCHEDULER_NAMES.get(field, field)}"
    return Sweep(factor, values, _sets(setting), _unread(field))


SWEEPS: dict[str, Sweep] = {
    "max_loops": Sweep("loops in training", (2, 4, 8, 12), _max_loops),
    "min_loops": Sweep("fewest loops", (1, 2, 4), _min_loops),
    "residual_scale": Sweep(
        "residual scale of the core",
        (0.25, 0.5, 1.0),
        _sets("model.recurrent_residual_scale", also={"model.recurrent_residual_mode": "fixed"}),
    ),
    "injection_scale": Sweep(
        "strength of the injection",
        (0.1, 0.5, 1.0),
        _sets("model.injection_scale"),
        component("no_injection").absent,
    ),
    "gate_init": Sweep("start of the gate's bias", (-2.0, 0.0, 2.0), _sets("model.gate_init_bias"), _has_no_gate),
    "prelude_blocks": Sweep(
        "blocks of the prelude",
        (0, 1, 2),
        _sets("model.num_prelude_blocks", also={"model.prelude_layer_types": None}),
    ),
    "coda_blocks": Sweep(
        "blocks of the coda", (0, 1, 2), _sets("model.num_coda_blocks", also={"model.coda_layer_types": None})
    ),
    "hidden_size": Sweep("width", (64, 128, 256), _sets("model.hidden_size", also={"model.head_dim": None})),
    "heads": Sweep("query heads", (1, 2, 4), _heads),
    "kv_heads": Sweep("key/value heads", (1, 2, 4), _sets("model.num_key_value_heads")),
    "ffn_width": Sweep("width of the feed-forward layers", (128, 256, 512), _sets("model.intermediate_size")),
    "norm_epsilon": Sweep("epsilon of the norms", (1e-6, 1e-5, 1e-4), _sets("model.rms_norm_eps")),
    "rope_scaling": Sweep("linear scaling of positions", (2.0, 4.0), _rope_scaling),
    "curriculum": Sweep("draw of the loop counts", ("fixed", "uniform", "geometric", "stratified"), _curriculum),
    "gradient_clip": Sweep(
        "largest gradient norm (null: none)", (0.5, 1.0, None), _sets("training.optimization.gradient_clip_norm")
    ),
    "norm_type": Sweep("kind of norm", ("rmsnorm", "layernorm"), _sets("model.norm_type", "model.final_norm")),
    "value_threshold": _scheduler_sweep(
        "gain of another loop below which a token halts", (1e-4, 5e-4, 2e-3), "gain_threshold"
    ),
    "scheduler_min_delta": _scheduler_sweep(
        "change of the state below which a token halts", (0.01, 0.03, 0.1), "min_delta"
    ),
    "scheduler_confidence": _scheduler_sweep(
        "probability above which a token halts", (0.8, 0.9, 0.95), "confidence_threshold"
    ),
    "scheduler_cost": _scheduler_sweep("cost of a loop", (0.5, 1.0, 2.0), "loop_cost"),
    "scheduler_risk": _scheduler_sweep("gain that uncertainty costs", (0.0, 0.5, 1.0), "risk_weight"),
    "loop_mode": Sweep("who ends the loops", ("fixed", "adaptive_sequence", "adaptive_token"), _loop_mode),
    "over_range_loops": Sweep("loops as a multiple of those in training", (1.5, 2.0, 4.0), _over_range),
}


def sweep(name: str) -> Sweep:
    """The sweep of this name, or of the setting at this path.

    Raises:
        InvalidConfigError: there is none; names the nearest.
    """
    if name in SWEEPS:
        return SWEEPS[name]
    if "." in name:
        return Sweep(name, (), _sets(name))
    reason = f"unknown sweep{nearest_name(name, SWEEPS)}; known: {', '.join(SWEEPS)}, or the path of a setting"
    raise InvalidConfigError(f"{name!r}: {reason}", path=name, value=name, reason=reason)


def expanded(name: str, values: Sequence[Any] | None, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Overrides by name of the experiment, one for each value.

    Raises:
        InvalidConfigError: the sweep is unknown, has no values, or no effect in this configuration.
    """
    found = sweep(name)
    if reason := found.absent(config):
        raise InvalidConfigError(f"sweeps.{name}: {reason}", path=f"sweeps.{name}", reason=reason)
    chosen = list(found.values if values is None else values)
    if not chosen:
        reason = "needs a list of one value or more"
        raise InvalidConfigError(f"sweeps.{name}: {reason}", path=f"sweeps.{name}", value=values, reason=reason)
    return {f"{name}={_shown(value)}": nested(found.settings(value, config)) for value in chosen}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def folder_name(name: str) -> str:
    """``name`` as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name)
