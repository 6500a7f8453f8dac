"""Run configurations: everything a command does, in one typed, checked, reproducible document."""

from cognexis.artifacts.run_config.checks import NEEDED_SECTIONS, needed_sections
from cognexis.artifacts.run_config.files import RESOLVED_NAME, write_resolved
from cognexis.artifacts.run_config.mappings import loop_keywords_of, training_arguments_of
from cognexis.artifacts.run_config.migrations import SCHEMA_VERSION
from cognexis.artifacts.run_config.overrides import apply_overrides
from cognexis.artifacts.run_config.resolving import resolve, run_config_of_checkpoint
from cognexis.artifacts.run_config.run_config import (
    RunConfig,
    check_run_config,
    config_from_document,
    default_run_config,
    extrapolated_depths,
    load_run_config,
)

__all__ = [
    "NEEDED_SECTIONS",
    "RESOLVED_NAME",
    "SCHEMA_VERSION",
    "RunConfig",
    "apply_overrides",
    "check_run_config",
    "config_from_document",
    "default_run_config",
    "extrapolated_depths",
    "load_run_config",
    "loop_keywords_of",
    "needed_sections",
    "resolve",
    "run_config_of_checkpoint",
    "training_arguments_of",
    "write_resolved",
]
