"""The file of a plan: a base and what to change.

schema_version: 1
name: tiny
base: base.yaml                     a file beside this one, or a run configuration written here
text: {characters: 1000000}         null: the base names its own data
seeds: [0, 1]
components: [no_gating, ...]        null: all that the base has; []: none
sweeps: {residual_scale: [0.5, 1]}  null in place of the list: the usual values
experiments: [{name: ..., changed_factor: ..., hypothesis: ..., overrides: overrides/x.yaml}]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from cognexis.artifacts.run_config import RunConfig, apply_overrides, config_from_document
from cognexis.artifacts.run_config.documents import read_document
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.overriding import read_overrides
from cognexis.eval_harness.ablations.records import STRICT, Seeds, StopCriteria
from cognexis.eval_harness.results import checked

_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Text = Annotated[str, Field(min_length=1)]


class TextSettings(BaseModel):
    """Text of this machine to train and measure on; the plan then fills in the paths of the base."""

    model_config = STRICT

    characters: Annotated[int, Field(ge=1)] = 1_000_000
    """at most so much of the source code of Python's standard library"""
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """share of the files that is measured on"""


class CustomExperiment(BaseModel):
    """A change of the user's own."""

    model_config = STRICT

    name: _Text
    changed_factor: _Text
    hypothesis: _Text
    overrides: dict[str, Any] | _Text
    """a run configuration to merge over the base, or its file"""


class AblationFile(BaseModel):
    """The file of a plan."""

    model_config = STRICT

    schema_version: Literal[1] = 1
    name: _Text
    base: dict[str, Any] | _Text
    """the run configuration of the baseline, or its file"""
    text: TextSettings | None = None
    seeds: Seeds = (0,)
    components: Annotated[tuple[_Text, ...], _Listed] | None = None
    sweeps: dict[str, Annotated[tuple[Any, ...], _Listed] | None] = {}
    experiments: Annotated[tuple[CustomExperiment, ...], _Listed] = ()
    stop_criteria: StopCriteria = StopCriteria()
    metric: Literal["negative_log_likelihood", "accuracy"] = "negative_log_likelihood"
    row_length: Annotated[int, Field(ge=1)] = 128
    """predicted tokens of a row that is measured"""
    max_rows: Annotated[int, Field(ge=1)] = 128
    """at most so many rows of a data set"""


def read_plan_file(path: Path) -> AblationFile:
    """Read and check the file of a plan.

    Raises:
        InvalidConfigError: lists every fault.
    """
    return checked(AblationFile, read_document(path), str(path))


def read_base(file: AblationFile, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration of the baseline, with "path=value" overrides.

    Args:
        folder: where the files that the plan names are looked for.

    Raises:
        InvalidConfigError: lists every fault.
    """
    base = config_from_document(read_overrides(file.base, folder))
    if base.model is None:
        raise InvalidConfigError("base: needs a model section", path="base.model")
    return apply_overrides(base, overrides) if overrides else base
