"""Runs the experiments of a plan, one folder each, and goes on where it was.

    <out>/plan.json                                 every experiment before it runs
    <out>/data/                                     text of this machine, where the plan asks for it
    <out>/runs/<experiment>/seed-<n>/               config.resolved.yaml, training/ and run.json
    <out>/results.jsonl, summary.json, report.md, plots/

``run.json`` is written last and in one step. A run that has it is not run again; a run that was killed in training
goes on from its newest checkpoint. Results of other settings are refused, so that one folder never mixes two
plans. A run that becomes unstable or fails is a result like others, and the next one starts.

What trains is handed in (``Workshop``), because evaluation and training do not import each other.
"""

import fcntl
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cognexis.artifacts.run_config import RunConfig, write_resolved
from cognexis.checkpoints.json_file import read_json, write_json
from cognexis.errors import BackendError, CheckpointError, CognexisError, InvalidConfigError, NonFiniteError
from cognexis.eval_harness.ablations.measuring import Measurement, held_out_rows, measure
from cognexis.eval_harness.ablations.overriding import merged
from cognexis.eval_harness.ablations.plan import BASELINE, Experiment, Plan, config_checksum, make_plan
from cognexis.eval_harness.ablations.plan_file import AblationFile, read_base, read_plan_file
from cognexis.eval_harness.ablations.records import AblationRun, AblationStatus, Method
from cognexis.eval_harness.ablations.report import write_results
from cognexis.eval_harness.ablations.sweeps import folder_name
from cognexis.eval_harness.results import checked
from cognexis.eval_harness.runner.provenance import hardware
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer

RUN_FILE, PLAN_FILE = "run.json", "plan.json"


class TrainedRun(Protocol):
    """What a training run leaves; ``PretrainResult`` is one."""

    @property
    def model_dir(self) -> str | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def skipped_steps(self) -> int: ...
    @property
    def stop_signal(self) -> int | None: ...


class TextFiles(Protocol):
    """Prepared text, as paths."""

    @property
    def tokenizer(self) -> str: ...
    @property
    def train_manifest(self) -> str: ...
    @property
    def held_out(self) -> str: ...


class Workshop(Protocol):
    """What training does for an ablation."""

    def prepare_text(self, folder: Path, characters: int, held_out_share: float) -> TextFiles:
        """Text, tokenizer and token shards in ``folder``; what is there already is kept."""

    def train(self, config: RunConfig, *, use_cpu: bool) -> TrainedRun:
        """Train as the configuration says, from the newest checkpoint of its folder if there is one."""


@dataclass(frozen=True)
class AblationOrder:
    """What the command was told.

    Attributes:
        config: file of the plan.
        only: components, sweeps and experiments by name; None takes those of the plan.
        out: folder of the results; None: ``runs/<name of the plan>``.
        overrides: settings of the base as "path=value".
        seeds: in place of the plan's.
        steps: optimizer steps of each run, in place of the base's.
        checkpoint: measure this trained model without its parts; nothing is trained.
        device: where to measure; None takes CUDA when there is one. "cpu" trains on the CPU too.
    """

    config: Path
    only: Sequence[str] | None = None
    out: Path | None = None
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    steps: int | None = None
    checkpoint: Path | None = None
    device: str | None = None


