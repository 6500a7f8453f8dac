"""The commands ``cognexis eval ...``; what they need is imported when they run."""

import sys
from pathlib import Path
from typing import Annotated

import typer

eval_app = typer.Typer(no_args_is_help=True, help="Measure a checkpoint, at several depths.")

data_app = typer.Typer(no_args_is_help=True, help="Make evaluation data of installed packages.")
eval_app.add_typer(data_app, name="data")

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a setting.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is cuda if present.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results; default: the configuration's.")]


@eval_app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Run configuration with an evaluation section.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a saved model.")] = None,
    out: Out = None,
    sets: Sets = None,
    device: Device = None,
) -> None:
    """Measure a checkpoint: all data sets of a configuration, at every depth and in every loop mode."""
    given = {"--config": config, "--checkpoint": checkpoint, "--out": out, "--set": sets, "--device": device}
    if context.invoked_subcommand is not None:
        if early := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter(f"{early[0]} must stand behind {context.invoked_subcommand}")
        return
    if config is None or checkpoint is None:
        raise typer.BadParameter("needs --config and --checkpoint, or a command such as loop-scaling")
    from cognexis.eval_harness.runner.evaluation import EvaluationOrder, run_evaluation

    order = EvaluationOrder(config, checkpoint, out, tuple(sets or ()), device)
    rows = run_evaluation(order, _report)
    failed = [row for row in rows if row.status == "failed"]
    print(f"{len(rows)} rows, {len(failed)} of them failed")
    if failed:
        raise typer.Exit(1)


@eval_app.command("loop-scaling")
def loop_scaling(
    config: Annotated[Path, typer.Option(help="Run configuration with an evaluation section.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of a saved model.")],
    depths: Annotated[
        str | None, typer.Option(help="Loop counts, such as 1,2,4,8; default: the configuration's.")
    ] = None,
    out: Out = None,
    sets: Sets = None,
    max_rows: Annotated[int, typer.Option(help="At most so many rows of a data set.", min=1)] = 256,
    row_length: Annotated[int | None, typer.Option(help="Predicted tokens of a row; default 128.", min=1)] = None,
    device: Device = None,
) -> None:
    """Quality, compute, time and state of a model by the number of loops, with a report."""
    from cognexis.eval_harness.scaling.grid import parse_depths
    from cognexis.eval_harness.scaling.loop_scaling import LoopScalingOrder, run_loop_scaling

    order = LoopScalingOrder(
        config=config,
        checkpoint=checkpoint,
        depths=None if depths is None else parse_depths(depths),
        out=out,
        overrides=tuple(sets or ()),
        max_rows=max_rows,
        row_length=row_length,
        device=device,
    )
    for path in run_loop_scaling(order, _report):
        print(path)


@eval_app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with rows.jsonl, as an evaluation leaves it.")],
) -> None:
    """Make the report of a study again, from its files alone."""
    from cognexis.eval_harness.scaling.loop_scaling import report_folder

    for path in report_folder(folder):
        print(path)


@data_app.callback()
def _data() -> None:
    """Make evaluation data of installed packages."""


@data_app.command("build")
def data_build(
    names: Annotated[
        list[str], typer.Argument(help="gsm-symbolic, chain-sum, human-eval, quartz, logiqa: one or more.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for NAME.jsonl and eval_manifest.json.")],
    max_examples: Annotated[int | None, typer.Option(help="At most so many examples of each.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of generated examples.")] = 0,
) -> None:
    """Write data sets that an evaluation reads, and a manifest with their licences."""
    from cognexis.eval_harness.data_sets import build_data_sets

    for file in build_data_sets(names, out, max_examples=max_examples, seed=seed)["files"]:
        origin = f"{file['package']} {file['version']}, {file['licence']}"
        print(f"{out / file['path']}: {file['num_examples']} examples, {file['origin']}, {origin}")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
