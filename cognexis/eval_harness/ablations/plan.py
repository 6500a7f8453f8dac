"""The plan: the file expanded to experiments before anything runs.

Every configuration of the plan is checked, and every model built on the meta device, before the first run starts.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cognexis.artifacts.run_config import RunConfig, resolve
from cognexis.artifacts.run_config.documents import yaml_text
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.components import COMPONENTS, component
from cognexis.eval_harness.ablations.overriding import merged, needs_training, nested, read_overrides
from cognexis.eval_harness.ablations.plan_file import AblationFile
from cognexis.eval_harness.ablations.records import ExperimentRecord, Method
from cognexis.eval_harness.ablations.sweeps import expanded, sweep
from cognexis.eval_harness.results import checked
from cognexis.modeling_cognexis import CognexisForCausalLM

BASELINE = "baseline"


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
        if name != BASELINE and config_checksum(config) == self.base_checksum:
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
