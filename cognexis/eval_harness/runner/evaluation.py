"""``cognexis eval``: every data set of a run configuration, at every depth and in every loop mode.

    load the model -> compare its tokenizer -> build all tasks -> fixed depths -> adaptive modes -> summary

Everything that can be wrong with settings and data is found before the first measurement. The folder of results gets

    rows.jsonl             one row per data set, loop mode, depth and metric
    samples.jsonl          scores of single examples;  predictions.jsonl  the first answers
    matched_compute.json   adaptive rows beside fixed ones of the same mean depth
    summary.json, rows.csv, study.json, config.resolved.yaml

Rows that are there are not measured again, so a killed evaluation goes on when the same command is repeated. A run
that fails becomes rows with ``status`` "failed" and a reason, and the evaluation goes on. Only mode and number of
loops vary between the rows of a data set. ``adaptive_sequence`` is left out where likelihoods are measured, since its
decisions look at later tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cognexis.artifacts.run_config import load_run_config, resolve, write_resolved
from cognexis.checkpoints.json_file import write_json
from cognexis.configuration_rules import nearest_name
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.eval_harness.metrics.depth_results import DepthOptions
from cognexis.eval_harness.metrics.matching import standard_error
from cognexis.eval_harness.metrics.names import MetricName
from cognexis.eval_harness.result_files import RowFile, append_lines
from cognexis.eval_harness.result_tables import write_csv, write_summary
from cognexis.eval_harness.results import ResultRow, result_row
from cognexis.eval_harness.runner.encoding import EncodedExample, encode_examples
from cognexis.eval_harness.runner.execution import Deadline, Execution
from cognexis.eval_harness.runner.generation import run_generations
from cognexis.eval_harness.runner.likelihood import run_likelihoods
from cognexis.eval_harness.runner.loop_run import LoopRun, adaptive_run, fixed_run
from cognexis.eval_harness.runner.matched import matched_pairs, nearest_depth
from cognexis.eval_harness.runner.memory import PeakMemory
from cognexis.eval_harness.runner.provenance import hardware, versions
from cognexis.eval_harness.runner.row_fields import (
    COSTS,
    by_metric,
    cost_fields,
    metric_fields,
    quality,
    score_examples,
)
from cognexis.eval_harness.runner.samples import append_samples
from cognexis.eval_harness.scaling.grid import default_grid
from cognexis.eval_harness.tasks.protocol import Generation, Task, spread
from cognexis.eval_harness.tasks.registry import TaskContext, build_task
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.match import check_tokenizer_match, tokenizer_checksum

_SHOWN_PREDICTIONS = 4


@dataclass(frozen=True)
class EvaluationOrder:
    """What the command was told.

    Attributes:
        config: run configuration with an evaluation section.
        checkpoint: folder of a saved model.
        out: folder of the results; None takes that of the configuration.
        overrides: settings as "path=value".
        device: where to run; None takes CUDA when there is one.
        timeout_s: seconds for one run: a data set in one loop mode at one depth.
    """

    config: Path
    checkpoint: Path
    out: Path | None = None
    overrides: Sequence[str] = ()
    device: str | None = None
    timeout_s: float = 3600.0


@dataclass(frozen=True)
class Loaded:
    """A data set that is ready to be run; ``shared`` are the columns that all of its rows have."""

    name: str
    task: Task
    examples: list[EncodedExample]
    shared: dict[str, Any]

    @property
    def is_generated(self) -> bool:
        """Whether the answers are generated."""
        return isinstance(self.examples[0].example.request, Generation)


def run_evaluation(order: EvaluationOrder, report: Callable[[str], None]) -> list[ResultRow]:
    """Measure what is missing; all rows of the folder.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ArtifactMismatchError: the tokenizer is not the model's; nothing was measured.
        InvalidConfigError: a setting or a data set is wrong; nothing was measured.
    """
    config = resolve(load_run_config(order.config, "eval", list(order.overrides)))
    section: Any = config.evaluation
    if not section.datasets:
        raise InvalidConfigError("evaluation.datasets: none given", path="evaluation.datasets", value=[])
    model, tokenizer = load_model(order.checkpoint, order.device)
    loaded = [_load(dataset, index, order, config, model, tokenizer) for index, dataset in enumerate(section.datasets)]
    _check_metrics(section.metrics, [data.task for data in loaded])
    costs = [name for name in section.metrics if name in COSTS]
    modes = [mode for mode in dict.fromkeys(section.adaptive_modes) if mode != "fixed"]
    for mode in modes:  # what does not go together is found before anything is measured
        adaptive_run(mode, model, config.inference, teacher_forced=False)
    depths = list(section.loop_counts or default_grid(model.config.trained_max_loops))
    folder = order.out or Path(section.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder)
    with RowFile(folder / "rows.jsonl") as file:
        measure = _Measurement(model, tokenizer, file, folder, costs, section.batch_size, order.timeout_s, report)
        for data in loaded:
            for depth in depths:
                measure.run(data, fixed_run(depth, config.inference), config.run.seed)
            for mode in modes:
                if mode == "adaptive_sequence" and not data.is_generated:
                    report(f"{data.name}: {mode} is left out, its decisions look at later tokens of a likelihood")
                    continue
                run = adaptive_run(mode, model, config.inference, teacher_forced=not data.is_generated)
                rows = measure.run(data, run, config.run.seed)
                diagnostics = rows[0].scheduler_diagnostics
                if diagnostics is not None:
                    depth = nearest_depth(diagnostics.average_loops_used)
                    measure.run(data, fixed_run(depth, config.inference), config.run.seed)
        rows = list(file.rows)
    _write_tables(folder, rows, section)
    return rows


def load_model(checkpoint: Path, device: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, ready to be measured; a model of a task's own ids may be without tokenizer.

    Raises:
        CheckpointError: the folder cannot be loaded.
        ArtifactMismatchError: the tokenizer is not the model's.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder")
    model: Any = CognexisForCausalLM.from_pretrained(checkpoint)
    tokenizer = None
    if (checkpoint / "tokenizer.json").is_file() or model.config.tokenizer_checksum is not None:
        tokenizer = CognexisTokenizer.from_pretrained(checkpoint)
        check_tokenizer_match(model.config, tokenizer, generation_config=model.generation_config)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model, tokenizer


def _load(dataset: Any, index: int, order: EvaluationOrder, config: Any, model: Any, tokenizer: Any) -> Loaded:
    limit = model.config.max_position_embeddings
    context = TaskContext(tokenizer, model.config.vocab_size, limit, config.run.seed, config.safety.code_sandbox)
    try:
        task = build_task(dataset, context)
        examples = encode_examples(spread(task.examples(), dataset.max_examples), tokenizer, limit)
    except InvalidConfigError as error:
        place = f"evaluation.datasets[{index}] ({dataset.name})"
        raise InvalidConfigError(f"{place}: {error}", faults=[x.below(place) for x in error.faults]) from error
    digest = hashlib.sha256(repr([(x.example, x.scored, x.prompt) for x in examples]).encode()).hexdigest()[:12]
    shared = {
        "checkpoint": str(order.checkpoint),
        "tokenizer_checksum": (None if tokenizer is None else tokenizer_checksum(tokenizer)) or "none",
        "dataset": dataset.name,
        "split": dataset.split,
        "task_version": f"{task.name} {task.version}, {len(examples)} examples {digest}",
        "prompt_format": task.prompt_format,
        "seed": config.run.seed,
        "hardware": hardware(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
        "trained_max_loops": model.config.trained_max_loops,
        "nonstandard_features": list(model.config.nonstandard_features),
    }
    return Loaded(dataset.name, task, examples, shared)


def _check_metrics(names: Sequence[str], tasks: Sequence[Task]) -> None:
    known = {*map(str, MetricName), *(name for task in tasks for name in task.metrics)}
    for name in names:
        if name not in known:
            reason = f"is no metric of these data sets{nearest_name(name, sorted(known))}"
            raise InvalidConfigError(f"evaluation.metrics: {name!r} {reason}", path="evaluation.metrics", value=name)


@dataclass
class _Measurement:
    """Runs data sets and writes their rows."""

    model: Any
    tokenizer: Any
    file: RowFile
    folder: Path
    costs: Sequence[str]
    batch_size: int
    timeout_s: float
    report: Callable[[str], None]

    def run(self, data: Loaded, run: LoopRun, seed: int) -> list[ResultRow]:
        """Measure one run unless the file has all of its rows; its rows."""
        names = dict(data.task.metrics) | dict.fromkeys(self.costs, "lower_is_better")
        shared = {
            **data.shared,
            "decoding": {**data.task.decoding, **run.decoding},
            "loop_mode": run.mode,
            "loop_count": run.loop_count,
            "extrapolated": run.loop_count > data.shared["trained_max_loops"],
            "num_examples": 0,
        }
        wanted = [result_row({**shared, **metric_fields(name, None, way)}) for name, way in names.items()]
        known = {row.identity: row for row in self.file.rows}
        if all(row.identity in known for row in wanted):
            return [known[row.identity] for row in wanted]
        rows, scores, answers = self._measured(data, run, shared, names, seed)
        append_samples(self.folder / "samples.jsonl", rows, scores)
        append_lines(self.folder / "predictions.jsonl", answers)
        for row in rows:
            self.file.append(row)
        self.report(_line(data.name, run, rows))
        known = {row.identity: row for row in self.file.rows}
        return [known[row.identity] for row in rows]

    def _measured(
        self, data: Loaded, run: LoopRun, shared: dict[str, Any], names: dict[str, str], seed: int
    ) -> tuple[list[ResultRow], dict[str, list[float]], list[dict[str, Any]]]:
        """Rows, scores by metric, and answers to be looked at."""
        try:
            found = self._executed(data, run, seed, self.batch_size)
            scores = by_metric(data.task, score_examples(data.task, data.examples, found.predictions))
            values: dict[str, Any] = quality(data.task, scores) | {name: COSTS[name](found) for name in self.costs}
        except Exception as error:  # one run that fails does not end the others
            detail = f"{type(error).__name__}: {error}"[:500]
            rows = [result_row({**shared, **metric_fields(name, None, way, detail)}) for name, way in names.items()]
            return rows, {}, []
        shared = {**shared, **cost_fields(found, run, data.examples)}
        shared["extrapolated"] = max(found.loops, default=0) > shared["trained_max_loops"]
        rows = []
        for name, way in names.items():
            own = scores.get(name, [])
            counted = {"num_examples": len(own) if name in scores else len(data.examples)}
            counted["standard_error"] = standard_error(own)  # type: ignore[assignment]
            rows.append(result_row({**shared, **metric_fields(name, values[name], way), **counted}))
        return rows, {name: own for name, own in scores.items() if own}, _answers(data, run, found)

    def _executed(self, data: Loaded, run: LoopRun, seed: int, batch_size: int) -> Execution:
        """The run, with half the batch wherever memory is too small."""
        deadline = Deadline(self.timeout_s)
        try:
            with PeakMemory(self.model.device) as memory:
                if data.is_generated:
                    found = run_generations(self.model, self.tokenizer, data.examples, run, batch_size, deadline, seed)
                else:
                    found = run_likelihoods(self.model, data.examples, run, batch_size, deadline)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        else:
            found.peak_memory_bytes = memory.bytes
            return found
        return self._executed(data, run, seed, batch_size // 2)


def _answers(data: Loaded, run: LoopRun, found: Execution) -> list[dict[str, Any]]:
    if not data.is_generated:
        return []
    return [
        {
            "dataset": data.name,
            "loop_mode": run.mode,
            "loop_count": run.loop_count,
            "example": encoded.example.id,
            "answers": answers,
        }
        for encoded, answers in list(zip(data.examples, found.predictions, strict=True))[:_SHOWN_PREDICTIONS]
    ]


def _line(name: str, run: LoopRun, rows: Sequence[ResultRow]) -> str:
    if rows[0].status == "failed":
        shown = rows[0].detail
    else:
        shown = ", ".join(f"{row.metric_name} {row.metric_value:.4g}" for row in rows if row.metric_value is not None)
    diagnostics = rows[0].scheduler_diagnostics
    mean = f" (mean {diagnostics.average_loops_used:.2f})" if run.is_adaptive and diagnostics is not None else ""
    return f"{name}, {run.mode}, num_loops={run.loop_count}{mean}: {shown}"


def _write_tables(folder: Path, rows: Sequence[ResultRow], section: Any) -> None:
    options = DepthOptions(
        definition=section.saturation_definition,
        threshold=section.saturation_threshold,
        tolerance=section.tolerance,
        confidence_level=0.95,
    )
    write_json(folder / "study.json", vars(options))
    write_summary(folder / "summary.json", rows, DepthOptions(**{**vars(options), "confidence_level": None}))
    write_json(folder / "matched_compute.json", matched_pairs(rows))
    write_csv(folder / "rows.csv", rows)
