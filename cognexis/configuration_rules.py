"""The rules that the architecture settings obey, as plain functions over a dictionary of fields.

Each rule that does not hold is one sentence "field=value: reason"; all of them are collected before anything is
built, so that a user sees every fault at once. Rules that divide or compare run only when the values they need are
sound by themselves.
"""

import difflib
import math
import os
import re
from importlib.util import find_spec
from typing import Any, NoReturn

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import ConfigFault, InvalidConfigError

FFN_ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
NORM_TYPES = ("rmsnorm", "layernorm")
LAYER_TYPES = ("full_attention", "sliding_attention", "cortex")
REGISTERED_LAYER_TYPES: dict[str, bool] = {}  # users' own, by name: whether the layer has a state over time
STAGES = ("prelude", "core", "coda")
HARD_MAX_LOOPS = 65_536

_CHOICES: dict[str, tuple[str, ...]] = {
    "ffn_activation": FFN_ACTIVATIONS,
    "norm_type": NORM_TYPES,
    "final_norm": (*NORM_TYPES, "none"),
    "recurrent_residual_mode": ("fixed", "depth_scaled", "learned_scalar", "learned_vector"),
    "recurrent_norm": ("none", "closing", "sandwich"),
    "recurrent_init": ("h0", "random"),
    "input_injection": ("none", "residual", "concat_project", "gate_condition", "attention_memory"),
    "injection_site": ("pre", "post"),
    "injection_projection": ("linear", "identity"),
    "state_retention": ("final_only", "all", "selected", "checkpointed"),
}
_ROPE_NEEDS = {  # numbers that each rotary scaling needs
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_TYPES = tuple(_ROPE_NEEDS)
_ROPE_KEYS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
)
VALUE_OUTPUT_KINDS = ("predicted_gain", "continue_logit", "risk_adjusted_gain", "uncertainty")
VALUE_FEATURES = (
    *("hidden_delta", "relative_delta", "state_norm", "h0_norm"),
    *("confidence", "margin", "entropy", "prediction_change"),
)
_VALUE_HEAD_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("token", "sequence"),
    "output_kind": VALUE_OUTPUT_KINDS,
    "loop_index_policy": ("clamp", "error"),
}
_VALUE_HEAD_SIZES = {"bottleneck_size": (4, 512), "max_loops_embedded": (0, HARD_MAX_LOOPS)}
_VALUE_HEAD_DEFAULTS: dict[str, Any] = {  # "kind" has none
    "bottleneck_size": 64,
    "max_loops_embedded": 0,
    "loop_index_policy": "clamp",
    "output_kind": "predicted_gain",
    "features": (),
}
MAX_LABELS = 2**20
_PROBABILITIES = (
    *("attention_dropout", "ffn_dropout", "embedding_dropout", "classifier_dropout"),
    *("prelude_stochastic_depth", "recurrent_stochastic_depth", "coda_stochastic_depth"),
)
_SIZE_LIMITS = {  # field: (smallest, largest) accepted; the caps refuse absurd sizes before anything is allocated
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "num_attention_heads": (1, 2**16),
    "num_key_value_heads": (1, 2**16),
    "head_dim": (2, 2**16),
    "max_position_embeddings": (1, 2**31 - 1),
    "num_prelude_blocks": (0, 2**16),
    "num_recurrent_blocks": (1, 2**10),
    "num_coda_blocks": (0, 2**16),
    "trained_max_loops": (1, HARD_MAX_LOOPS),
    "max_loops": (1, HARD_MAX_LOOPS),
    "min_loops": (1, HARD_MAX_LOOPS),
    "default_loops": (1, HARD_MAX_LOOPS),
    "kv_slots": (1, HARD_MAX_LOOPS),
    "backprop_loops": (1, HARD_MAX_LOOPS),
    "sliding_window": (1, 2**31 - 1),
    "ffn_multiple_of": (1, 2**16),
}
# What a stage may have of its own, with the type; the head width is shared because the rotary table is.
_STAGE_OVERRIDES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "intermediate_size"), int),
    **dict.fromkeys(("ffn_activation", "norm_type"), str),
    **dict.fromkeys(("attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("rms_norm_eps", "attention_dropout", "ffn_dropout"), (float, int)),
}


def swiglu_width(hidden_size: int, multiple_of: int = 256) -> int:
    """Feed-forward width 8/3 x ``hidden_size``, rounded up to a multiple (4096 and 256 give 11008)."""
    return -(-8 * hidden_size // (3 * multiple_of)) * multiple_of  # rounded up, in whole numbers


def nearest_name(name: str, known: Any, cutoff: float = 0.6) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def derived_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Fill the fields left at None."""
    v = dict(values)
    if v["intermediate_size"] is None:
        v["intermediate_size"] = swiglu_width(v["hidden_size"], v["ffn_multiple_of"] or 256)
    if v["num_key_value_heads"] is None:
        heads = v["num_attention_heads"]
        v["num_key_value_heads"] = heads // 4 if heads % 4 == 0 else heads
    if v["head_dim"] is None and v["num_attention_heads"] > 0:
        v["head_dim"] = v["hidden_size"] // v["num_attention_heads"]
    for name in ("max_loops", "kv_slots", "default_loops"):
        if v[name] is None:
            v[name] = v["trained_max_loops"] if name == "max_loops" else v["max_loops"]
    return v


def unknown_key_fault(key: str, known: Any, cutoff: float = 0.0) -> ConfigFault | None:
    """The fault of an unknown key; with a ``cutoff`` only if the key is that close to a known one."""
    near = nearest_name(key, known, cutoff or 0.6)
    return ConfigFault(key or "''", reason=f"unknown key{near}") if near or not cutoff else None


def config_error(faults: list[ConfigFault], kind: type[InvalidConfigError] = InvalidConfigError) -> InvalidConfigError:
    """One error that lists all ``faults``."""
    head = "invalid configuration" if len(faults) == 1 else f"invalid configuration, {len(faults)} faults"
    return kind(f"{head}: " + "; ".join(faults), faults=faults)


def architecture_faults(values: dict[str, Any], only: set[str] | None = None) -> list[ConfigFault]:
    """Every broken rule of a complete, correctly typed set of fields, as "field=value: reason".

    Args:
        values: all fields; None means "derive".
        only: with other fields unusable, check these by themselves and leave out the rules between fields.
    """
    v = derived_fields(values)
    faults: list[ConfigFault] = []

    def rule(name: str, holds: bool, reason: str) -> None:
        if not holds and (only is None or name in only):
            faults.append(ConfigFault(name, v[name], reason))

    for name, (low, high) in _SIZE_LIMITS.items():
        rule(name, v[name] is None or low <= v[name] <= high, f"must be between {low} and {high}")
    for name, choices in _CHOICES.items():
        rule(name, v[name] in choices, f"must be one of {', '.join(choices)}{nearest_name(v[name], choices)}")
    for name in _PROBABILITIES:
        rule(name, 0 <= v[name] < 1, "must be a probability in [0, 1)")
    for name in ("embedding_scale", "rms_norm_eps", "initializer_range"):
        rule(name, _is_finite(v[name]) and v[name] > 0, "must be finite and positive")
    for name in ("recurrent_residual_scale", "injection_scale"):
        rule(name, _is_finite(v[name]) and v[name] >= 0, "must be finite and not negative")
    rule("gate_init_bias", _is_finite(v["gate_init_bias"]), "must be finite")
    rule("global_tokens", v["global_tokens"] >= 0, "must be 0 or more")
    if only is not None:
        return faults + (_rope_faults(v | {"head_dim": None}) if "rope_parameters" in only else [])
    if faults:
        return faults + _rope_faults(v | {"head_dim": None})  # the rules below divide by and compare these values

    heads, kv = v["num_attention_heads"], v["num_key_value_heads"]
    rule(
        "hidden_size",
        v["hidden_size"] == heads * v["head_dim"],
        f"must equal num_attention_heads * head_dim = {heads} * {v['head_dim']} = {heads * v['head_dim']}",
    )
    rule("num_attention_heads", heads % kv == 0, f"must be a multiple of num_key_value_heads={kv}")
    if v["ffn_multiple_of"] is not None:
        aligned = v["intermediate_size"] % v["ffn_multiple_of"] == 0
        rule("intermediate_size", aligned, f"must be a multiple of ffn_multiple_of={v['ffn_multiple_of']}")
    rule("max_loops", v["max_loops"] >= v["min_loops"], f"must be at least min_loops={v['min_loops']}")
    bounds = f"must lie between min_loops={v['min_loops']} and max_loops={v['max_loops']}"
    rule("default_loops", v["min_loops"] <= v["default_loops"] <= v["max_loops"], bounds)
    multi = v["num_recurrent_blocks"] == 1 or v["experimental_multi_block"]
    rule("num_recurrent_blocks", multi, "more than one core block needs experimental_multi_block=True")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = v[name] if isinstance(v[name], list) else [v[name]]
        inside = all(i is None or 0 <= i < v["vocab_size"] for i in ids)
        rule(name, inside, f"must lie in the vocabulary, 0 to {v['vocab_size'] - 1}")
    for stage, count in (("prelude", "prelude"), ("core", "recurrent"), ("coda", "coda")):
        name = f"{stage}_layer_types"
        if (kinds := v[name]) is not None:
            rule(
                name,
                len(kinds) == v[f"num_{count}_blocks"],
                f"needs num_{count}_blocks={v[f'num_{count}_blocks']}",
            )
            known = (*LAYER_TYPES, *REGISTERED_LAYER_TYPES)
            rule(name, all(k in known for k in kinds), f"entries must be one of {', '.join(known)}")
    sliding = any("sliding_attention" in (v[f"{s}_layer_types"] or ()) for s in STAGES)
    rule(
        "sliding_window",
        not sliding or v["sliding_window"] is not None,
        "sliding_attention layers need a window",
    )
    rule("sliding_window", sliding or v["sliding_window"] is None, "no layer type is sliding_attention")
    rule("global_tokens", sliding or not v["global_tokens"], "needs a sliding_attention layer")
    needs_gate = v["input_injection"] == "gate_condition"
    rule("input_injection", not needs_gate or v["recurrent_gating"], "needs recurrent_gating=True")
    rule(
        "gate_loop_embedding",
        not v["gate_loop_embedding"] or v["recurrent_gating"],
        "needs recurrent_gating=True",
    )
    enters = v["input_injection"] != "none"
    rule("recurrent_init", enters or v["recurrent_init"] == "h0", "a random start needs an input_injection")
    rule(
        "backprop_loops",
        enters or v["backprop_loops"] is None,
        "needs an input_injection, or the prelude never learns",
    )
    states = v["selected_states"]
    rule(
        "selected_states",
        all(1 <= s <= v["max_loops"] for s in states),
        f"must lie in 1..max_loops={v['max_loops']}",
    )
    rule(
        "selected_states",
        bool(states) == (v["state_retention"] == "selected"),
        "goes with state_retention='selected'",
    )
    faults += _cortex_faults(v)
    faults += [fault.below("value_head") for fault in value_head_faults(v["value_head"])]
    return faults + _rope_faults(v) + _override_faults(v)


def has_time_state(layer_type: str) -> bool:
    """Whether layers of this type carry a state over time rather than keys and values."""
    return layer_type == "cortex" or REGISTERED_LAYER_TYPES.get(layer_type, False)


def mask_kind(layer_type: str) -> str:
    """Which mask a layer of this type reads; registered layers without a state see all earlier tokens."""
    if has_time_state(layer_type):
        return "linear_attention"
    return layer_type if layer_type in LAYER_TYPES else "full_attention"


def _cortex_faults(v: dict[str, Any]) -> list[ConfigFault]:
    """Every broken rule of Cortex layers; the library is imported only where there are some.

    Raises:
        ImportError: a package that they need is not installed.
    """
    stages = [stage for stage in STAGES if "cortex" in (v[f"{stage}_layer_types"] or ())]
    settings = v["cortex"]
    faults = []
    if v["input_injection"] == "attention_memory" and any(map(has_time_state, v["core_layer_types"] or ())):
        reason = "needs attention in the core, whose layers carry a state over time"
        faults.append(ConfigFault("input_injection", v["input_injection"], reason))
    if not stages:
        return faults + ([] if settings is None else [ConfigFault("cortex", settings, "no layer type is cortex")])
    if settings is None:
        return [*faults, ConfigFault("cortex", None, 'cortex layers need a description, such as {"pattern": "AXMS"}')]
    try:
        from cognexis.cortex_layers.layer_settings import layer_faults, stage_settings
    except ImportError as error:
        if missing := [name for name in ("pydantic", "tensordict") if find_spec(name) is None]:
            names = " ".join(missing)
            raise ImportError(f"Cortex layers need packages that were not found: run `pip install {names}`") from error
        return [*faults, ConfigFault("cortex", settings, str(error))]
    unused = [stage for stage in STAGES if stage in settings and stage not in stages]
    faults += [ConfigFault(f"cortex.{stage}", settings[stage], "the stage has no cortex layer") for stage in unused]
    for stage in stages:
        inner = f"cortex.{stage}" if stage in settings else "cortex"
        if not isinstance(described := stage_settings(settings, stage), dict):
            faults.append(ConfigFault(inner, described, 'must describe a stack, such as {"pattern": "AXMS"}'))
            continue
        for name, reason in layer_faults(settings, stage, v["hidden_size"]):
            faults.append(ConfigFault(f"{inner}.{name}" if name else inner, described, reason))
    return list({str(fault): fault for fault in faults}.values())


def value_head_faults(settings: dict[str, Any] | None) -> list[ConfigFault]:
    """Every broken rule of the field ``value_head``; None, which stands for no head, breaks none."""
    if settings is None:
        return []
    known = ("kind", *_VALUE_HEAD_DEFAULTS)
    faults = [fault for key in settings if key not in known and (fault := unknown_key_fault(str(key), known))]
    for name, choices in _VALUE_HEAD_CHOICES.items():
        if (value := settings.get(name, _VALUE_HEAD_DEFAULTS.get(name))) not in choices:
            near = nearest_name(value, choices) if isinstance(value, str) else ""
            faults.append(ConfigFault(name, value, f"must be one of {', '.join(choices)}{near}"))
    for name, (low, high) in _VALUE_HEAD_SIZES.items():
        value = settings.get(name, _VALUE_HEAD_DEFAULTS[name])
        if not (_has_type(value, int) and low <= value <= high):
            faults.append(ConfigFault(name, value, f"must be an integer between {low} and {high}"))
    features = settings.get("features", ())
    if not isinstance(features, (list, tuple)):
        return [*faults, ConfigFault("features", features, "must be a list of names")]
    for index, name in enumerate(features):
        if name not in VALUE_FEATURES:
            near = nearest_name(name, VALUE_FEATURES) if isinstance(name, str) else ""
            faults.append(ConfigFault("features", name, f"must be one of {', '.join(VALUE_FEATURES)}{near}"))
        elif name in features[:index]:
            faults.append(ConfigFault("features", name, "stands twice"))
    return faults


def value_head_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The field ``value_head`` with every default filled in.

    Raises:
        InvalidConfigError: lists every broken rule.
    """
    if faults := [fault.below("value_head") for fault in value_head_faults(settings)]:
        raise config_error(faults)
    complete = {"kind": settings["kind"], **_VALUE_HEAD_DEFAULTS, **settings}
    return complete | {"features": list(complete["features"])}


def _rope_faults(v: dict[str, Any]) -> list[ConfigFault]:
    rope = v["rope_parameters"] or {}
    if nested := sorted(k for k in rope if k in LAYER_TYPES):
        reason = "one set of rotary parameters serves all layer types"
        return [ConfigFault(f"rope_parameters.{nested[0]}", reason=reason)]
    if strange := [key for key in rope if key not in _ROPE_KEYS]:
        return [
            ConfigFault(f"rope_parameters.{k}", reason=f"unknown key{nearest_name(str(k), _ROPE_KEYS)}")
            for k in strange
        ]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES:
        return [ConfigFault("rope_parameters.rope_type", kind, f"must be one of {', '.join(_ROPE_TYPES)}")]
    faults = []

    def rule(key: str, holds: Any, allowed: str, default: Any) -> None:
        value = rope.get(key, default)
        if not (_is_finite(value) and holds(value)):
            faults.append(ConfigFault(f"rope_parameters.{key}", value, f"must be {allowed}"))

    rule("rope_theta", lambda x: x > 1, "finite and above 1", 1e4)
    rule("partial_rotary_factor", lambda x: 0 < x <= 1, "in (0, 1]", 1.0)
    for key in _ROPE_NEEDS[kind]:
        rule(key, lambda x: x > 0, "finite and positive", None)
    rule("factor", lambda x: x >= 1, "finite and at least 1", 1.0)
    named = {fault.path.split(".")[-1] for fault in faults}
    for key in rope.keys() - named:
        if _has_type(rope[key], (int, float)) and not _is_finite(rope[key]):
            faults.append(ConfigFault(f"rope_parameters.{key}", rope[key], "must be finite"))
    if faults or not v["head_dim"]:
        return faults
    rotated = int(v["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    if rotated < 2 or rotated % 2:
        reason = f"rotary embedding needs an even number of rotated features, got {rotated}"
        if "partial_rotary_factor" in rope:
            reason = f"of head_dim={v['head_dim']}, {reason}"
            return [ConfigFault("rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], reason)]
        return [ConfigFault("head_dim", v["head_dim"], reason)]
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors: Any = rope.get(key)
        is_list = isinstance(factors, list) and all(_is_finite(x) and x > 0 for x in factors)
        if not is_list or len(factors) != rotated // 2:
            reason = f"must be a list of {rotated // 2} positive numbers"
            faults.append(ConfigFault(f"rope_parameters.{key}", factors, reason))
    return faults


def _override_faults(v: dict[str, Any]) -> list[ConfigFault]:
    faults: list[ConfigFault] = []
    for stage, overrides in (v["stage_overrides"] or {}).items():
        place = f"stage_overrides.{stage}"
        if stage not in STAGES:
            faults.append(ConfigFault(place, reason=f"must be one of {', '.join(STAGES)}"))
            continue
        if not isinstance(overrides, dict):
            faults.append(ConfigFault(place, overrides, "must be a dictionary of fields"))
            continue
        for key in overrides:
            if key not in _STAGE_OVERRIDES:
                near = nearest_name(str(key), _STAGE_OVERRIDES)
                reason = f"cannot differ by stage{near}; allowed: {', '.join(_STAGE_OVERRIDES)}"
                faults.append(ConfigFault(f"{place}.{key}", reason=reason))
        known = {k: value for k, value in overrides.items() if k in _STAGE_OVERRIDES}
        wrong = {k: w for k, w in known.items() if not _has_type(w, _STAGE_OVERRIDES[k])}
        if wrong:
            faults += [ConfigFault(f"{place}.{k}", w, "has the wrong type") for k, w in wrong.items()]
            continue
        merged = v | {"stage_overrides": None} | known
        merged["hidden_size"] = merged["num_attention_heads"] * v["head_dim"]  # a declared projection width
        faults += [f.below(place) for f in architecture_faults(merged) if f.path in _STAGE_OVERRIDES]
    return faults


def _has_type(value: Any, wanted: type | tuple[type, ...]) -> bool:
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except (OverflowError, TypeError):  # an integer beyond every float, or no number at all
        return False


def type_faults(cls: Any, values: dict[str, Any]) -> dict[str, ConfigFault]:
    """Faults of the fields whose value has the wrong type, by field."""
    faults = {}
    for name, value in values.items():
        for validator in cls.__validators__.get(name, ()):
            try:
                validator(value)
            except (TypeError, ValueError):
                wanted = getattr(cls.__dataclass_fields__[name].type, "__name__", cls.__dataclass_fields__[name].type)
                reason = f"must be of type {wanted}, got {type(value).__name__}"
                faults[name] = ConfigFault(name, value, reason)
    return faults


def inherited_faults(values: dict[str, Any]) -> dict[str, ConfigFault]:
    """Faults of labels and output switches, which transformers keeps as it finds them."""
    faults = {}
    count, names, ids = (values.get(name) for name in ("num_labels", "id2label", "label2id"))
    if count is not None and not (_has_type(count, int) and 0 <= count <= MAX_LABELS):
        faults["num_labels"] = ConfigFault("num_labels", count, f"must be a number of labels, 0 to {MAX_LABELS}")

    def is_id(key: Any) -> bool:
        return _has_type(key, int) or (isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key) is not None)

    if isinstance(names, dict) and not all(is_id(key) and isinstance(name, str) for key, name in names.items()):
        faults["id2label"] = ConfigFault("id2label", names, "must map ids to texts")
    if isinstance(ids, dict) and not all(isinstance(name, str) and _has_type(i, int) for name, i in ids.items()):
        faults["label2id"] = ConfigFault("label2id", ids, "must map texts to ids")
    for name in ("output_hidden_states", "output_attentions", "return_dict"):
        if (value := values.get(name)) is not None and not isinstance(value, bool):
            faults[name] = ConfigFault(name, value, "must be True or False")
    return faults


# -- files ------------------------------------------------------------------------------------------------------------

MAX_JSON_BYTES = 4 * 2**20


def read_json_file(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file that nobody vouches for.

    Raises:
        InvalidConfigError: the file is too large, nested too deeply, not UTF-8, not JSON, names a key twice, holds a
            number that is not finite, or is something else than one object.
        OSError: the file cannot be read.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise InvalidConfigError(f"{path}: not a file", path=str(path))
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    return parse_json(data, os.path.basename(path), max_bytes)


def parse_json(data: bytes, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse one JSON object with the limits of :func:`read_json_file`; ``name`` stands in the messages."""

    def refuse(reason: str) -> NoReturn:
        raise InvalidConfigError(f"{name}: {reason}", path=name, reason=reason)

    if len(data) > max_bytes:
        refuse(f"larger than {max_bytes} bytes")
    value = parse_strict_json(data, refuse)
    if not isinstance(value, dict):
        refuse(f"must hold one object, got {type(value).__name__}")
    return value


def code_map_faults(code_map: Any) -> list[ConfigFault]:
    """Faults of an ``auto_map``: each class must stand in a file beside the configuration, "module.Class"."""
    if not isinstance(code_map, dict):
        return [ConfigFault("auto_map", code_map, "must be a dictionary of class names")]
    faults = []
    for key, target in code_map.items():
        for name in target if isinstance(target, (list, tuple)) else [target]:
            if not (name is None or (isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", name))):
                reason = "must name a class in a file of the same folder, as 'module.Class'"
                faults.append(ConfigFault(f"auto_map.{key}", target, reason))
    return faults
