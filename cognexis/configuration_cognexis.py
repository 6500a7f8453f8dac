"""Architecture settings of a Cognexis model, their rules and the named sizes.

Three stages follow the embedding: ``num_prelude_blocks`` blocks run once, one shared core runs L loops,
``num_coda_blocks`` blocks run once. Therefore

    effective_depth(L) = num_prelude_blocks + L * num_recurrent_blocks + num_coda_blocks

while the stored blocks stay the same whatever L is. What transformers calls ``num_hidden_layers`` is the number of
key/value slots: prelude, coda, one per core block with attention memory, then ``kv_slots`` per core block, in this
order, so that a slot's index never moves when the number of loops changes.

Three maxima, one meaning each: ``trained_max_loops`` belongs to the weights (labels, residual scale),
``max_loops`` bounds a request, ``default_loops`` is used when a request says nothing.
"""

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging

from cognexis.checkpoints.commit import finish_interrupted_save, staged_folder
from cognexis.checkpoints.manifest import MANIFEST_FILE, refresh_manifest
from cognexis.configuration_rules import (
    HARD_MAX_LOOPS,
    STAGES,
    architecture_faults,
    code_map_faults,
    config_error,
    derived_fields,
    has_time_state,
    inherited_faults,
    nearest_name,
    read_json_file,
    swiglu_width,
    type_faults,
    unknown_key_fault,
)
from cognexis.configuration_sizes import PUBLISHED_SIZES, TRAINABLE_SIZES, VARIANTS
from cognexis.errors import ConfigFault, InvalidConfigError

logger = logging.get_logger(__name__)

# Keys that transformers and its companions write into a config.json or pass to a config besides declared fields.
_FOREIGN_KEYS = frozenset(
    {
        *("auto_map", "model_type", "transformers_version", "torch_dtype", "num_labels", "name_or_path"),
        *("_name_or_path", "_commit_hash", "attn_implementation", "_attn_implementation", "experts_implementation"),
        *("output_attentions", "rope_theta", "rope_scaling", "partial_rotary_factor", "per_layer_config"),
        *("quantization_config", "tie_last_hidden_states", "task_specific_params", "tokenizer_class", "is_decoder"),
        *("use_return_dict", "is_causal"),
    }
)
_ALWAYS_DERIVED = (
    *("intermediate_size", "num_key_value_heads", "head_dim", "max_loops", "default_loops", "kv_slots"),
)
_DERIVED_KEYS = ("num_hidden_layers", "layer_types")  # properties here; a stored value is ignored

AUTO_MAP = {
    "AutoConfig": "configuration_cognexis.CognexisConfig",
    "AutoModel": "modeling_cognexis.CognexisModel",
    "AutoModelForCausalLM": "modeling_cognexis.CognexisForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cognexis.CognexisForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_cognexis.CognexisForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_cognexis.CognexisForQuestionAnswering",
}


