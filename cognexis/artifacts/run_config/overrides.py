"""Changing single settings of a configuration: ``--set path=value``, with the policy for checkpoints.

Values are read as YAML reads them: ``4``, ``1e-4``, ``true``, ``null``, ``[1, 2]``, text. Once a checkpoint exists its
architecture and tokenizer are facts, so in the context "checkpoint" only run-time settings may change: loop mode and
bounds, budgets, sampling, thresholds, output paths, batch sizes, logging. Either all overrides take effect or none.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from cognexis.artifacts.run_config.documents import parse_value
from cognexis.artifacts.run_config.faults import section_at
from cognexis.artifacts.run_config.model_section import (
    ARCHITECTURE_FIELDS,
    SPELLINGS,
    ModelSection,
    flat_model_settings,
)
from cognexis.artifacts.run_config.resolving import DERIVED, placed, setting
from cognexis.artifacts.run_config.run_config import SECTIONS, RunConfig, config_from_document
from cognexis.configuration_rules import config_error, derived_fields, nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError, UnsafeOverrideError

CONTEXTS = (None, "checkpoint")
# What may change beside a checkpoint; a path stands for everything below it.
RUN_TIME_SETTINGS = (
    *("run", "inference", "evaluation", "logging"),
    *("safety.max_user_loops", "safety.max_prompt_tokens", "safety.code_sandbox"),
    *("training.batch", "training.checkpoint", "training.data.num_workers", "training.data.prefetch_batches"),
)
# Protections: strengthening them is always fine, weakening them needs run.research_mode.
_STRONG = {
    "safety.policy_mode": "enforce",
    "safety.input_filter": "enabled",
    "safety.output_filter": "enabled",
    "safety.block_special_token_injection": True,
    "safety.pii_logging": "redacted",
}
_MODEL_DERIVED = ("intermediate_size", "num_key_value_heads", "head_dim", "max_loops", "kv_slots", "default_loops")


def apply_overrides(config: RunConfig, overrides: Sequence[str], *, context: str | None = None) -> RunConfig:
    """The configuration with the overrides applied; derived values follow the settings that they were derived from.

    Args:
        overrides: "path=value" each; a later one wins.
        context: "checkpoint" when the architecture is that of existing weights.

    Raises:
        UnsafeOverrideError: an override is not permitted in this context.
        InvalidConfigError: an override cannot be read, names no setting, or gives an invalid configuration.
    """
    if context not in CONTEXTS:
        raise InvalidConfigError(f"context={context!r}: must be None or 'checkpoint'", path="context", value=context)
    settings = [parse_override(text) for text in overrides]
    if faults := [fault for path, _ in settings if (fault := _unknown_path(path))]:
        raise config_error(faults)
    leaves = {leaf: value for path, inner in settings for leaf, value in _leaves(_canonical(path, inner))}
    if context == "checkpoint" and (refused := list(_refused(config, leaves))):
        raise config_error(refused, UnsafeOverrideError)
    document = _without_followers(config, set(leaves))
    for path, value in leaves.items():
        document = placed(document, path, value)
    return config_from_document(document)


def parse_override(text: str) -> tuple[str, Any]:
    """ "a.b=c" as ("a.b", value).

    Raises:
        InvalidConfigError: there is no equals sign, no path, or the value cannot be read.
    """
    path, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    path = path.strip()
    if not equals or not path or not all(path.split(".")):
        reason = "must have the form path=value, as in inference.max_loops=4"
        raise InvalidConfigError(f"override {text!r:.200}: {reason}", path=path or None, value=text, reason=reason)
    return path, parse_value(value, path)


def _unknown_path(path: str) -> ConfigFault | None:
    """A fault with the nearest name if there is no setting at ``path``."""
    section: Any = RunConfig
    parts = path.split(".")
    for depth, name in enumerate(parts):
        place = ".".join(parts[: depth + 1])
        if section is ModelSection:
            names = (*ModelSection.model_fields, *SPELLINGS)
            return None if name in names else ConfigFault(place, reason=f"unknown setting{nearest_name(name, names)}")
        if section is None:
            return ConfigFault(place, reason=f"unknown setting; {'.'.join(parts[:depth])} has no parts")
        if name not in section.model_fields:
            near = nearest_name(name, section.model_fields)
            return ConfigFault(place, reason=f"unknown setting{near}{'' if near else _elsewhere(parts[-1])}")
        if str(section.model_fields[name].annotation).startswith("dict"):
            return None
        section = section_at(section, (name,))
    return None


def _elsewhere(name: str) -> str:
    known = {leaf.split(".")[-1]: leaf for section in SECTIONS for leaf in _paths(section)}
    return f" (did you mean {known[name]!r}?)" if name in known else ""


def _paths(path: str) -> Iterator[str]:
    section: Any = section_at(RunConfig, tuple(path.split(".")))
    for name in section.model_fields if section and section is not ModelSection else ():
        yield f"{path}.{name}"
        yield from _paths(f"{path}.{name}")


def _canonical(path: str, value: Any) -> dict[str, Any]:
    """The override as a document with canonical names."""
    document = placed({}, path, value)
    if isinstance(document.get("model"), dict):
        try:
            document["model"] = flat_model_settings(document["model"])
        except InvalidConfigError as error:
            raise config_error([fault.below("model") for fault in error.faults]) from None
    return document


def _leaves(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting of a document with its path; mappings that are values themselves stay whole."""
    for name, value in document.items():
        path = f"{prefix}{name}"
        is_group = path in SECTIONS or (
            section_at(RunConfig, tuple(path.split("."))) and not path.startswith("model.")
        )
        if is_group and isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _refused(config: RunConfig, leaves: dict[str, Any]) -> Iterator[ConfigFault]:
    research = leaves.get("run.research_mode", config.run.research_mode)
    for path, value in leaves.items():
        if path in _STRONG:
            aliases = {True: "enabled"} if path.endswith("filter") else {}
            if value != _STRONG[path] and aliases.get(value) != _STRONG[path] and research is not True:
                reason = "a protection is weakened only with run.research_mode: true"
                yield ConfigFault(path, value, reason)
        elif not any(path == allowed or path.startswith(f"{allowed}.") for allowed in RUN_TIME_SETTINGS):
            owner = "the checkpoint fixes it" if path.startswith(("model", "tokenizer")) else "no run-time setting"
            yield ConfigFault(path, value, f"cannot be changed beside a checkpoint: {owner}")


