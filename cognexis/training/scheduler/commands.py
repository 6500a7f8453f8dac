"""The four commands ``cognexis scheduler collect | fit | calibrate | report``.

``fit`` learns from the training split of its file and stops by the validation split. ``calibrate`` and ``report``
take the validation and the test split when they are given the file of the fit, told by its checksum, and every row of
any other file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cognexis.checkpoints.manifest import MANIFEST_FILE, read_manifest
from cognexis.checkpoints.metadata import scheduler_state, write_scheduler
from cognexis.configuration_rules import value_head_settings
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.looping.token_mask import HALT_DEPENDENCIES
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.training.scheduler.assessment import (
    chosen_points,
    compare_predictors,
    frontiers,
    measured_gains,
    operating_points,
    predicted_gains,
    prediction_figures,
    slots_of,
    thresholds_by_loop,
    thresholds_by_task,
)
from cognexis.training.scheduler.calibration import fit_calibration
from cognexis.training.scheduler.fit import FitSettings, fit_value_head
from cognexis.training.scheduler.frontier import SMALLEST_THRESHOLD, policies_of
from cognexis.training.scheduler.overhead import Decision, Overhead, decide, measure_overhead
from cognexis.training.scheduler.report import REPORT_VERSION, write_report
from cognexis.training.scheduler.rows import DataFile, DataRow, make_batch, read_rows, rows_of_split
from cognexis.training.scheduler.traces import DepthTraces, collect_traces, write_traces

_TIMED_ROWS = 8


@dataclass(frozen=True)
class DataOptions:
    """Which rows, and how deep.

    Attributes:
        checkpoint: folder of a saved model.
        data: JSONL file, see ``rows``.
        max_loops: depth of the runs; None: ``trained_max_loops``, or ``max_loops`` of the model where that is less.
        num_rows: so many rows of the file, drawn by ``seed``; None: all.
        max_length: longer rows are cut off; None: at ``max_position_embeddings``.
        seed: of the sample.
        device: where to run; None takes CUDA when there is one.
    """

    checkpoint: Path
    data: Path
    max_loops: int | None = None
    num_rows: int | None = None
    max_length: int | None = None
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_rows", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidConfigError(f"{name}={value}: must be at least 1", path=name, value=value)


class Session:
    """A loaded checkpoint and the rows of a file.

    Raises:
        CheckpointError: the folder cannot be loaded.
        InvalidConfigError: a row or an option is wrong.
    """

    def __init__(self, options: DataOptions, *, needs_head: bool = False) -> None:
        folder = options.checkpoint
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        self.options = options
        self.tokenizer: Any = None
        if (folder / "tokenizer.json").is_file():
            self.tokenizer = CognexisTokenizer.from_pretrained(folder)
        self.model: Any = CognexisForCausalLM.from_pretrained(folder)
        self.model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        config = self.model.config
        self.head = self.model.model.value_head
        if needs_head and self.head is None:
            raise InvalidConfigError(
                f"checkpoint={str(folder)!r}: has no value head; make one with `cognexis scheduler fit`",
                path="checkpoint",
                value=str(folder),
            )
        self.scheduler: dict[str, Any] = self.model.scheduler_record
        self.num_loops = options.max_loops or min(config.trained_max_loops, config.max_loops)
        self.file: DataFile = read_rows(
            options.data,
            vocab_size=config.vocab_size,
            tokenizer=self.tokenizer,
            max_length=options.max_length or config.max_position_embeddings,
            num_rows=options.num_rows,
            seed=options.seed,
        )

    def rows(self, split: str) -> tuple[list[DataRow], str]:
        """The rows of ``split`` if this is the file of the fit, else all; and in words which they are."""
        if self.fit_facts.get("data_checksum") == self.file.checksum:
            return rows_of_split(self.file.rows, split), f"{split} split of the file of the fit"
        return list(self.file.rows), "all rows of another file than that of the fit"

    @property
    def fit_facts(self) -> dict[str, Any]:
        """What ``fit`` noted in ``scheduler.json``."""
        return (self.scheduler["value_head"] or {}).get("fit", {})

    def trace(self, rows: list[DataRow]) -> DepthTraces:
        """Traces of ``rows`` with the values of the head."""
        return collect_traces(self.model, rows, self.num_loops, head=self.head)

    def overhead(self, rows: list[DataRow]) -> Overhead:
        """The cost of the head on the longest of ``rows``, cut to one length."""
        longest = sorted(rows, key=lambda row: len(row.input_ids))[-_TIMED_ROWS:]
        length = len(longest[0].input_ids)
        ids = make_batch(longest, self.model.config.pad_token_id or 0).input_ids[:, :length]
        return measure_overhead(self.model, ids.to(self.model.device))


def collect(options: DataOptions, out: Path) -> dict[str, Any]:
    """Write depth traces of all rows to ``out``; returns their manifest."""
    session = Session(options)
    traces = session.trace(list(session.file.rows))
    facts = {
        "checkpoint": options.checkpoint.name,
        "weights": _weight_checksums(options.checkpoint),
        "data": options.data.name,
        "data_checksum": session.file.checksum,
        "seed": options.seed,
    }
    return write_traces(out, traces, facts, session.head)


def fit(
    options: DataOptions, out: Path, *, report: Callable[[str], None] | None = None, **settings: Any
) -> dict[str, Any]:
    """Fit a value head and save the model with it to ``out``; returns what ``scheduler.json`` says about the fit.

    Args:
        report: is told about each validation.
        settings: fields of :class:`FitSettings`, except depth and seed, which are those of ``options``.

    Raises:
        InvalidConfigError: ``out`` is the checkpoint itself, a setting is wrong, or a split has no row.
    """
    if out.resolve() == options.checkpoint.resolve():
        raise InvalidConfigError(f"out={str(out)!r}: must be another folder than the checkpoint", path="out")
    value_head_settings(settings.get("head", {"kind": "token"}))
    FitSettings(**settings, seed=options.seed)
    session = Session(options)
    train, validation = (rows_of_split(session.file.rows, split) for split in ("train", "validation"))
    how = FitSettings(**settings, num_loops=session.num_loops, seed=options.seed)
    result = fit_value_head(session.model, train, validation, how, report)
    facts = {
        "data": options.data.name,
        "data_checksum": session.file.checksum,
        "train_rows": len(train),
        "validation_rows": min(len(validation), how.validation_rows),
        "settings": asdict(how) | {"head": session.model.config.value_head},
        "steps": result.steps,
        "best_step": result.best_step,
        "validation_loss": result.validation_loss,
        "constant_loss": result.constant_loss,
        "seconds": round(result.seconds, 2),
    }
    told = {"weights": "model.value_head", "fit": facts}
    session.model.scheduler_record = session.scheduler | scheduler_state(value_head=told)
    session.model.save_pretrained(out)
    if session.tokenizer is not None:
        session.tokenizer.save_pretrained(out)
    return facts


@dataclass(frozen=True)
class CalibrationOptions:
    """How a head is calibrated.

    Attributes:
        method: "isotonic", "linear", "temperature", or "none".
        is_by_loop: one map for each loop.
        tolerance: nats that the loss may lie above that of full depth.
        halt_dependency: whose agreement a token needs; thresholds are chosen for that way of running.
    """

    method: str = "isotonic"
    is_by_loop: bool = False
    tolerance: float = 0.01
    halt_dependency: str = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < float("inf"):
            raise InvalidConfigError(
                f"tolerance={self.tolerance!r}: must be finite and 0 or more", path="tolerance", value=self.tolerance
            )
        if self.halt_dependency not in HALT_DEPENDENCIES:
            raise InvalidConfigError(
                f"halt_dependency={self.halt_dependency!r}: must be one of {', '.join(HALT_DEPENDENCIES)}",
                path="halt_dependency",
                value=self.halt_dependency,
            )


def calibrate(options: DataOptions, how: CalibrationOptions) -> dict[str, Any]:
    """Fit the map and the thresholds of a checkpoint's head and write its ``scheduler.json``; returns its content."""
    session = Session(options, needs_head=True)
    head, rows = session.head, session.rows("validation")
    traces = session.trace(rows[0])
    worth = _worth_continuing(session)
    gains = measured_gains(traces, head, worth)
    head.set_calibration(None)
    before = prediction_figures(predicted_gains(traces, head), gains, SMALLEST_THRESHOLD, worth)
    calibration = None
    if how.method != "none":
        values = slots_of(traces, traces.predictions(head))
        is_logit = head.output_kind == "continue_logit"
        calibration = fit_calibration(how.method, values, gains, is_logit=is_logit, is_by_loop=how.is_by_loop)
    head.set_calibration(calibration)
    min_loops = session.model.config.min_loops
    found = frontiers(session.model, traces, head, dependency=how.halt_dependency, min_loops=min_loops)
    points = chosen_points(found, how.tolerance)
    overhead = session.overhead(rows[0])
    decision = _decision(traces, head, points, overhead)
    chosen = points["value_head"]
    threshold = SMALLEST_THRESHOLD if chosen is None else chosen["threshold"]
    after = prediction_figures(predicted_gains(traces, head), gains, threshold, worth)
    facts = {
        "data": options.data.name,
        "data_checksum": session.file.checksum,
        "rows": rows[1],
        "num_rows": len(rows[0]),
        "num_loops": session.num_loops,
        **asdict(how),
        "full_depth_loss": found["constant"][-1]["loss"],
        "chosen": points,
        "loop_thresholds": thresholds_by_loop(traces, head, how.tolerance),
        "task_thresholds": thresholds_by_task(
            session.model, traces, head, how.tolerance, dependency=how.halt_dependency, min_loops=min_loops
        ),
        "mae": [before["mae"], after["mae"]],
        "calibration_error": [before["calibration_error"], after["calibration_error"]],
        "false_halt_rate": after["false_halt_rate"],
        "false_continue_rate": after["false_continue_rate"],
        "overhead": asdict(overhead),
        "falls_back": decision.falls_back,
        "decision": decision.reason,
    }
    told = {**(session.scheduler["value_head"] or {"weights": "model.value_head"}), "calibrated": facts}
    content = session.scheduler | scheduler_state(decision.scheduler, told, calibration)
    session.model.scheduler_record = content
    write_scheduler(options.checkpoint, session.model)
    return content


