"""Train memory stacks on synthetic tasks and compare what they learn.

    python -m cognexis.eval_harness.cortex --task delayed_recall --stack slstm_postup
    python -m cognexis.eval_harness.cortex --task majority --stack all

The results folder holds ``rows.jsonl`` (one line per stack and task, appended as soon as it is known),
``summary.json``, ``summary.md`` and ``accuracy.png``. A row that is there under the same settings is not computed
again, so an interrupted run goes on when the same command is repeated. Exit codes: 0 done, 1 a stack failed, 2 wrong
usage or settings, 130 interrupted. Tables and JSON go to stdout, progress to stderr.
"""

import argparse
import ast
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cognexis.errors import CognexisError, InvalidConfigError
from cognexis.eval_harness.cortex_report import Row, read_rows, text_table, write_reports
from cognexis.eval_harness.cortex_stacks import ALIASES, STACKS, StackRecipe, stack_names
from cognexis.eval_harness.cortex_training import TrainingSettings, train_classifier
from cognexis.tasks.registry import TASKS, get_task
from cognexis.tasks.sequence_task import Splits

logger = logging.getLogger("cognexis.eval_harness.cortex")

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# Chosen for about three minutes per stack on two cores.
COMMON_DEFAULTS: dict[str, Any] = {"num_samples": 2000, "epochs": 12, "easier_epochs": 0, "lr": 2e-3, "batch_size": 32}
TASK_DEFAULTS: dict[str, dict[str, Any]] = {"dyck": {"num_samples": 4000, "epochs": 4, "easier_epochs": 3}}


@dataclass(frozen=True)
class Job:
    """One row to compute."""

    task: str
    stack: str
    recipe: StackRecipe
    width: int
    num_samples: int
    difficulty: dict[str, Any]
    settings: TrainingSettings
    is_deterministic: bool

    @property
    def description(self) -> Row:
        """Everything that the result depends on."""
        return {
            "task": self.task,
            "stack": self.stack,
            "width": self.width,
            "num_samples": self.num_samples,
            "difficulty": get_task(self.task).difficulty() | self.difficulty,
            "settings": asdict(self.settings),
            "deterministic": self.is_deterministic,
        }

    @property
    def key(self) -> str:
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cognexis.eval_harness.cortex",
        description="Train memory stacks on synthetic tasks and compare what they learn.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", help=f"{', '.join(TASKS)}, or all")
    add("--stack", help=f"{', '.join([*STACKS, *ALIASES])}, or all")
    add("--list", action="store_true", help="list tasks and stacks, and stop")
    add("--epochs", type=int, help="passes over the training part")
    add("--easier-epochs", type=int, help="passes over each easier data set of the task, before that")
    add("--batch-size", type=int, help="sequences per update")
    add("--lr", type=float, help="highest learning rate")
    add("--num-samples", type=int, help="sequences in all three parts together")
    add("--seed", type=int, default=42, help="data, initial weights and order (default %(default)s)")
    add("--set", dest="sets", action="append", default=[], metavar="NAME=VALUE", help="difficulty; repeatable")
    add("--d-hidden", type=int, help="width of the stacks")
    add("--stop-at", type=float, help="validation accuracy that ends the training (default 1.0)")
    add("--max-minutes", type=float, help="per stack; training ends with the epoch in which they pass")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--deterministic", action="store_true", help="only algorithms that give the same result each time")
    add("--chunk-size", type=int, help="train on the last so many tokens; the rest runs without gradient")
    add("--axon-lr-mult", type=float, help="factor on the learning rate of Axon recurrences (default 1)")
    add("--axon-weight-decay", type=float, help="weight decay of Axon recurrences (default 0)")
    add("--rtu-disable-traces-last-chunk", action="store_true", help="zero the carried sensitivities first")
    add("--reset-state-before-last-chunk", action="store_true", help="start the last chunk from a fresh state")
    add("--axons-parity-probe", type=int, metavar="N", help="compare Axon gradients with whole ones every N updates")
    add("--out", type=Path, default=Path("runs/cortex"), help="results folder (default %(default)s)")
    add("--rerun", action="store_true", help="compute rows again that are there")
    add("--no-plot", action="store_true", help="write no picture")
    add("--json", action="store_true", help="print the rows as JSON instead of a table")
    add("--log-level", default="INFO", type=str.upper, choices=LOG_LEVELS, help="default %(default)s")
    return parser


