"""The plan: a file that names a base and what to change, expanded to experiments before anything runs.

    schema_version: 1
    name: tiny
    base: base.yaml                     a file beside this one, or a run configuration written here
    text: {characters: 1000000}         null: the base names its own data
    seeds: [0, 1]
    components: [no_gating, ...]        null: all that the base has; []: none
    sweeps: {residual_scale: [0.5, 1]}  null in place of the list: the usual values
    experiments: [{name: ..., changed_factor: ..., hypothesis: ..., overrides: overrides/x.yaml}]

Every configuration of the plan is checked, and every model built on the meta device, before the first run starts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field

from cognexis.artifacts.run_config import RunConfig, config_from_document, resolve
from cognexis.artifacts.run_config.documents import read_document, yaml_text
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.components import COMPONENTS, component
from cognexis.eval_harness.ablations.overriding import (
    command_line_overrides,
    merged,
    needs_training,
    nested,
    read_overrides,
)
from cognexis.eval_harness.ablations.records import _STRICT, ExperimentRecord, Method, Seeds, StopCriteria, checked
from cognexis.eval_harness.ablations.sweeps import expanded, folder_name, sweep
from cognexis.modeling_cognexis import CognexisForCausalLM

BASELINE = "baseline"
_Listed = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_Text = Annotated[str, Field(min_length=1)]


class TextSettings(BaseModel):
    """Text of this machine to train and measure on; the plan then fills in the paths of the base."""

    model_config = _STRICT

    characters: Annotated[int, Field(ge=1)] = 1_000_000
    """at most so much of the source code of Python's standard library"""
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """share of the files that is measured on"""


class CustomExperiment(BaseModel):
    """A change of the user's own."""

    model_config = _STRICT

    name: _Text
    changed_factor: _Text
    hypothesis: _Text
    overrides: dict[str, Any] | _Text
    """a run configuration to merge over the base, or its file"""


class AblationFile(BaseModel):
    """The file of a plan."""

    model_config = _STRICT

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


@dataclass(frozen=True)
class Experiment:
    """A record with the configuration that it means; run seeds and folders are filled in by ``config_of``."""

    record: ExperimentRecord
    config: RunConfig
    parameter_count: int

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.record.name

    def config_of(self, seed: int, folder: Path) -> RunConfig:
        """The resolved configuration of the run with this seed, whose checkpoints go to ``folder``."""
        settings: dict[str, Any] = {"run.seed": seed}
        if self.config.training is not None:
            settings["training.checkpoint.output_dir"] = str(folder / "training")
        return resolve(merged(self.config, nested(settings)))


@dataclass(frozen=True)
class Plan:
    """What runs, in order, the baseline first.

    Attributes:
        sweeps: by sweep, the value of each point and the name of its experiment.
        left_out: components that were not asked for by name and cannot run, with the reason.
    """

    file: AblationFile
    experiments: list[Experiment]
    sweeps: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


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
    return command_line_overrides(base, overrides)


def make_plan(
    file: AblationFile,
    base: RunConfig,
    folder: Path,
    *,
    hardware: str,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    checkpoint: str | None = None,
) -> Plan:
    """Expand a plan.

    Args:
        file: what to do.
        base: the baseline, with its data filled in.
        folder: where files of overrides are looked for.
        hardware: what the runs will use, in words.
        only: components, sweeps and experiments by name, in place of those of the file.
        seeds: in place of those of the file.
        checkpoint: folder of a trained model that is measured; nothing is trained then.

    Raises:
        InvalidConfigError: an experiment is unknown, cannot run, or its configuration is invalid.
    """
    maker = _Maker(file, base, hardware, tuple(seeds or file.seeds), checkpoint)
    plan = Plan(file, [maker.experiment(BASELINE, "nothing", "it is what the others are compared with", {}, False)])
    for name in _wanted_components(file, only):
        try:
            overrides = component(name).overrides(base, trained=checkpoint is not None)
        except InvalidConfigError as error:
            if only is None and file.components is None and name in COMPONENTS:
                plan.left_out[name] = error.reason or str(error)
                continue
            raise
        part = component(name)
        note = part.side_effect(base)
        plan.experiments.append(maker.experiment(name, part.part, part.hypothesis, overrides, None, note))
    for name in _wanted_sweeps(file, only):
        _add_sweep(plan, maker, name, file.sweeps.get(name), base)
    for custom in file.experiments:
        if only is None or custom.name in only:
            overrides = read_overrides(custom.overrides, folder)
            plan.experiments.append(
                maker.experiment(custom.name, custom.changed_factor, custom.hypothesis, overrides, None)
            )
    names = [experiment.name for experiment in plan.experiments]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidConfigError(f"experiments: {', '.join(repeated)} stands twice", path="experiments")
    return plan