def report(options: DataOptions, out: Path) -> dict[str, Any]:
    """Measure a calibrated head on rows that it has not seen and write the report to ``out``; returns the report."""
    session = Session(options, needs_head=True)
    calibrated = (session.scheduler["value_head"] or {}).get("calibrated")
    if calibrated is None:
        raise InvalidConfigError(
            f"checkpoint={str(options.checkpoint)!r}: its value head is not calibrated; run `cognexis scheduler "
            "calibrate` first",
            path="checkpoint",
        )
    if calibrated["data_checksum"] == session.file.checksum != session.fit_facts.get("data_checksum"):
        raise InvalidConfigError(
            f"data={str(options.data)!r}: the thresholds were chosen on this very file; report on another one",
            path="data",
        )
    head, (rows, which) = session.head, session.rows("test")
    traces = session.trace(rows)
    worth, min_loops = _worth_continuing(session), session.model.config.min_loops
    points = calibrated["chosen"]
    thresholds = {name: None if point is None else point["threshold"] for name, point in points.items()}
    threshold = thresholds["value_head"] or SMALLEST_THRESHOLD
    gains = measured_gains(traces, head, worth)
    predictions = predicted_gains(traces, head)
    head.set_calibration(None)
    uncalibrated = prediction_figures(predicted_gains(traces, head), gains, threshold, worth)
    head.set_calibration(session.scheduler["calibration"])
    own = calibrated["halt_dependency"]
    curves = {
        name: frontiers(session.model, traces, head, dependency=name, min_loops=min_loops)
        for name in dict.fromkeys((own, "row"))
    }
    operating = {
        name: operating_points(
            session.model, traces, head, thresholds, curves[own]["oracle"], dependency=name, min_loops=min_loops
        )
        for name in dict.fromkeys((own, *HALT_DEPENDENCIES))
    }
    overhead = session.overhead(rows)
    here = {row["policy"]: row for row in operating[own]}
    content = {
        "schema_version": REPORT_VERSION,
        "facts": {
            "checkpoint": options.checkpoint.name,
            "data": options.data.name,
            "data_checksum": session.file.checksum,
            "rows": which,
            "num_rows": len(rows),
            "num_tokens": int(traces.has_target.sum()),
            "num_loops": session.num_loops,
            "calibration": (session.scheduler["calibration"] or {}).get("method"),
            "threshold": thresholds["value_head"],
            "gain_threshold": worth,
            **{key: calibrated[key] for key in ("tolerance", "halt_dependency")},
        },
        "predictors": compare_predictors(traces, predictions, gains, worth),
        "value_head": prediction_figures(predictions, gains, threshold, worth),
        "uncalibrated": uncalibrated,
        "operating_points": operating,
        "frontiers": curves,
        "overhead": asdict(overhead),
        "scheduler": session.scheduler["scheduler"],
        "decision": _decision(traces, head, points | {"value_head": here.get("value_head")}, overhead).reason,
    }
    write_report(out, content)
    return content


