"""``RunConfig``: one typed, checked object for everything a command does, and how it is read.

A configuration remembers which settings were given. What was not given has its default; a default that follows from
other settings is null until ``resolve`` fills it in. ``tokenizer``, ``model``, ``training`` and ``evaluation`` are
None where a document leaves them out; the other sections always exist, with conservative defaults.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from cognexis.artifacts.run_config.checks import consistency_faults, needed_sections
from cognexis.artifacts.run_config.documents import read_document
from cognexis.artifacts.run_config.faults import faults_of
from cognexis.artifacts.run_config.inference_section import InferenceSection
from cognexis.artifacts.run_config.migrations import migrate
from cognexis.artifacts.run_config.model_section import ModelSection
from cognexis.artifacts.run_config.other_sections import (
    EvaluationSection,
    LoggingSection,
    RunSection,
    SafetySection,
    TokenizerSection,
)
from cognexis.artifacts.run_config.section import Section
from cognexis.artifacts.run_config.training_section import TrainingSection
from cognexis.configuration_rules import config_error
from cognexis.errors import InvalidConfigError


class RunConfig(Section):
    """All settings of a command, checked for themselves and against each other.

    Raises:
        InvalidConfigError: lists every fault, each with its dotted path, its value and the reason.
    """

    schema_version: Literal[1] = 1
    """version of this layout"""
    run: RunSection = RunSection()
    tokenizer: TokenizerSection | None = None
    model: ModelSection | None = None
    training: TrainingSection | None = None
    inference: InferenceSection = InferenceSection()
    evaluation: EvaluationSection | None = None
    safety: SafetySection = SafetySection()
    logging: LoggingSection = LoggingSection()

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise config_error(faults_of(error, RunConfig)) from None
        except InvalidConfigError:
            raise
        except (TypeError, OverflowError, RecursionError) as error:
            raise InvalidConfigError(f"the settings cannot be read: {error}") from error
        if faults := consistency_faults(self):
            raise config_error(faults)

    def given(self) -> dict[str, Any]:
        """The settings that were given, as plain data under their canonical names."""
        return _plain(self, only_given=True)

    def document(self) -> dict[str, Any]:
        """All settings as plain data: what the resolved file holds."""
        return _plain(self, only_given=False)


SECTIONS = tuple(name for name in RunConfig.model_fields if name != "schema_version")


def _plain(value: Any, only_given: bool) -> Any:
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
        shown = {
            name: inner
            for name, inner in fields.items()
            if (name in value.model_fields_set or name == "schema_version" if only_given else True)
            and not (isinstance(value, RunConfig) and inner is None)
        }
        return {name: _plain(inner, only_given) for name, inner in shown.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner, only_given) for inner in value]
    if isinstance(value, dict):
        return {key: _plain(inner, only_given) for key, inner in value.items()}
    return value


def config_from_document(document: Mapping[str, Any]) -> RunConfig:
    """Check a document that was read already; older versions are migrated.

    Raises:
        InvalidConfigError: lists every fault.
    """
    if not isinstance(document, Mapping) or not all(isinstance(key, str) for key in document):
        raise InvalidConfigError("a run configuration is a mapping of sections by name")
    return RunConfig(**{key: value for key, value in migrate(dict(document)).items() if value is not None})


def load_run_config(
    source: str | bytes | Path | Mapping[str, Any],
    command: str | None = None,
    overrides: Sequence[str] = (),
    *,
    context: str | None = None,
    world_size: int | None = None,
    check_files: bool = False,
) -> RunConfig:
    """Read, override and check a run configuration.

    Args:
        source: a path, the text itself, or a document read elsewhere.
        command: the command that will use it ("train", "serve", ...); its sections must be present.
        overrides: settings as "path=value", applied on top.
        context: "checkpoint" when a checkpoint exists whose architecture the overrides must not touch.
        world_size: number of training processes, for the arithmetic of the global batch.
        check_files: whether the files that are named must exist.

    Raises:
        InvalidConfigError: lists every fault; UnsafeOverrideError for an override that is not permitted.
    """
    from cognexis.artifacts.run_config.overrides import apply_overrides

    if command is not None:
        needed_sections(command)
    document = dict(source) if isinstance(source, Mapping) else read_document(source)
    config = config_from_document(document)
    if overrides:
        config = apply_overrides(config, overrides, context=context)
    check_run_config(config, command, world_size=world_size, check_files=check_files)
    return config


def check_run_config(
    config: RunConfig, command: str | None = None, *, world_size: int | None = None, check_files: bool = False
) -> None:
    """Check what depends on the command, the number of processes and the disk; warn about extrapolated depths.

    Raises:
        InvalidConfigError: lists every fault.
    """
    from cognexis.artifacts.run_config.files import missing_files

    faults = consistency_faults(config, command, world_size)
    if check_files:
        faults += missing_files(config)
    if faults:
        raise config_error(faults)
    if command in (None, "eval", "eval loop-scaling") and (beyond := extrapolated_depths(config)):
        trained = config.model.trained_max_loops if config.model else None
        warnings.warn(
            f"evaluation.loop_counts {list(beyond)} exceed model.trained_max_loops={trained}; "
            "their rows are labelled extrapolated",
            UserWarning,
            stacklevel=2,
        )


def extrapolated_depths(config: RunConfig) -> tuple[int, ...]:
    """The evaluation depths beyond those the weights were trained with; their rows are labelled extrapolated."""
    if config.model is None or config.evaluation is None:
        return ()
    return tuple(n for n in config.evaluation.loop_counts or () if n > config.model.trained_max_loops)


def default_run_config() -> RunConfig:
    """A configuration with every section, all settings at their defaults."""
    return RunConfig(
        tokenizer=TokenizerSection(), model=ModelSection(), training=TrainingSection(), evaluation=EvaluationSection()
    )