class _Maker:
    """Builds experiments over one base."""

    def __init__(
        self, file: AblationFile, base: RunConfig, hardware: str, seeds: tuple[int, ...], checkpoint: str | None
    ) -> None:
        self.file, self.base, self.hardware, self.seeds, self.checkpoint = file, base, hardware, seeds, checkpoint
        self.base_checksum = config_checksum(resolve(base))

    def experiment(
        self,
        name: str,
        factor: str,
        hypothesis: str,
        overrides: dict[str, Any],
        trains: bool | None,
        note: str = "",
    ) -> Experiment:
        """One experiment, its configuration checked and its model counted."""
        trains = needs_training(overrides) if trains is None else self.checkpoint is None
        if trains and self.checkpoint is not None:
            reason = "needs training: it changes more than how a trained model is run"
            raise InvalidConfigError(f"{name}: {reason}", path=name, reason=reason)
        try:
            config = resolve(merged(self.base, overrides))
            count = parameter_count(config)
        except InvalidConfigError as error:
            raise InvalidConfigError(f"{name}: {error}", faults=error.faults) from error
        if overrides and config_checksum(config) == self.base_checksum:
            raise InvalidConfigError(f"{name}: changes nothing in the base", path=name)
        steps = config.training.optimization.total_steps if config.training is not None else 0
        record = {
            "name": name,
            "baseline": self.file.name,
            "changed_factor": factor,
            "hypothesis": hypothesis,
            "overrides": overrides,
            "method": Method.RETRAINED if trains else Method.SWITCHED,
            "budget": f"checkpoint {self.checkpoint}" if self.checkpoint else f"{steps} optimizer steps",
            "suite": [data.name for data in config.evaluation.datasets] if config.evaluation is not None else [],
            "seeds": self.seeds,
            "hardware": self.hardware,
            "stop_criteria": self.file.stop_criteria,
            "note": note,
        }
        return Experiment(checked(ExperimentRecord, record, name), config, count)


def _wanted_components(file: AblationFile, only: Sequence[str] | None) -> Iterator[str]:
    if only is None:
        yield from COMPONENTS if file.components is None else file.components
        return
    own = {experiment.name for experiment in file.experiments}
    for name in only:
        if name in COMPONENTS:
            yield name
        elif name not in own and name not in file.sweeps:
            try:
                sweep(name)
            except InvalidConfigError:
                component(name)  # says what is known


def _wanted_sweeps(file: AblationFile, only: Sequence[str] | None) -> Iterator[str]:
    names = file.sweeps if only is None else only
    own = {experiment.name for experiment in file.experiments}
    yield from (name for name in names if name not in COMPONENTS and name not in own)


def _add_sweep(plan: Plan, maker: _Maker, name: str, values: Sequence[Any] | None, base: RunConfig) -> None:
    factor = sweep(name).factor
    labels = list(expanded(name, values, base).items())
    chosen = list(sweep(name).values if values is None else values)
    points = plan.sweeps.setdefault(name, [])
    for value, (label, overrides) in zip(chosen, labels, strict=True):
        try:
            is_base = config_checksum(resolve(merged(base, overrides))) == maker.base_checksum
        except InvalidConfigError as error:
            raise InvalidConfigError(f"{label}: {error}", faults=error.faults) from error
        points.append((value, BASELINE if is_base else label))
        if not is_base:
            hypothesis = f"the result depends on {factor}"
            plan.experiments.append(maker.experiment(label, factor, hypothesis, overrides, None))


def parameter_count(config: RunConfig) -> int:
    """Parameters of the model that a configuration describes, built on the meta device.

    A tied embedding counts once, and so does the core, whatever number of loops runs.
    """
    if config.model is None:
        raise InvalidConfigError("model: the section is missing", path="model")
    with torch.device("meta"):
        model: Any = CognexisForCausalLM(config.model.config())
    return sum(parameter.numel() for parameter in model.parameters())


def config_checksum(config: RunConfig) -> str:
    """SHA-256 of a resolved configuration without the folders that it writes to."""
    document = config.document()
    document["run"] = {name: value for name, value in document["run"].items() if name != "name"}
    if "training" in document:
        place = document["training"]["checkpoint"]
        document["training"]["checkpoint"] = {name: value for name, value in place.items() if name != "output_dir"}
    if "evaluation" in document:
        document["evaluation"].pop("output_path", None)
    return f"sha256:{hashlib.sha256(yaml_text(document).encode()).hexdigest()}"


__all__ = [
    "BASELINE",
    "AblationFile",
    "Experiment",
    "Plan",
    "config_checksum",
    "folder_name",
    "make_plan",
    "parameter_count",
    "read_base",
    "read_plan_file",
]