def _decision(traces: DepthTraces, head: Any, points: dict[str, Any], overhead: Overhead) -> Decision:
    """The scheduler that the chosen points and the cost of the head lead to."""
    policies = policies_of(traces, head)
    rule, value = points["relative_delta"], points["value_head"]
    fallback = {"type": "fixed", "num_loops": traces.num_loops}
    if rule is not None:
        fallback = policies["relative_delta"].scheduler(rule["threshold"])
    if value is None:
        reason = f"no threshold of the value head keeps the loss, so the scheduler falls back to {fallback['type']}"
        return Decision(fallback, True, 0.0, 0.0, reason)
    return decide(
        overhead,
        mean_loops=value["mean_loops"],
        full_loops=traces.num_loops,
        value_scheduler=policies["value_head"].scheduler(value["threshold"]),
        rule_scheduler=fallback,
    )


def _worth_continuing(session: Session) -> float:
    """The gain in nats above which continuing was right: that of the fit where it has one."""
    return float(session.fit_facts.get("settings", {}).get("gain_threshold", FitSettings.gain_threshold))


def _weight_checksums(folder: Path) -> list[str] | None:
    if not (folder / MANIFEST_FILE).is_file():
        return None
    return [artifact.sha256 for artifact in read_manifest(folder) if artifact.kind == "model_weights"]