def _without_followers(config: RunConfig, changed: set[str]) -> dict[str, Any]:
    """The given settings, without those that only repeat what would be derived from the others."""
    document = config.given()
    for path, derive in DERIVED.items():
        section, *inner = path.split(".")
        if path in changed or getattr(config, section) is None or (value := setting(config, path)) is None:
            continue
        group = document.get(section)
        for name in inner[:-1]:
            group = group.get(name) if isinstance(group, dict) else None
        if isinstance(group, dict) and inner[-1] in group and derive(config) == value:
            del group[inner[-1]]
    model = document.get("model")
    if config.model is not None and config.model.variant is None and isinstance(model, dict):
        touched = any(path.startswith("model.") for path in changed)
        for name in _MODEL_DERIVED if touched else ():
            values = {field: getattr(config.model, field) for field in ARCHITECTURE_FIELDS}
            if (
                f"model.{name}" not in changed
                and name in model
                and derived_fields(values | {name: None})[name] == model[name]
            ):
                del model[name]
    if any(path.startswith("training.") for path in changed) and "training.batch.global_batch_tokens" not in changed:
        document = _without_global_batch(config, document, changed)
    return document


def _without_global_batch(config: RunConfig, document: dict[str, Any], changed: set[str]) -> dict[str, Any]:
    factors = ("training.batch", "training.data.sequence_length")
    batch = document.get("training", {}).get("batch", {})
    if any(path.startswith(factors) for path in changed) and isinstance(batch, dict):
        batch.pop("global_batch_tokens", None)
    return document
