"""``cognexis eval loop-scaling``: a checkpoint at several depths on texts, and the report.

The folder of results holds ``rows.jsonl`` (one row per data set, metric and depth), ``samples.jsonl`` (the scores of
single rows of text), ``study.json`` (definitions and tolerances), ``config.resolved.yaml``, ``summary.json``,
``rows.csv`` and the report. A depth whose rows are there is not measured again, so a killed study goes on when the
same command is repeated. A depth that fails (a state that is not finite, too little memory, no end in time) becomes
rows with ``status`` "failed", and the study goes on. Only the number of loops varies; the batch is halved only where
memory is too small for it, and the row says so.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from cognexis.artifacts.run_config import load_run_config, resolve, write_resolved
from cognexis.checkpoints.json_file import parse_strict_json, read_json, write_json
from cognexis.errors import CheckpointError, CognexisError, InvalidConfigError
from cognexis.eval_harness.compute import StageFlops, elementwise_flops, matmul_flops
from cognexis.eval_harness.metrics.depth_results import DepthOptions
from cognexis.eval_harness.metrics.language import perplexity
from cognexis.eval_harness.metrics.matching import mean_score
from cognexis.eval_harness.result_files import RowFile, read_rows
from cognexis.eval_harness.result_tables import write_csv, write_summary
from cognexis.eval_harness.results import ResultRow, result_row
from cognexis.eval_harness.scaling.grid import default_grid
from cognexis.eval_harness.scaling.measure import DepthMeasurement, measure_depth
from cognexis.eval_harness.scaling.report import write_report
from cognexis.eval_harness.scaling.study import Samples, study_curves
from cognexis.eval_harness.scaling.text_rows import read_text_rows
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.match import check_tokenizer_match, tokenizer_checksum

ROWS, SAMPLES, STUDY = "rows.jsonl", "samples.jsonl", "study.json"
_DIRECTIONS = {
    "negative_log_likelihood": "lower_is_better",
    "perplexity": "lower_is_better",
    "accuracy": "higher_is_better",
}


@dataclass(frozen=True)
class LoopScalingOrder:
    """What the command was told.

    Attributes:
        config: run configuration with an evaluation section.
        checkpoint: folder of a saved model.
        depths: loop counts; None takes those of the configuration, or doubling up to the depth of training.
        out: folder of the results; None takes that of the configuration.
        overrides: settings as "path=value".
        row_length: predicted tokens of a row; None: 128, or what the model allows.
        max_rows: at most so many rows of a data set, at equal distances.
        device: where to run; None takes CUDA when there is one.
        timeout_s: seconds for one depth on one data set.
    """

    config: Path
    checkpoint: Path
    depths: Sequence[int] | None = None
    out: Path | None = None
    overrides: Sequence[str] = ()
    row_length: int | None = None
    max_rows: int = 256
    device: str | None = None
    timeout_s: float = 600.0


def run_loop_scaling(order: LoopScalingOrder, report: Callable[[str], None]) -> list[Path]:
    """Measure and write the report; the report's files.

    Raises:
        CheckpointError: the folder cannot be loaded.
        InvalidConfigError: a setting, a data set or a depth is wrong; nothing was measured.
    """
    config = resolve(load_run_config(order.config, "eval", list(order.overrides)))
    section: Any = config.evaluation
    texts = [dataset for dataset in section.datasets if dataset.type == "language_modeling"]
    if not texts:
        raise InvalidConfigError("evaluation.datasets: none has type language_modeling, which loop scaling measures")
    if not order.checkpoint.is_dir():
        raise CheckpointError(f"{order.checkpoint}: no such folder")
    model: Any = CognexisForCausalLM.from_pretrained(order.checkpoint)
    model.to(order.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    tokenizer = CognexisTokenizer.from_pretrained(order.checkpoint)
    check_tokenizer_match(model.config, tokenizer)
    length = order.row_length or min(128, model.config.max_position_embeddings)
    rows_by_name = {
        dataset.name: _spread(
            read_text_rows(Path(dataset.path), tokenizer, length, model.config.vocab_size), order.max_rows
        )
        for dataset in texts
    }
    depths = list(order.depths or section.loop_counts or default_grid(model.config.trained_max_loops))
    folder = order.out or Path(section.output_path or f"runs/{config.run.name}/evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder)
    with RowFile(folder / ROWS) as file:
        for dataset in texts:
            for depth in depths:
                shared = _shared(order, model, tokenizer, dataset, depth, length, config.run.seed)
                wanted = [result_row({**shared, **_metric(name, None, "planned")}) for name in _DIRECTIONS]
                if all(file.has(row.identity) for row in wanted):
                    continue
                rows, scores = _measured(
                    model, rows_by_name[dataset.name], shared, depth, section.batch_size, order.timeout_s
                )
                _append_samples(folder / SAMPLES, rows, scores)
                for row in rows:
                    file.append(row)
                report(_line(dataset.name, depth, rows))
    options = DepthOptions(
        definition=section.saturation_definition,
        threshold=section.saturation_threshold,
        tolerance=section.tolerance,
        confidence_level=0.95,
    )
    write_json(folder / STUDY, vars(options))
    return report_folder(folder)


def report_folder(folder: Path) -> list[Path]:
    """Make the report, the summary and the table of a folder from its JSON files alone; the report's files.

    Raises:
        InvalidConfigError: there are no rows, or a file is damaged.
    """
    if not (folder / ROWS).is_file():
        raise InvalidConfigError(f"{folder}: holds no {ROWS}", path="folder", value=str(folder))
    rows = read_rows(folder / ROWS)
    options = DepthOptions(**read_json(folder / STUDY)) if (folder / STUDY).is_file() else DepthOptions()
    write_summary(folder / "summary.json", rows, DepthOptions(**{**vars(options), "confidence_level": None}))
    write_csv(folder / "rows.csv", rows)
    return write_report(folder, study_curves(rows, options, read_samples(folder / SAMPLES, rows)))


def read_samples(path: Path, rows: Iterable[ResultRow]) -> Samples:
    """Scores of single examples by row; a cut-off line is left out, and of repeated lines the last counts."""
    if not path.is_file():
        return {}
    found: dict[str, list[float]] = {}

    def refuse(reason: str) -> Any:
        raise InvalidConfigError(f"{path}: {reason}")

    for line in path.read_bytes().split(b"\n")[:-1]:
        content = parse_strict_json(line, refuse)
        found[str(content["row"])] = [float(score) for score in content["scores"]]
    return {row.identity: found[_key(row)] for row in rows if _key(row) in found}


def _key(row: ResultRow) -> str:
    return json.dumps(row.identity)


def _append_samples(path: Path, rows: Sequence[ResultRow], scores: dict[str, list[float]]) -> None:
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    with open(path, "ab") as file:
        for row in rows:
            if row.metric_name in scores and row.status == "completed":
                line = {"row": _key(row), "scores": scores[row.metric_name]}
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]


def _shared(
    order: LoopScalingOrder, model: Any, tokenizer: Any, dataset: Any, depth: int, length: int, seed: int
) -> dict[str, Any]:
    """The fields that the rows of one depth have in common before it is measured."""
    flops = matmul_flops(model.config, length, depth)
    return {
        "checkpoint": str(order.checkpoint),
        "tokenizer_checksum": tokenizer_checksum(tokenizer) or "unknown",
        "dataset": dataset.name,
        "split": dataset.split,
        "task_version": f"text rows of {length} tokens, 1",
        "prompt_format": "none",
        "decoding": {},
        "loop_mode": "fixed",
        "loop_count": depth,
        "num_examples": 0,
        "seed": seed,
        "hardware": _hardware(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "flops_mean": flops.total / length,
        "stage_flops": _per_token(flops, length),
        "elementwise_flops_mean": elementwise_flops(model.config, length, depth).total / length,
        "extrapolated": depth > model.config.trained_max_loops,
        "nonstandard_features": list(model.config.nonstandard_features),
    }


def _measured(
    model: Any, rows: Tensor, shared: dict[str, Any], depth: int, batch_size: int, timeout_s: float
) -> tuple[list[ResultRow], dict[str, list[float]]]:
    """The rows of one depth, and the scores of single examples by metric."""
    shared = {**shared, "batch_size": batch_size}
    try:
        found = measure_depth(model, rows, depth, batch_size=batch_size, timeout_s=timeout_s)
        mean = mean_score(found.losses)
        values = {
            "negative_log_likelihood": mean,
            "perplexity": perplexity(mean),
            "accuracy": mean_score(found.accuracies),
        }
    except (CognexisError, TimeoutError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) and batch_size > 1:
            return _measured(model, rows, shared, depth, batch_size // 2, timeout_s)
        detail = f"{type(error).__name__}: {error}"[:500]
        return [result_row({**shared, **_metric(name, None, detail)}) for name in _DIRECTIONS], {}
    scores = {"negative_log_likelihood": found.losses, "accuracy": found.accuracies}
    shared |= _timing(found) | {"num_examples": len(rows), "non_finite_count": 0}
    made = []
    for name, value in values.items():
        spread = {"standard_error": _standard_error(scores[name])} if name in scores else {}
        made.append(result_row({**shared, **_metric(name, value), **spread}))
    return made, scores


def _metric(name: str, value: float | None, detail: str = "") -> dict[str, Any]:
    status = "completed" if value is not None else "failed"
    direction = _DIRECTIONS[name]
    return {
        "metric_name": name,
        "metric_value": value,
        "metric_direction": direction,
        "status": status,
        "detail": detail,
    }


def _timing(found: DepthMeasurement) -> dict[str, Any]:
    return {
        "latency_ms_mean": found.latency.mean,
        "latency_ms_p50": found.latency.median,
        "latency_ms_p90": found.latency.p90,
        "latency_ms_p99": found.latency.p99,
        "tokens_per_second": found.tokens_per_second,
        "peak_memory_bytes": found.peak_memory_bytes,
        "hidden_norms": found.norms,
        "hidden_deltas": found.deltas,
    }


def _per_token(flops: StageFlops, length: int) -> dict[str, float]:
    return {name: value / length for name, value in vars(flops).items()}


def _standard_error(scores: Sequence[float]) -> float | None:
    count = len(scores)
    if count < 2:
        return None
    mean = math.fsum(scores) / count
    return math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (count - 1) / count)


def _hardware(model: Any) -> str:
    if model.device.type == "cuda":
        return str(torch.cuda.get_device_name(model.device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _line(name: str, depth: int, rows: Sequence[ResultRow]) -> str:
    shown = ", ".join(f"{row.metric_name} {row.metric_value:.4f}" for row in rows if row.metric_value is not None)
    return f"{name}, {depth} loops: {shown or rows[0].detail}"
