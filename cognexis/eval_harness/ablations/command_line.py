"""``cognexis ablate``: take parts out of a model, one at a time, and measure what each was worth."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cognexis.errors import InvalidConfigError

if TYPE_CHECKING:
    from cognexis.eval_harness.ablations.running import Workshop


def ablate_command(make_workshop: "Callable[[], Workshop]") -> Callable[..., None]:
    """The command, which trains with what ``make_workshop`` returns."""

    def ablate(
        config: Annotated[Path, typer.Option(help="File of the plan.")],
        only: Annotated[str | None, typer.Option(help="Components, sweeps, experiments by name, with commas.")] = None,
        out: Annotated[Path | None, typer.Option(help="Folder of the results; default: runs/<name>.")] = None,
        sets: Annotated[
            list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a setting of the base.")
        ] = None,
        seeds: Annotated[str | None, typer.Option(help="Seeds, with commas; default: the plan's.")] = None,
        steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.", min=1)] = None,
        checkpoint: Annotated[
            Path | None, typer.Option(help="Switch parts off in this trained model; nothing is trained.")
        ] = None,
        device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is cuda if present.")] = None,
    ) -> None:
        """Train without single parts, or switch them off in a trained model, and compare."""
        from transformers.utils.logging import disable_progress_bar

        from cognexis.eval_harness.ablations.running import AblationOrder, Interrupted, run_ablations

        disable_progress_bar()
        order = AblationOrder(
            config=config,
            only=None if only is None else _names(only),
            out=out,
            overrides=tuple(sets or ()),
            seeds=None if seeds is None else _numbers(seeds),
            steps=steps,
            checkpoint=checkpoint,
            device=device,
        )
        try:
            files = run_ablations(order, make_workshop(), lambda line: print(line, file=sys.stderr, flush=True))
        except Interrupted as error:
            print(f"{error}", file=sys.stderr)
            raise typer.Exit(128 + error.signal) from None
        for path in files:
            print(path)

    return ablate


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InvalidConfigError(f"--only {text!r}: must name one experiment or more", path="only", value=text)
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidConfigError(f"--seeds {text!r}: must be integers with commas", path="seeds", value=text) from None
