"""Filling in what follows from other settings, and describing a saved model.

``resolve`` is idempotent: a resolved configuration has a value wherever one can be derived, so nothing is left to do.
"""

import re
from collections.abc import Callable
from typing import Any

from cognexis.artifacts.run_config.inference_section import SCHEDULER_NAMES, SchedulerSettings
from cognexis.artifacts.run_config.other_sections import TokenizerSection
from cognexis.artifacts.run_config.run_config import RunConfig
from cognexis.configuration_cognexis import CognexisConfig


def _loops_in_bounds(config: Any) -> int | None:
    if config.model is None:
        return None
    high = config.inference.max_loops or config.model.max_loops
    return min(max(config.model.default_loops, config.inference.min_loops), high)


def _first_maximum(config: Any) -> int | None:
    rule, model = config.training.loop_curriculum, config.model
    target = rule.target_max_loops or (model.trained_max_loops if model else None)
    low = rule.min_loops or (model.min_loops if model else None)
    return None if target is None or low is None else min(max(2, low), target)


def _depths(config: Any) -> tuple[int, ...] | None:
    if config.model is None:
        return None
    last = config.model.trained_max_loops
    return tuple(sorted({last, *(2**k for k in range(last.bit_length()) if 2**k <= last)}))


def _global_batch(config: Any, world_size: int) -> int:
    batch = config.training.batch
    own = batch.micro_batch_size * batch.gradient_accumulation_steps * config.training.data.sequence_length
    return own * world_size


def _of_model(name: str) -> Callable[[Any], Any]:
    return lambda config: None if config.model is None else getattr(config.model, name)


def _folder(suffix: str) -> Callable[[Any], str]:
    return lambda config: f"runs/{config.run.name}{suffix}"


# Path of a setting whose null means "derive" -> how. The order matters: later rows may read earlier ones.
DERIVED: dict[str, Callable[[Any], Any]] = {
    "tokenizer.vocab_size": _of_model("vocab_size"),
    "tokenizer.checksum": lambda c: _known_checksum(c.model.tokenizer_checksum if c.model else None),
    "training.data.document_boundary_attention": _of_model("document_boundary_attention"),
    "training.loop_curriculum.min_loops": _of_model("min_loops"),
    "training.loop_curriculum.target_max_loops": _of_model("trained_max_loops"),
    "training.loop_curriculum.initial_max_loops": _first_maximum,
    "training.checkpoint.output_dir": _folder(""),
    "inference.max_sequence_length": _of_model("max_position_embeddings"),
    "inference.max_loops": _of_model("max_loops"),
    "inference.num_loops": _loops_in_bounds,
    "inference.cache.dtype": _of_model("dtype"),
    "evaluation.loop_counts": _depths,
    "evaluation.output_path": _folder("/evaluation"),
    "safety.max_user_loops": lambda c: min(
        (n for n in (c.inference.max_loops, _of_model("max_loops")(c)) if n is not None), default=None
    ),
}


def _known_checksum(text: str | None) -> str | None:
    return text if text is not None and re.fullmatch(r"sha256:[0-9a-f]{64}", text) else None


def setting(config: Any, path: str) -> Any:
    """The value at a dotted path; None where a section is missing."""
    for name in path.split("."):
        config = None if config is None else getattr(config, name)
    return config


def _has_section(config: RunConfig, path: str) -> bool:
    return getattr(config, path.split(".")[0]) is not None