class Interrupted(CognexisError):
    """A signal ended training; ``signal`` is its number."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"ended by signal {signal}; the same command goes on")
        self.signal = signal


def run_ablations(order: AblationOrder, workshop: Workshop, report: Callable[[str], None]) -> list[Path]:
    """Run what is missing and write the results; their files.

    Raises:
        InvalidConfigError: the plan or one of its configurations is faulty; nothing has run.
        Interrupted: a signal ended a training run after its step was saved.
    """
    file = read_plan_file(order.config)
    folder = order.out or Path("runs") / folder_name(file.name)
    base = _base(file, order)
    with _locked(folder):
        if file.text is not None:
            base = _with_text(
                base, workshop.prepare_text(folder / "data", file.text.characters, file.text.held_out_share)
            )
        plan = make_plan(
            file,
            base,
            order.config.parent,
            hardware=hardware(_device(order.device)),
            only=order.only,
            seeds=order.seeds if order.checkpoint is None else (order.seeds or file.seeds)[:1],
            checkpoint=None if order.checkpoint is None else str(order.checkpoint),
        )
        for name, reason in plan.left_out.items():
            report(f"{name}: left out, {reason}")
        write_json(folder / PLAN_FILE, [experiment.record.model_dump(mode="json") for experiment in plan.experiments])
        runs = _run_all(plan, folder, order, workshop, report)
        return write_results(folder, plan, runs)


def _base(file: AblationFile, order: AblationOrder) -> RunConfig:
    base = read_base(file, order.config.parent, order.overrides)
    if order.steps is None or base.training is None:
        return base
    warmup = min(base.training.optimization.warmup_steps, order.steps)
    settings = {"total_steps": order.steps, "warmup_steps": warmup}
    return merged(base, {"training": {"optimization": settings}})


def _with_text(base: RunConfig, files: TextFiles) -> RunConfig:
    held_out = {"name": "held_out_text", "type": "language_modeling", "path": files.held_out, "split": "validation"}
    document: dict[str, Any] = {"tokenizer": {"path": files.tokenizer}, "evaluation": {"datasets": [held_out]}}
    if base.training is not None:
        document["training"] = {"data": {"train_manifest": files.train_manifest}}
    return merged(base, document)


def _run_all(
    plan: Plan, folder: Path, order: AblationOrder, workshop: Workshop, report: Callable[[str], None]
) -> list[AblationRun]:
    runs = []
    for seed in plan.experiments[0].record.seeds:
        baseline_folder: Path | None = order.checkpoint
        for experiment in plan.experiments:
            place = folder / "runs" / folder_name(experiment.name) / f"seed-{seed}"
            config = experiment.config_of(seed, place)
            run = _known_run(place / RUN_FILE, experiment, config)
            if run is None:
                place.mkdir(parents=True, exist_ok=True)
                write_resolved(config, place)
                run = _one_run(plan.file, experiment, config, seed, baseline_folder, order, workshop)
                write_json(place / RUN_FILE, run.model_dump(mode="json"))
                report(_line(run))
            runs.append(run)
            if experiment.name == BASELINE and order.checkpoint is None:
                model = place / "training" / "model"
                baseline_folder = model if model.is_dir() else None
    return runs


def _known_run(path: Path, experiment: Experiment, config: RunConfig) -> AblationRun | None:
    if not path.is_file():
        return None
    run = checked(AblationRun, read_json(path), str(path))
    if run.config_checksum != config_checksum(config) or run.method != experiment.record.method:
        reason = "holds a result of other settings; choose another --out, or remove it"
        raise InvalidConfigError(f"{path}: {reason}", path=str(path), reason=reason)
    return run


def _one_run(
    file: AblationFile,
    experiment: Experiment,
    config: RunConfig,
    seed: int,
    baseline_folder: Path | None,
    order: AblationOrder,
    workshop: Workshop,
) -> AblationRun:
    run = AblationRun(
        experiment=experiment.name,
        seed=seed,
        status=AblationStatus.PLANNED,
        method=experiment.record.method,
        config_checksum=config_checksum(config),
        metric_name=file.metric,
        parameter_count=experiment.parameter_count,
    )
    try:
        model_folder = baseline_folder
        if experiment.record.method == Method.RETRAINED:
            trained = workshop.train(config, use_cpu=order.device == "cpu")
            if trained.stop_signal is not None:
                raise Interrupted(trained.stop_signal)
            model_folder = None if trained.model_dir is None else Path(trained.model_dir)
            run = run.model_copy(
                update={
                    "training_steps": trained.steps,
                    "training_loss": trained.loss if math.isfinite(trained.loss) else None,
                    "non_finite_count": trained.skipped_steps,
                }
            )
        if model_folder is None:
            raise CheckpointError("there is no model: the baseline of this seed did not end")
        return _judged(run, _measured(model_folder, config, file, experiment, order.device), experiment, config)
    except (Interrupted, InvalidConfigError):
        raise
    except NonFiniteError as error:
        more = {"non_finite_count": run.non_finite_count + 1}
        return _ended(run.model_copy(update=more), AblationStatus.UNSTABLE, str(error))
    except (CognexisError, RuntimeError, ArithmeticError, OSError) as error:
        return _ended(run, AblationStatus.FAILED, f"{type(error).__name__}: {error}")


def _measured(
    model_folder: Path, config: RunConfig, file: AblationFile, experiment: Experiment, device: str | None
) -> Measurement:
    model: Any = CognexisForCausalLM.from_pretrained(model_folder)
    model.to(_device(device)).eval()
    tokenizer = CognexisTokenizer.from_pretrained(model_folder)
    rows = held_out_rows(config, tokenizer, file.row_length, file.max_rows)
    is_baseline, is_switched = experiment.name == BASELINE, experiment.record.method == Method.SWITCHED
    return measure(model, rows, config, with_depths=is_baseline or not is_switched, in_use=is_baseline or is_switched)


def _judged(run: AblationRun, found: Measurement, experiment: Experiment, config: RunConfig) -> AblationRun:
    """The run with its measurement, and unstable where a stop criterion says so."""
    criteria = experiment.record.stop_criteria
    assert config.model is not None
    limit = criteria.diverged_above if criteria.diverged_above is not None else math.log(config.model.vocab_size) + 1
    run = run.model_copy(
        update={
            "compared": found.compared,
            "in_use": found.in_use,
            "depths": tuple(found.depths),
            "non_finite_count": run.non_finite_count + len(found.faults),
        }
    )
    skipped = run.non_finite_count - len(found.faults)
    reasons = list(found.faults)
    if skipped > criteria.max_skipped_steps:
        reasons.append(f"{skipped} optimizer steps with NaN or infinity")
    loss = found.compared.negative_log_likelihood
    if loss is not None and loss > limit:
        reasons.append(f"diverged: {loss:.3f} nats per token held out, above {limit:.3f}")
    if reasons:
        return _ended(run, AblationStatus.UNSTABLE, "; ".join(reasons))
    return _ended(run, AblationStatus.COMPLETED, "")


def _ended(run: AblationRun, status: AblationStatus, detail: str) -> AblationRun:
    return AblationRun.model_validate(run.model_dump() | {"status": status, "detail": detail})


def _line(run: AblationRun) -> str:
    value = "-" if run.metric_value is None else f"{run.metric_value:.4f}"
    detail = f" ({run.detail})" if run.detail else ""
    return (
        f"{run.experiment}, seed {run.seed}: {run.status.value}, {run.method.value}, {run.metric_name} {value}{detail}"
    )


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BackendError(f"{folder}: another ablation writes to this folder") from error
    finally:
        os.close(descriptor)