def parse_sets(texts: Sequence[str]) -> dict[str, Any]:
    """Numbers from texts like ``delay=100``.

    Raises:
        InvalidConfigError: a text has another form.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            sign = ""
        if not (name and sign) or type(found[name]) not in (int, float):
            raise InvalidConfigError(f"--set {text}: must be NAME=NUMBER", path="set", value=text)
    return found


def plan(options: argparse.Namespace) -> list[Job]:
    """All rows that the options ask for, checked before anything is computed."""
    for name in ("task", "stack"):
        if getattr(options, name) is None:
            raise InvalidConfigError(f"--{name} is missing; --list shows the choices", path=name)
    tasks = list(TASKS) if options.task == "all" else [get_task(options.task).name]
    stacks = stack_names(options.stack)
    difficulty = parse_sets(options.sets)
    jobs = []
    for task in tasks:
        for name in set(difficulty) - set(get_task(task).difficulty()):
            known = ", ".join(get_task(task).difficulty())
            raise InvalidConfigError(f"--set {name}: task {task} knows {known}", path=name)
        defaults = COMMON_DEFAULTS | TASK_DEFAULTS.get(task, {})
        given = {name: getattr(options, name, None) for name in (*defaults, *_TRAINING_OPTIONS)}
        chosen = defaults | {name: value for name, value in given.items() if value is not None}
        num_samples = chosen.pop("num_samples")
        if options.max_minutes is not None:
            chosen["max_seconds"] = 60 * options.max_minutes
        settings = TrainingSettings(seed=options.seed, device=pick_device(options.device), **chosen)
        for stack in stacks:
            recipe = STACKS[stack]
            width = recipe.width if recipe.is_width_fixed or options.d_hidden is None else options.d_hidden
            if width < 1:
                raise InvalidConfigError(f"d_hidden={width}: must be at least 1", path="d_hidden", value=width)
            jobs.append(Job(task, stack, recipe, width, num_samples, difficulty, settings, options.deterministic))
    return jobs


_TRAINING_OPTIONS = (
    "stop_at",
    "chunk_size",
    "axon_lr_mult",
    "axon_weight_decay",
    "rtu_disable_traces_last_chunk",
    "reset_state_before_last_chunk",
    "axons_parity_probe",
)


def pick_device(name: str) -> str:
    """The device of that name; ``auto`` is CUDA if there is one.

    Raises:
        InvalidConfigError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidConfigError(f"device={name!r}: {reason}", path="device", value=name) from error
    return name


def compute(job: Job, splits: Splits) -> Row:
    """Train and test one stack."""
    name = f"{job.task} / {job.stack}"
    easier = get_task(job.task).easier(len(splits.train), seed=job.settings.seed, **job.difficulty)
    # The bar appears on terminals only; elsewhere the line per epoch shows the progress.
    with tqdm(desc=name, unit="update", disable=None, leave=False, file=sys.stderr) as bar:

        def on_update(update: int, total: int, loss: float) -> None:
            bar.total = total
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        def on_epoch(epoch: int, entry: dict[str, float]) -> None:
            bar.clear()
            logger.info(
                "%s: epoch %d of %d: loss %.4f, validation accuracy %.3f, %.0f s",
                *(name, epoch, job.settings.epochs, entry["loss"], entry["val_accuracy"], entry["seconds"]),
            )

        result = train_classifier(
            lambda: job.recipe.build(job.width),
            job.width,
            splits,
            job.settings,
            easier=easier,
            on_update=on_update,
            on_epoch=on_epoch,
        )
    logger.info("%s: test accuracy %.3f (weights of epoch %d)", name, result.test_accuracy, result.best_epoch)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"key": job.key, "status": "done", **job.description, **asdict(result), "machine": machine}


def run(options: argparse.Namespace) -> int:
    """Compute the missing rows, write the reports, print the table."""
    jobs = plan(options)
    data: dict[str, Splits] = {}
    for job in jobs:
        if job.task not in data:
            data[job.task] = get_task(job.task).splits(job.num_samples, seed=job.settings.seed, **job.difficulty)
    for job in jobs:
        reason = job.recipe.missing()
        if reason and options.stack != "all":
            raise InvalidConfigError(f"stack={job.stack!r}: {reason}", path="stack", value=job.stack)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rows.jsonl"
    known = {row.get("key"): row for row in read_rows(path) if row.get("status") == "done"}
    rows = []
    for job in jobs:
        rows.append(_row_of(job, data[job.task], {} if options.rerun else known, path))
    latest = {row["key"]: row for row in [*known.values(), *rows]}
    written = write_reports(options.out, list(latest.values()), plot=not options.no_plot)
    logger.info("written: %s", ", ".join(map(str, [path, *written])))
    print(json.dumps(rows, indent=2) if options.json else text_table(rows))
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _row_of(job: Job, splits: Splits, known: dict[Any, Row], path: Path) -> Row:
    if job.key in known:
        logger.info("%s / %s: taken from %s", job.task, job.stack, path)
        return known[job.key]
    row: Row = {"key": job.key, **job.description}
    if reason := job.recipe.missing():
        logger.warning("%s / %s: left out: %s", job.task, job.stack, reason)
        return row | {"status": "left out", "reason": reason}
    try:
        row = compute(job, splits)
    except Exception as error:
        logger.error("%s / %s: %s: %s", job.task, job.stack, type(error).__name__, error)
        logger.debug("where it was raised", exc_info=True)
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    _append(path, row)
    return row


def _append(path: Path, row: Row) -> None:
    """Add one line; if the last one was cut off, begin a new one."""
    with path.open("ab+") as file:
        is_cut = file.tell() and not path.read_bytes().endswith(b"\n")
        file.write((b"\n" if is_cut else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def listing() -> str:
    """Tasks with their difficulty, and stacks with what they consist of."""
    lines = ["tasks"]
    for name, task in TASKS.items():
        settings = " ".join(f"{key}={value}" for key, value in task.difficulty().items())
        lines.append(f"  {name:22}{task.title}; {settings}")
    lines.append("stacks")
    for name, recipe in STACKS.items():
        others = [alias for alias, target in ALIASES.items() if target == name]
        reason = recipe.missing()
        notes = [*(f"also {alias}" for alias in others), *([f"not here: {reason}"] if reason else [])]
        lines.append("; ".join([f"  {name:22}{recipe.title}", *notes]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level, format="%(message)s", stream=sys.stderr, force=True)
    if options.list:
        print(listing())
        return 0
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if options.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        return run(options)
    except InvalidConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CognexisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the rows that are missing", file=sys.stderr)
        return 130
    finally:
        if options.deterministic:
            torch.use_deterministic_algorithms(was_deterministic)


if __name__ == "__main__":
    sys.exit(main())
