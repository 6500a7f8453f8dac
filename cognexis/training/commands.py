"""``cognexis train``: a training run as a run configuration describes it; see ``pretrain``.

Exit codes: 0 done, 2 a faulty configuration, 1 a run that failed, 130 and 143 when a signal ended it after the step
was finished and saved; the same command then goes on.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cognexis.errors import CognexisError, InvalidConfigError

train_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a setting; repeatable.")]


@train_app.command("train")
def train(
    config: Annotated[Path, typer.Option(help="Run configuration, YAML or JSON.")],
    sets: Sets = None,
    resume: Annotated[
        str, typer.Option(help="auto: the newest verified checkpoint, if any; a folder; or none: from the start.")
    ] = "auto",
    allow_other_settings: Annotated[
        bool, typer.Option("--allow-other-settings", help="Go on from a checkpoint although settings differ.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="Trackers, with commas: tensorboard, trackio, wandb, ...")] = "",
    log_every: Annotated[int, typer.Option(help="Optimizer steps between log lines.")] = 10,
    spectral_every: Annotated[int, typer.Option(help="Steps between singular values of the core; 0: never.")] = 0,
    compile_model: Annotated[bool, typer.Option("--compile", help="Compile blocks and core of the model.")] = False,
    full_determinism: Annotated[
        bool, typer.Option("--full-determinism", help="The same bits on every run of a GPU too; slower.")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU although there is a GPU.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar and no log lines.")] = False,
    on_save_error: Annotated[str, typer.Option(help="A checkpoint cannot be written: stop or continue.")] = "stop",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model; interrupted, the same command goes on from the newest verified checkpoint."""
    from cognexis.training.pretrain import PretrainOrder, pretrain

    order = PretrainOrder(
        overrides=tuple(sets or ()),
        resume=None if resume == "none" else resume,
        allow_other_settings=allow_other_settings,
        report_to=tuple(name.strip() for name in report_to.split(",") if name.strip()),
        log_every=log_every,
        spectral_every=spectral_every,
        compile=compile_model,
        full_determinism=full_determinism,
        use_cpu=cpu,
        show_progress=not quiet,
        on_save_error=on_save_error,
    )
    result: dict[str, Any] = asdict(pretrain(config, order))
    is_first = os.environ.get("RANK", "0") == "0"  # it speaks for all
    if is_first and as_json:
        print(json.dumps(result, indent=2))
    elif is_first:
        for name, value in result.items():
            print(f"{name}: {'-' if value is None else value}")
    if result["stop_signal"] is not None:
        raise typer.Exit(128 + result["stop_signal"])


def main() -> None:
    """Run the command of ``sys.argv`` alone, for launchers that start a module; exits with its code."""
    try:
        sys.exit(train_app(standalone_mode=False) or 0)
    except (CognexisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidConfigError) else 1)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # wrong usage, found by the parser
            raise
        print(f"error: {error.format_message()} (--help shows the usage)", file=sys.stderr)
        sys.exit(2)