def placed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The document with ``value`` at ``path``."""
    name, _, rest = path.partition(".")
    inner = document.get(name)
    new = placed(inner if isinstance(inner, dict) else {}, rest, value) if rest else value
    return {**document, name: new}


def resolve(config: RunConfig, world_size: int | None = None) -> RunConfig:
    """The configuration with every effective value written out.

    Args:
        world_size: number of training processes, for the global batch (None: one).

    Raises:
        InvalidConfigError: the derived values contradict a given one.
    """
    for path, derive in DERIVED.items():
        if _has_section(config, path) and setting(config, path) is None and (value := derive(config)) is not None:
            config = _with(config, path, value)
    batch = "training.batch.global_batch_tokens"
    if config.training is not None and setting(config, batch) is None:
        config = _with(config, batch, _global_batch(config, world_size or 1))
    return RunConfig(**config.document())


def _with(section: Any, path: str, value: Any) -> Any:
    """A copy of the section, not checked, with ``value`` at ``path``."""
    name, _, rest = path.partition(".")
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})


_GENERATION = {  # field of a generation configuration -> setting of the inference section
    **{name: name for name in ("max_new_tokens", "loop_mode", "num_loops", "min_loops", "max_loops")},
    **{name: name for name in ("quality_tier", "halt_dependency", "cache_policy")},
    **{name: f"sampling.{name}" for name in ("temperature", "top_p", "top_k", "repetition_penalty")},
    "stop_strings": "sampling.stop_strings",
    **{
        name: f"compute_budget.{name}"
        for name in ("max_total_loops", "max_loops_per_token", "max_recurrent_flops", "max_wall_time_ms")
    },
    "max_cache_memory_bytes": "compute_budget.max_cache_memory_bytes",
}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}


def run_config_of_checkpoint(
    model_config: CognexisConfig,
    generation_config: Any = None,
    tokenizer: Any = None,
    *,
    tokenizer_checksum: str | None = None,
    dtype: Any = None,
    scheduler: dict[str, Any] | None = None,
    name: str = "checkpoint",
) -> RunConfig:
    """The resolved run configuration that describes a saved model.

    Args:
        model_config: gives the ``model`` section.
        generation_config: object whose loop, sampling and length fields give the ``inference`` section.
        tokenizer: object with the attributes ``bos_token``, ``eos_token``, ``pad_token`` and ``unk_token``.
        tokenizer_checksum: "sha256:..." of the tokenizer; None takes the one in ``model_config``.
        dtype: format of the stored weights; None takes the one in ``model_config``.
        scheduler: that of ``scheduler.json``; None: fixed loop counts.
        name: name of the run.

    Raises:
        InvalidConfigError: the settings contradict each other.
    """
    from cognexis.artifacts.run_config.model_section import ARCHITECTURE_FIELDS

    stored = str(dtype if dtype is not None else model_config.dtype).removeprefix("torch.")
    model = {field: getattr(model_config, field) for field in ARCHITECTURE_FIELDS} | {"dtype": _DTYPES.get(stored)}
    tokens = {"checksum": _known_checksum(tokenizer_checksum or model_config.tokenizer_checksum)}
    if tokenizer is not None:
        tokens |= _special_tokens(tokenizer)
    return resolve(
        RunConfig(
            run={"name": name},
            tokenizer=tokens | {"vocab_size": model_config.vocab_size},
            model=model,
            inference=_inference_of(model_config, generation_config) | {"scheduler": _scheduler_of(scheduler or {})},
        )
    )


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """The tokens that exist, each name once: a padding token that is the end token too is not listed again."""
    found: dict[str, Any] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "eod_token"):
        token = getattr(tokenizer, name, None)
        found[name] = str(token) if token and str(token) not in found.values() else None
    default = TokenizerSection().eod_token
    if found["eod_token"] is None and default in getattr(tokenizer, "all_special_tokens", ()):
        found["eod_token"] = default
    return found


def _scheduler_of(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's own settings that a run configuration knows."""
    named = {SCHEDULER_NAMES.get(key, key): value for key, value in scheduler.items()}
    return {key: value for key, value in named.items() if key in SchedulerSettings.model_fields and value is not None}


def _inference_of(model_config: CognexisConfig, generation_config: Any) -> dict[str, Any]:
    section: dict[str, Any] = {"min_loops": model_config.min_loops}
    for name, path in _GENERATION.items():
        value = getattr(generation_config, name, None)
        if value is not None:
            section = placed(section, path, list(value) if isinstance(value, tuple) else value)
    if generation_config is not None and not getattr(generation_config, "do_sample", False):
        section = placed(section, "sampling.temperature", 0.0)
    if isinstance(strings := section.get("sampling", {}).get("stop_strings"), str):
        section = placed(section, "sampling.stop_strings", [strings])
    bound = model_config.max_loops or 1
    counts = [n for name in ("num_loops", "max_loops") if isinstance(n := section.get(name), int)]
    if max(counts, default=0) > bound:
        section |= {"research_override": True, "max_loops": max(counts)}
    return section
