"""``cognexis eval loop-scaling``: a checkpoint at several depths on rows of data, and the report.

The folder of results holds ``rows.jsonl`` (one row per data set, metric and depth), ``samples.jsonl`` (the scores of
single rows of data), ``continuations.jsonl`` (the same prompts, continued at every depth), ``study.json`` (definitions
and tolerances), ``config.resolved.yaml``, ``summary.json``, ``rows.csv`` and the report. A depth whose rows are there
is not measured again, so a killed study goes on when the same command is repeated. A depth that fails becomes rows
with ``status`` "failed", and the study goes on. Only the number of loops varies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from cognexis.artifacts.run_config import load_run_config, resolve, write_resolved
from cognexis.checkpoints.json_file import read_json, write_json
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.eval_harness.metrics.depth_results import DepthOptions
from cognexis.eval_harness.result_files import RowFile, append_lines, read_rows
from cognexis.eval_harness.result_tables import write_csv, write_summary
from cognexis.eval_harness.results import ResultRow
from cognexis.eval_harness.scaling.depth_rows import DepthRows, planned_rows, rows_of_depth, shared_fields
from cognexis.eval_harness.scaling.figures import require_figures
from cognexis.eval_harness.scaling.grid import default_grid
from cognexis.eval_harness.scaling.report import write_report
from cognexis.eval_harness.scaling.row_sources import MEASURED_TYPES, is_measured, read_scaling_rows
from cognexis.eval_harness.scaling.study import study_curves
from cognexis.eval_harness.scaling.study_files import (
    CONTINUATIONS,
    SAMPLES,
    read_continuations,
    read_samples,
    row_key,
)
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.match import check_tokenizer_match, tokenizer_checksum

ROWS, STUDY = "rows.jsonl", "study.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
        BackendError: the package that draws the figures is missing; nothing was measured.
    """
    require_figures()
    config = resolve(load_run_config(order.config, "eval", list(order.overrides)))
    section: Any = config.evaluation
    datasets = [dataset for dataset in section.datasets if is_measured(dataset)]
    if not datasets:
        raise InvalidConfigError(
            f"evaluation.datasets: none has a type that loop scaling measures: {', '.join(MEASURED_TYPES)}"
        )
    model, tokenizer = _loaded(order)
    length = order.row_length or min(128, model.config.max_position_embeddings)
    sources = {
        dataset.name: read_scaling_rows(
            dataset, tokenizer, model.config, length=length, max_rows=order.max_rows, seed=config.run.seed
        )
        for dataset in datasets
    }
    depths = list(order.depths or section.loop_counts or default_grid(model.config.trained_max_loops))
    folder = order.out or Path(section.output_path or f"runs/{config.run.name}/evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    write_resolved(config, folder)
    identity = {
        "checkpoint": str(order.checkpoint),
        "tokenizer_checksum": (None if tokenizer is None else tokenizer_checksum(tokenizer)) or "unknown",
        "seed": config.run.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with RowFile(folder / ROWS) as file:
        for dataset in datasets:
            for depth in depths:
                data = sources[dataset.name]
                shared = {**identity, "dataset": dataset.name, "split": dataset.split}
                shared |= shared_fields(model, data, depth)
                if all(file.has(row.identity) for row in planned_rows(shared)):
                    continue
                found = rows_of_depth(
                    model, data, shared, batch_size=section.batch_size, timeout_s=order.timeout_s, tokenizer=tokenizer
                )
                _keep_details(folder, found)
                for row in found.rows:
                    file.append(row)
                report(_line(dataset.name, depth, found.rows))
    options = DepthOptions(
        definition=section.saturation_definition,
        threshold=section.saturation_threshold,
        tolerance=section.tolerance,
        confidence_level=0.95,
    )
    write_json(folder / STUDY, vars(options))
    return report_folder(folder)


def _loaded(order: LoopScalingOrder) -> tuple[Any, Any | None]:
    """The model on its device, and its tokenizer if it has one."""
    if not order.checkpoint.is_dir():
        raise CheckpointError(f"{order.checkpoint}: no such folder")
    model: Any = CognexisForCausalLM.from_pretrained(order.checkpoint)
    model.to(order.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    if not any((order.checkpoint / name).is_file() for name in _TOKENIZER_FILES):
        return model, None
    tokenizer = CognexisTokenizer.from_pretrained(order.checkpoint)
    check_tokenizer_match(model.config, tokenizer)
    return model, tokenizer


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
    samples, texts = read_samples(folder / SAMPLES, rows), read_continuations(folder / CONTINUATIONS, rows)
    return write_report(folder, study_curves(rows, options, samples, texts))


def _keep_details(folder: Path, found: DepthRows) -> None:
    """Scores and texts of one depth, before its rows, so that no row is without them."""
    completed = [row for row in found.rows if row.status == "completed"]
    scores = [
        {"row": row_key(row), "scores": found.scores[row.metric_name]}
        for row in completed
        if row.metric_name in found.scores
    ]
    append_lines(folder / SAMPLES, scores)
    if found.texts:
        append_lines(
            folder / CONTINUATIONS, [{"row": row_key(completed[0]), "prompts": found.prompts, "texts": found.texts}]
        )


def _line(name: str, depth: int, rows: Sequence[ResultRow]) -> str:
    shown = ", ".join(f"{row.metric_name} {row.metric_value:.4f}" for row in rows if row.metric_value is not None)
    return f"{name}, {depth} loops: {shown or rows[0].detail}"
