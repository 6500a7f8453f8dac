"""The parts that can be taken out, each as settings of a run configuration.

``retrained`` says what to train without the part; ``switched`` says how a trained model is run without it. A part on
which the weights depend has no ``switched`` form: those weights were fitted around it, and a model that loses it
measures the damage and not the worth of the part. A part that acts only when the model is used has no ``retrained``
form.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cognexis.artifacts.run_config import RunConfig, resolve
from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.layers import NO_ATTENTION, NO_FEED_FORWARD, NO_NORM
from cognexis.eval_harness.ablations.overriding import nested

_STAGES = ("prelude", "core", "coda")


@dataclass(frozen=True)
class Component:
    """A part of the model or of its use.

    Attributes:
        name: name in results.
        part: what is taken out, in words.
        hypothesis: what its loss is expected to do.
        absent: says why a configuration lacks the part already; empty if it has it.
        retrained: settings to train without it; None if training does not know the part.
        switched: settings to run a trained model without it; None if the weights depend on it.
        side_effect: what else changes; empty if nothing does.
    """

    name: str
    part: str
    hypothesis: str
    absent: Callable[[RunConfig], str]
    retrained: Callable[[RunConfig], Mapping[str, Any]] | None = None
    switched: Callable[[RunConfig], Mapping[str, Any]] | None = None
    side_effect: Callable[[RunConfig], str] = lambda config: ""

    def overrides(self, config: RunConfig, *, trained: bool) -> dict[str, Any]:
        """The changed settings as a document.

        Args:
            trained: the weights exist and stay as they are.

        Raises:
            InvalidConfigError: the configuration lacks the part, or trained weights depend on it.
        """
        if reason := self.absent(config):
            raise InvalidConfigError(f"{self.name}: {reason}", path=self.name, reason=reason)
        form = self.switched if trained else self.retrained or self.switched
        if form is None:
            reason = f"needs training: the weights were fitted with {self.part}"
            raise InvalidConfigError(f"{self.name}: {reason}", path=self.name, reason=reason)
        return nested(form(config))


def _same(settings: Mapping[str, Any]) -> Callable[[RunConfig], Mapping[str, Any]]:
    return lambda config: settings


def _without(holds: Callable[[Any], bool], reason: str) -> Callable[[RunConfig], str]:
    return lambda config: "" if config.model is not None and holds(config.model) else reason


def _one_loop(config: RunConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {"model.min_loops": 1, "model.default_loops": 1, **_one_loop_in_use(config)}
    if config.training is not None:
        names = ("min_loops", "initial_max_loops", "target_max_loops")
        settings |= {f"training.loop_curriculum.{name}": 1 for name in names}
        settings |= {"training.loop_curriculum.milestones": {}, "training.loop_curriculum.mode": "fixed"}
        settings |= {"training.losses.multi_depth": {"depths": [], "weights": []}}
    return settings


def _one_loop_in_use(config: RunConfig) -> dict[str, Any]:
    return {
        "inference.loop_mode": "fixed",
        "inference.halt_dependency": None,
        "inference.scheduler.type": "fixed",
        "inference.num_loops": 1,
        "inference.min_loops": 1,
        "evaluation.loop_counts": [1],
    }


def _fewer_blocks(stage: str) -> Callable[[RunConfig], Mapping[str, Any]]:
    def settings(config: RunConfig) -> Mapping[str, Any]:
        found: dict[str, Any] = {f"model.num_{stage}_blocks": 0, f"model.{stage}_layer_types": None}
        model: Any = config.model
        if model.stage_overrides and stage in model.stage_overrides:
            kept = {name: value for name, value in model.stage_overrides.items() if name != stage}
            found["model.stage_overrides"] = kept or None
        return found

    return settings


def _layers(replacement: str) -> Callable[[RunConfig], Mapping[str, Any]]:
    """Every attention block replaced; layers with memory over time stay."""

    def settings(config: RunConfig) -> Mapping[str, Any]:
        model: Any = config.model.config() if config.model is not None else None
        return {
            f"model.{stage}_layer_types": [
                replacement if kind == "full_attention" else kind for kind in model.stage_layer_types(stage)
            ]
            for stage in _STAGES
        }

    return settings


def _has_no_blocks(config: RunConfig) -> str:
    if config.model is None:
        return "the base has no model section"
    model = config.model.config()
    kinds = [kind for stage in _STAGES for kind in model.stage_layer_types(stage)]
    if "sliding_attention" in kinds:
        return "sliding_attention layers have no form without this part; use full_attention in the base"
    if model.input_injection == "attention_memory":
        return "input_injection='attention_memory' reads keys of the core block; use another injection in the base"
    return "" if "full_attention" in kinds else "the base has no transformer blocks"


def _no_norms(config: RunConfig) -> Mapping[str, Any]:
    return {**_layers(NO_NORM)(config), "model.final_norm": "none", "model.recurrent_norm": "none"}


def _fixed_mode(config: RunConfig) -> Mapping[str, Any]:
    highest = resolve(config).inference.max_loops
    return {
        "inference.loop_mode": "fixed",
        "inference.halt_dependency": None,
        "inference.scheduler.type": "fixed",
        "inference.num_loops": highest,
    }


def _sequence_mode(config: RunConfig) -> Mapping[str, Any]:
    return {"inference.loop_mode": "adaptive_sequence", "inference.halt_dependency": None}


def _rule_scheduler(config: RunConfig) -> Mapping[str, Any]:
    return {"inference.scheduler": {"type": "rule_based", "min_delta": config.inference.scheduler.min_delta}}


def _no_head(config: RunConfig) -> Mapping[str, Any]:
    settings: dict[str, Any] = {"model.value_head": None}
    if config.training is not None:
        settings |= {"training.losses.lambda_value": 0.0, "training.losses.lambda_continue": 0.0}
    uses_it = config.inference.scheduler.type in _HEAD_SCHEDULERS
    return settings | (dict(_rule_scheduler(config)) if uses_it else {})


def _head_is_absent(config: RunConfig) -> str:
    has_head = config.model is not None and config.model.value_head is not None
    return "" if has_head or config.inference.scheduler.type in _HEAD_SCHEDULERS else "the base has no value head"


def _mode_is_fixed(config: RunConfig) -> str:
    return "inference.loop_mode is fixed in the base" if config.inference.loop_mode == "fixed" else ""


def _gate_stays(config: RunConfig) -> str:
    if config.model is None or not config.model.recurrent_gating:
        return "the base has no gate (model.recurrent_gating is false)"
    needed = config.model.input_injection == "gate_condition"
    return "input_injection='gate_condition' needs the gate; use another injection in the base" if needed else ""


def _closing_side_effect(config: RunConfig) -> str:
    sandwich = config.model is not None and config.model.recurrent_norm == "sandwich"
    return "the norms after each sub-layer of the core go too" if sandwich else ""


_HEAD_SCHEDULERS = ("value_head", "hybrid", "act")

_LIST = (
    Component(
        "no_recurrent",
        "the repetition of the core",
        "one pass of the core is worse at the same parameters",
        _without(lambda model: model.default_loops > 1, "the base runs one loop"),
        _one_loop,
        _one_loop_in_use,
    ),
    Component(
        "fixed_only",
        "adaptive halting",
        "running every token to the bound costs more and is not better",
        _mode_is_fixed,
        switched=_fixed_mode,
    ),
    Component(
        "no_prelude",
        "the prelude",
        "the core has to do the work of the prelude in each loop",
        _without(lambda model: model.num_prelude_blocks > 0, "the base has no prelude"),
        _fewer_blocks("prelude"),
    ),
    Component(
        "no_coda",
        "the coda",
        "the state after the last loop serves the head less well",
        _without(lambda model: model.num_coda_blocks > 0, "the base has no coda"),
        _fewer_blocks("coda"),
    ),
    Component(
        "no_gating",
        "the gate of the core",
        "without a gate deep runs are less stable",
        _gate_stays,
        _same({"model.recurrent_gating": False, "model.gate_loop_embedding": False}),
    ),
    Component(
        "no_injection",
        "the injection of the input into every loop",
        "deep runs forget the input",
        _without(lambda model: model.input_injection != "none", "the base has no injection"),
        _same({"model.input_injection": "none", "model.recurrent_init": "h0", "model.backprop_loops": None}),
    ),
    Component(
        "no_residual_scaling",
        "the residual scale of the core",
        "branches at full strength are less stable",
        _without(
            lambda model: model.recurrent_residual_mode != "fixed" or model.recurrent_residual_scale != 1.0,
            "the base has no residual scaling (a fixed scale of 1)",
        ),
        _same({"model.recurrent_residual_mode": "fixed", "model.recurrent_residual_scale": 1.0}),
    ),
    Component(
        "no_value_head",
        "the value head",
        "rules halt less well than learned gains",
        _head_is_absent,
        _no_head,
        _rule_scheduler,
    ),
    Component(
        "no_tokenwise",
        "halting of single tokens",
        "rows that stop as a whole need more loops for the same quality",
        lambda config: "" if config.inference.loop_mode == "adaptive_token" else "the base halts no single tokens",
        switched=_sequence_mode,
    ),
    Component(
        "no_attention",
        "attention",
        "without other tokens only the frequency of pairs is learned",
        _has_no_blocks,
        _layers(NO_ATTENTION),
    ),
    Component(
        "no_ffn",
        "the feed-forward layers",
        "attention alone is worse at fewer parameters",
        _has_no_blocks,
        _layers(NO_FEED_FORWARD),
    ),
    Component(
        "no_norm",
        "all norms",
        "deep runs diverge",
        _has_no_blocks,
        _no_norms,
    ),
    Component(
        "no_closing_norm",
        "the norm that closes every loop",
        "the state keeps moving and deep runs are worse",
        _without(lambda model: model.recurrent_norm != "none", "the base has no closing norm"),
        _same({"model.recurrent_norm": "none"}),
        side_effect=_closing_side_effect,
    ),
)
COMPONENTS: dict[str, Component] = {component.name: component for component in _LIST}


def component(name: str) -> Component:
    """The component of this name.

    Raises:
        InvalidConfigError: there is none; names the nearest.
    """
    if name not in COMPONENTS:
        reason = f"unknown component{nearest_name(name, COMPONENTS)}; known: {', '.join(COMPONENTS)}"
        raise InvalidConfigError(f"{name!r}: {reason}", path=name, value=name, reason=reason)
    return COMPONENTS[name]