@dataclass(frozen=True)
class BlockSpec:
    """What one transformer block is made of: the configuration of a stage with its overrides applied."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    ffn_activation: str
    norm_type: str
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    attention_dropout: float
    ffn_dropout: float


@strict
class CognexisConfig(PreTrainedConfig):
    """Every architecture field of a Cognexis model; strict, keyword-only, saved as ``config.json``.

    Sizes are counts of features, heads, blocks, loops or positions. ``None`` means "derive": ``intermediate_size``
    from :func:`swiglu_width`, ``num_key_value_heads`` as a quarter of the heads where that divides, ``head_dim`` as
    ``hidden_size / num_attention_heads``, ``max_loops``, ``default_loops`` and ``kv_slots`` from
    ``trained_max_loops``. The specification's spellings (``hidden_dim``, ``num_kv_heads``, ``tie_embeddings``, ...)
    are accepted as aliases and ``num_loops`` is one of ``default_loops``.

    Raises:
        InvalidConfigError: lists every fault at once: an unknown key (with the nearest valid name), a wrong type, a
            value out of range, sizes that contradict each other.
    """

    model_type = "cognexis"
    keys_to_ignore_at_inference: ClassVar = [
        *(
            "past_key_values",
            "loop_counts",
            "effective_depth",
            "halt_reasons",
            "loop_diagnostics",
            "loop_states",
        ),
    ]
    attribute_map: ClassVar = {
        "hidden_dim": "hidden_size",
        "intermediate_dim": "intermediate_size",
        "num_kv_heads": "num_key_value_heads",
        "tie_embeddings": "tie_word_embeddings",
        "norm_epsilon": "rms_norm_eps",
        "num_loops": "default_loops",
    }
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}
    base_model_tp_plan: ClassVar = {
        f"{stage}.blocks.*.{name}": style
        for stage in ("prelude", "recurrent", "coda")
        for name, style in {
            **{f"attention.{p}_proj": "colwise" for p in "qkv"},
            "attention.o_proj": "rowwise",
            "feed_forward.gate_proj": "colwise",
            "feed_forward.up_proj": "colwise",
            "feed_forward.down_proj": "rowwise",
        }.items()
    }
    base_model_fsdp_plan: ClassVar = {
        "embed_tokens": "free_full_weight",
        "prelude.blocks.*": "free_full_weight",
        "recurrent": "keep_full_weight",  # one gather per step, however many loops run
        "coda.blocks.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    # Vocabulary and width
    vocab_size: int = 50_000
    hidden_size: int = 4096
    intermediate_size: int | None = None
    ffn_multiple_of: int | None = None
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    attention_dropout: float | int = 0.0
    ffn_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    embedding_scale: float | int = 1.0
    ffn_activation: str = "swiglu"
    norm_type: str = "rmsnorm"
    final_norm: str = "rmsnorm"
    rms_norm_eps: float | int = 1e-5
    rope_parameters: dict | None = None
    max_position_embeddings: int = 8192
    sliding_window: int | None = None
    global_tokens: int = 0
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2
    # Stages
    num_prelude_blocks: int = 8
    num_recurrent_blocks: int = 1
    num_coda_blocks: int = 8
    prelude_layer_types: list[str] | None = None
    core_layer_types: list[str] | None = None
    coda_layer_types: list[str] | None = None
    stage_overrides: dict | None = None
    experimental_multi_block: bool = False
    document_boundary_attention: bool = True
    # Loops
    trained_max_loops: int = 12
    max_loops: int | None = None
    min_loops: int = 1
    default_loops: int | None = None
    kv_slots: int | None = None
    backprop_loops: int | None = None
    # Recurrence
    recurrent_residual_mode: str = "depth_scaled"
    recurrent_residual_scale: float | int = 0.5
    recurrent_gating: bool = True
    gate_init_bias: float | int = 0.0
    gate_loop_embedding: bool = False
    input_injection: str = "residual"
    injection_scale: float | int = 0.1
    injection_site: str = "pre"
    injection_projection: str = "linear"
    recurrent_init: str = "h0"
    recurrent_norm: str = "none"
    state_retention: str = "final_only"
    selected_states: list[int] = field(default_factory=list)
    prelude_stochastic_depth: float | int = 0.0
    recurrent_stochastic_depth: float | int = 0.0
    coda_stochastic_depth: float | int = 0.0
    # Companions of the weights
    cortex: dict | None = None
    value_head: dict | None = None
    tokenizer_checksum: str | None = None

    # -- the pattern of slots ------------------------------------------------------------------------------------

    @property
    def first_loop_slot(self) -> int:
        """Index of the first slot of loop 1: prelude, coda and attention-memory slots come before it."""
        memory = self.num_recurrent_blocks if self.input_injection == "attention_memory" else 0
        return self.num_prelude_blocks + self.num_coda_blocks + memory

    @property
    def loop_slots(self) -> int:
        """Loops that have a slot of their own: ``kv_slots``, or fewer while ``num_hidden_layers`` caps them."""
        return min(self.loop_cap or HARD_MAX_LOOPS, self.kv_slots or 1)

    @property
    def loop_cap(self) -> int | None:
        """Loops allowed while a caller has lowered ``num_hidden_layers`` (early-exit drafting); None without."""
        return self.__dict__.get("_loop_cap")

    @property
    def num_hidden_layers(self) -> int:
        """Number of key/value slots. Derived, never stored; a smaller value set later caps the loops."""
        return self.first_loop_slot + self.loop_slots * self.num_recurrent_blocks

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        is_count = isinstance(value, int) and not isinstance(value, bool)
        loops = (value - self.first_loop_slot) // self.num_recurrent_blocks if is_count else 0
        if loops < 1:
            raise InvalidConfigError(
                f"num_hidden_layers={value!r} leaves no loop: at least "
                f"{self.first_loop_slot + self.num_recurrent_blocks} slots are needed "
                f"({self.first_loop_slot} before the core, {self.num_recurrent_blocks} per loop)",
                path="num_hidden_layers",
                value=value,
            )
        self.__dict__.pop("_loop_cap", None)
        if loops < (self.kv_slots or 1):
            self.__dict__["_loop_cap"] = loops

    @property
    def layer_types(self) -> list[str]:
        """One entry per slot, in transformers' own words (see :meth:`slot_kind`)."""
        core = self.stage_layer_types("core")
        memory = ["full_attention"] * len(core) if self.input_injection == "attention_memory" else []
        kinds = [*self.stage_layer_types("prelude"), *self.stage_layer_types("coda"), *memory]
        return [self.slot_kind(kind) for kind in kinds + core * self.loop_slots]

    def slot_kind(self, layer_type: str) -> str:
        """What the slot of a layer holds: "linear_attention" stands for a state over time.

        Global tokens need keys that are never dropped.
        """
        if has_time_state(layer_type):
            return "linear_attention"
        is_windowed = layer_type == "sliding_attention" and not self.global_tokens
        return "sliding_attention" if is_windowed else "full_attention"

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends to keys, and so depends on positions."""
        return any(not has_time_state(kind) for stage in STAGES for kind in self.stage_layer_types(stage))

    @property
    def has_time_state(self) -> bool:
        """Whether any layer carries a state over time."""
        return any(has_time_state(kind) for stage in STAGES for kind in self.stage_layer_types(stage))

    def stage_layer_types(self, stage: str) -> list[str]:
        """The layer type of each block of ``stage`` ("prelude", "core" or "coda")."""
        count = self.num_recurrent_blocks if stage == "core" else getattr(self, f"num_{stage}_blocks")
        kinds = getattr(self, f"{stage}_layer_types")
        return ["full_attention"] * count if kinds is None else list(kinds)

    # -- derived facts -------------------------------------------------------------------------------------------

    def effective_depth(self, num_loops: int | None = None) -> int:
        """Blocks that a token passes at ``num_loops`` loops (``default_loops`` when None)."""
        loops = (self.default_loops or 1) if num_loops is None else num_loops
        return self.num_prelude_blocks + loops * self.num_recurrent_blocks + self.num_coda_blocks

    @property
    def num_unique_blocks(self) -> int:
        """Stored blocks, the shared core counted once."""
        return self.effective_depth(1)

    @property
    def residual_scale(self) -> float:
        """Residual scale of the core block (the initial value where it is learned)."""
        if self.recurrent_residual_mode == "depth_scaled":
            return 1.0 / math.sqrt(self.trained_max_loops)
        return float(self.recurrent_residual_scale)

    @property
    def attention_variant(self) -> str:
        """ "mha", "gqa" or "mqa", from the head counts."""
        if self.num_key_value_heads == self.num_attention_heads:
            return "mha"
        return "mqa" if self.num_key_value_heads == 1 else "gqa"

    def block_spec(self, stage: str) -> BlockSpec:
        """The block of ``stage`` ("prelude", "core" or "coda") with the stage's overrides applied."""
        values = {f.name: getattr(self, f.name) for f in fields(BlockSpec)}
        return BlockSpec(**values | (self.stage_overrides or {}).get(stage, {}))

    @property
    def nonstandard_features(self) -> list[str]:
        """Experimental or quality-affecting choices that reports must name."""
        features = {
            "multi_block_core": self.num_recurrent_blocks > 1,
            "no_prelude": self.num_prelude_blocks == 0,
            "no_coda": self.num_coda_blocks == 0,
            "untied_head": not self.tie_word_embeddings,
            "no_final_norm": self.final_norm == "none",
            "cortex_layers": self.has_time_state,
            "sliding_window": any("sliding_attention" in self.stage_layer_types(s) for s in STAGES),
            "global_tokens": self.global_tokens > 0,
            "stage_overrides": bool(self.stage_overrides),
            "gate_loop_embedding": self.gate_loop_embedding,
            "random_initial_state": self.recurrent_init == "random",
            "rope_scaling": (self.rope_parameters or {}).get("rope_type", "default") != "default",
        }
        return [name for name, present in features.items() if present]

    @property
    def stability_controls(self) -> list[str]:
        """The measures in this configuration that keep the repeated core from exploding or collapsing."""
        controls = {
            "pre_norm": True,
            "residual_scale": self.recurrent_residual_mode.startswith("learned") or self.residual_scale < 1.0,
            "gate": self.recurrent_gating,
            "closing_norm": self.recurrent_norm in ("closing", "sandwich"),
            "input_injection": self.input_injection != "none",
        }
        return [name for name, present in controls.items() if present]

    @property
    def auto_map(self) -> dict[str, str]:
        """Where the Auto classes find the code that travels with a saved model; absent on a config without a home."""
        if self._code_writer is not None and not self.name_or_path:
            raise AttributeError("auto_map: this configuration was not loaded from a folder that carries code")
        return dict(AUTO_MAP)

    @auto_map.setter
    def auto_map(self, value: dict[str, str] | None) -> None:
        if value is not None and (faults := code_map_faults(value)):
            raise config_error(faults)

    # -- construction --------------------------------------------------------------------------------------------

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value in derived_fields({f.name: getattr(self, f.name) for f in fields(self)}).items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)
        if self.input_injection == "attention_memory":
            memory = {f"recurrent.blocks.*.attention.memory_{p}_proj": "colwise" for p in "kv"}
            self.__dict__["base_model_tp_plan"] = type(self).base_model_tp_plan | memory

    def validate_architecture(self) -> None:
        """Check every rule again; run by ``validate()`` and before saving."""
        names = (*_ALWAYS_DERIVED, "rope_parameters")
        if unset := [ConfigFault(name, None, "must have a value") for name in names if getattr(self, name) is None]:
            raise config_error(unset)
        if faults := architecture_faults({f.name: getattr(self, f.name) for f in fields(self)}):
            raise config_error(faults)

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "CognexisConfig":
        """Return a named size, with ``overrides`` applied.

        Args:
            name: one of :data:`VARIANTS`; the prefix may be missing, and case, spaces and underscores do not matter
                ("8b", "Cognexis 1.28T", "1280b", "tiny").

        Raises:
            InvalidConfigError: for an unknown name, or overrides that break a rule.
        """
        key = str(name).strip().lower().replace("_", "-").replace(" ", "-").removeprefix("cognexis-")
        key = "cognexis-" + key.replace("1280b", "1.28t")
        if key in TRAINABLE_SIZES:
            return cls(**TRAINABLE_SIZES[key] | overrides)
        base = key.removesuffix("-slim")
        if base not in PUBLISHED_SIZES:
            near = nearest_name(key, VARIANTS)
            raise InvalidConfigError(
                f"unknown variant {name!r}{near}; allowed: {', '.join(VARIANTS)}", path="variant", value=name
            )
        hidden, heads, prelude, coda, loops, width, slim_width = PUBLISHED_SIZES[base]
        sizes = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 4,
            "num_prelude_blocks": prelude,
            "num_coda_blocks": coda,
            "trained_max_loops": loops,
            "intermediate_size": slim_width if key.endswith("-slim") else width,
        }
        return cls(**sizes | overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a JSON dictionary: misspelt keys are errors, keys of other tools are kept with a warning.

        ``kwargs`` that name our fields replace the stored values before anything is checked.
        """
        config_dict = dict(config_dict)
        if faults := code_map_faults(config_dict.get("auto_map") or {}):
            raise config_error(faults)
        known = _known_keys(cls)
        own = {f.name for f in fields(cls)} | set(cls.attribute_map)
        for key in [k for k in kwargs if k in own and k != "dtype"]:
            name = cls.attribute_map.get(key, key)
            for stale in [k for k in config_dict if cls.attribute_map.get(k, k) == name]:
                del config_dict[stale]
            config_dict[name] = kwargs.pop(key)
        strangers = {k: config_dict.pop(k) for k in list(config_dict) if k not in known}
        if faults := [f for key in strangers if (f := unknown_key_fault(key, known, cutoff=0.8))]:
            raise config_error(faults)
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        for key, value in strangers.items():
            fate = "left out" if key.startswith("_") or hasattr(cls, key) else "kept"
            logger.warning(f"config.json: key {key!r} is not known to cognexis; it is {fate} and has no effect")
            if fate == "kept":
                config.__dict__[key] = value
        return result

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; an interrupted save in the folder is completed first."""
        if os.path.isdir(pretrained_model_name_or_path):
            finish_interrupted_save(Path(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        return cls._decode_special_floats(read_json_file(json_file))

    def to_dict(self) -> dict[str, Any]:
        """All stored fields; the code map is always complete, run-time state is left out."""
        output = super().to_dict()
        output.pop("_loop_cap", None)
        output["auto_map"] = dict(AUTO_MAP)
        return output

    # -- saving --------------------------------------------------------------------------------------------------

    _code_writer: ClassVar[Any] = None  # set by the package: writes the flat code files beside a saved config

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json`` and, from the package, the code that lets others load the folder without it."""
        folder = Path(save_directory)
        if not (folder / MANIFEST_FILE).is_file():
            self._write(folder)
        else:  # the folder is a checkpoint whose manifest names what changes here
            with staged_folder(folder) as staging:
                self._write(staging)
                refresh_manifest(staging, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def _write(self, folder: Path) -> None:
        if self._code_writer is not None:
            type(self)._code_writer(folder, self)
        super().save_pretrained(folder)


def _is_dtype(value: Any) -> bool:
    return isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype)


def _known_keys(cls: Any) -> set[str]:
    return {f.name for f in fields(cls)} | set(cls.attribute_map) | _FOREIGN_KEYS | set(_DERIVED_KEYS)


def _checked(cls: Any) -> Any:
    """Make every way of building or changing a config report our own error, with all faults in one message."""
    strict_init, strict_setattr, strict_validate = cls.__init__, cls.__setattr__, cls.validate

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise InvalidConfigError(f"{cls.__name__} takes keyword arguments only, got {len(args)} positional")
        known = _known_keys(cls)
        faults = [fault for key in kwargs if key not in known and (fault := unknown_key_fault(key, known))]
        values: dict[str, Any] = {}
        for key, value in kwargs.items():
            name = cls.attribute_map.get(key, key)
            if name in values and key in known:
                faults.append(ConfigFault(key, reason=f"given twice, also as {name!r} or another alias"))
            values[name] = value
        own = {f.name for f in fields(cls)}
        wrong = type_faults(cls, {k: value for k, value in values.items() if k in own}) | inherited_faults(values)
        defaults = {
            f.name: f.default
            if f.default is not MISSING
            else f.default_factory()
            if f.default_factory is not MISSING
            else None
            for f in fields(cls)
        }
        sound = {k: value for k, value in values.items() if k in own and k not in wrong}
        for name in ("dtype", "torch_dtype"):
            if (dtype := values.get(name)) is not None and not _is_dtype(dtype):
                wrong[name] = ConfigFault(name, dtype, "must name a torch dtype such as 'bfloat16'")
        faults += [*wrong.values(), *architecture_faults(defaults | sound, only=set(sound) if wrong else None)]
        if faults:
            raise config_error(faults)
        for key in _DERIVED_KEYS:
            values.pop(key, None)
        _translate(strict_init, self, **{k: value for k, value in values.items() if k in known})
        if len(self.stability_controls) < 2:
            logger.warning(f"only {self.stability_controls} keeps the looped core stable; two controls are advised")

    def __setattr__(self: Any, name: str, value: Any) -> None:
        _translate(strict_setattr, self, name, value)

    def validate(self: Any) -> None:
        _translate(strict_validate, self)

    validate.__is_defined_by_strict_decorator__ = True  # type: ignore[attr-defined]
    cls.__init__, cls.__setattr__, cls.validate = __init__, __setattr__, validate
    return cls


def _translate(call: Any, *args: Any, **kwargs: Any) -> None:
    """Run ``call``; an error of the strict dataclass becomes an InvalidConfigError."""
    try:
        call(*args, **kwargs)
    except StrictDataclassError as error:
        if isinstance(error.__cause__, InvalidConfigError):
            raise error.__cause__ from None
        raise InvalidConfigError(" ".join(str(error).split())) from error
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        if isinstance(error, InvalidConfigError) or not kwargs:
            raise
        inherited = [k for k in kwargs if k not in CognexisConfig.__annotations__ and not _base_takes(k, kwargs[k])]
        faults = [ConfigFault(k, kwargs[k], f"refused by PreTrainedConfig: {error}") for k in inherited]
        raise config_error(faults or [ConfigFault("configuration", reason=str(error))]) from error


def _base_takes(key: str, value: Any) -> bool:
    try:
        PreTrainedConfig(**{key: value})
    except Exception:
        return False
    return True


CognexisConfig = _checked(CognexisConfig)  # type: ignore[misc]

__all__ = ["AUTO_MAP", "VARIANTS", "BlockSpec", "CognexisConfig", "swiglu_width"]
