"""lm-eval's tasks at several depths and in adaptive modes, as result rows, with one loaded model.

    rows = evaluate_with_lm_eval("runs/model", ["arc_easy"], depths=(1, 2, 4, 8), modes=("adaptive_token",))

A row's value, standard error, version and direction are those of lm-eval; ``flops_mean`` is per token that was run,
and the diagnostics count every token. Names of metrics stay as lm-eval writes them ("acc", "acc_norm", ...). Nothing
but the loops changes between the rows of a task.
"""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cognexis.artifacts.run_config.inference_section import InferenceSection
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.optional_package import needed_package
from cognexis.eval_harness.result_files import RowFile
from cognexis.eval_harness.results import ResultRow, result_row
from cognexis.eval_harness.runner.loop_run import LoopRun, adaptive_run, fixed_run
from cognexis.eval_harness.runner.provenance import hardware, versions
from cognexis.tokens.match import tokenizer_checksum

_PURPOSE = "Evaluating with lm-eval"


def evaluate_with_lm_eval(
    checkpoint: str | Path,
    tasks: Sequence[str],
    depths: Sequence[int] | None = None,
    *,
    modes: Sequence[str] = (),
    inference: Mapping[str, Any] | None = None,
    include_path: str | Path | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    seed: int = 0,
) -> list[ResultRow]:
    """Run tasks of lm-eval.

    Args:
        checkpoint: folder of a saved model.
        tasks: names of tasks or groups.
        depths: loop counts of the fixed runs; None: the checkpoint's default, or none where there are ``modes``.
        modes: "adaptive_token" and, for tasks that generate, "adaptive_sequence".
        inference: bounds and scheduler of the adaptive modes, as in the section of a run configuration.
        include_path: folder of task files; lm-eval's own tasks are not read then.
        out: file of rows that grows; rows that it holds are not measured again.
        limit: at most so many examples of a task.
        seed: of few-shot examples and sampling.

    Returns:
        All rows, or those of ``out``.

    Raises:
        BackendError: lm-eval is not installed.
        InvalidConfigError: no task, an unknown one, or loops that the model or a task cannot run.
    """
    lm_eval = needed_package("lm_eval", "lm-eval[hf]", _PURPOSE)
    if not tasks:
        raise InvalidConfigError("tasks: none given", path="tasks", value=tasks)
    manager = needed_package("lm_eval.tasks", "lm-eval[hf]", _PURPOSE).TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise InvalidConfigError(f"tasks: lm-eval does not know {', '.join(unknown)}", path="tasks", value=unknown[0])
    adapter = needed_package("cognexis.eval_harness.lm_eval_adapter", "lm-eval[hf]", _PURPOSE)
    given = {} if device is None else {"device": device}
    model = adapter.CognexisLM(str(checkpoint), batch_size=batch_size, **given)
    section = InferenceSection(**dict(inference or {}))
    chosen = depths if depths is not None or modes else (model.config.default_loops,)
    runs = [fixed_run(depth, section) for depth in chosen or ()]
    runs += [adaptive_run(mode, model.model, section, teacher_forced=mode == "adaptive_token") for mode in modes]
    rows: list[ResultRow] = []
    opened: AbstractContextManager[RowFile | None] = contextlib.nullcontext() if out is None else RowFile(out)
    with opened as file:
        for task in tasks:
            for run in runs:
                order = {"task": task, "limit": limit, "num_fewshot": num_fewshot, **run.decoding}
                if file is not None and any(_is_of(row, order, run, checkpoint, seed) for row in file.rows):
                    continue
                model.set_loops(**run.keywords)
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=num_fewshot,
                    limit=limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=1000,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
                new = list(_rows(found, model, run, order, str(checkpoint), seed))
                for row in new if file is not None else ():
                    file.append(row)  # type: ignore[union-attr]
                rows += new
        return rows if file is None else list(file.rows)


def _is_of(row: ResultRow, order: Mapping[str, Any], run: LoopRun, checkpoint: str | Path, seed: int) -> bool:
    """Whether a row was measured by this order."""
    same = (row.checkpoint, row.loop_mode, row.loop_count, row.seed) == (
        str(checkpoint),
        run.mode,
        run.loop_count,
        seed,
    )
    return same and all(row.decoding.get(name) == value for name, value in order.items())


def _rows(
    found: Mapping[str, Any], model: Any, run: LoopRun, order: Mapping[str, Any], checkpoint: str, seed: int
) -> list[ResultRow]:
    record, config = model.record, model.model.config
    shared: dict[str, Any] = {
        "checkpoint": checkpoint,
        "tokenizer_checksum": tokenizer_checksum(model.tokenizer),
        "loop_mode": run.mode,
        "loop_count": run.loop_count,
        "seed": seed,
        "hardware": hardware(model.model),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "batch_size": int(model.batch_size),
        "versions": {**versions(), "lm_eval": version("lm_eval")},
        "flops_mean": record.flops / record.tokens if record.tokens else None,
        "scheduler_diagnostics": {
            "average_loops_used": record.mean_loops,
            "loop_count_histogram": record.histogram,
            "halt_reasons": dict(sorted(record.halts.items())),
        },
        "extrapolated": max(record.loops, default=0) > config.trained_max_loops,
        "nonstandard_features": config.nonstandard_features,
    }
    rows = []
    for task, values in found["results"].items():
        settings = found["configs"].get(task)
        if settings is None:  # the mean of a group
            continue
        task_fields = {
            "dataset": task,
            "split": settings.get("test_split") or settings.get("validation_split") or "train",
            "task_version": f"lm_eval {found['versions'].get(task)}",
            "prompt_format": f"lm_eval, {found['n-shot'].get(task, 0)} examples in the prompt",
            "decoding": {**order, **(settings.get("generation_kwargs") or {})},
            "num_examples": found["n-samples"][task]["effective"],
        }
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            higher = found["higher_is_better"].get(task, {}).get(metric, True)
            rows.append(
                result_row(
                    {
                        **shared,
                        **task_fields,
                        "metric_name": metric if filtered == "none" else f"{metric},{filtered}",
                        "metric_value": float(value),
                        "metric_direction": "higher_is_better" if higher else "lower_is_better",
                        "standard_error": error if isinstance(error, float) else None,
                    }
                )
            )
    return rows
