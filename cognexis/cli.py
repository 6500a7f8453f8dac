"""The command line: ``cognexis COMMAND`` or ``python -m cognexis COMMAND``.

Exit codes: 0 done, 2 wrong usage or settings, 1 anything that failed while running. A fault of the user is one
line on stderr; ``--debug`` in front of the command shows where it was raised. Commands import what they need in
their own body, so that ``--help`` does not wait for it.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cognexis.errors import CognexisError, InvalidConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Recurrent-depth language models."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the model and the results.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Minutes until training ends.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Initial weights, order of the text and loop counts.")] = 0,
) -> None:
    """Train a small model on real text, reload it without the package, and compare loop counts."""
    from transformers.utils import logging

    from cognexis.training.quickstart import run_quickstart
    from cognexis.training.quickstart_training import QuickstartSettings

    logging.disable_progress_bar()
    run_quickstart(QuickstartSettings(output_dir=out, minutes=minutes, seed=seed))


def main() -> None:
    """Run the command of ``sys.argv`` and exit with its code."""
    try:
        app()
    except CognexisError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidConfigError) else 1)
