"""The command line: ``cognexis COMMAND`` or ``python -m cognexis COMMAND``.

Exit codes: 0 done, 2 wrong usage or settings, 1 anything that failed while running, 130 and 143 when interrupted or
terminated. A fault of the user is one line on stderr; ``--debug`` in front of the command shows where it was raised.
Results go to stdout, reports and faults to stderr. Commands import what they need in their own body, so that
``--help`` does not wait for torch.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cognexis.errors import CognexisError, InvalidConfigError, TokenizerError
from cognexis.eval_harness.ablations.command_line import ablate_command
from cognexis.eval_harness.command_line import eval_app
from cognexis.training.ablation_workshop import AblationWorkshop
from cognexis.training.commands import train
from cognexis.training.data.commands import data_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer, or look at one.")
config_app = typer.Typer(no_args_is_help=True, help="Check, expand and migrate run configurations.")
app.add_typer(tokenizer_app, name="tokenizer")
scheduler_app = typer.Typer(
    no_args_is_help=True, help="Learn when another loop is worth it: fit and judge a value head."
)
app.add_typer(config_app, name="config")
app.add_typer(scheduler_app, name="scheduler")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.command()(train)
app.command("ablate")(ablate_command(AblationWorkshop))

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override a setting; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Checkpoint = Annotated[Path, typer.Option(help="Folder of a saved model.")]
RowFile = Annotated[Path, typer.Option(help='JSONL with {"text": ...} or {"input_ids": [...], "labels": [...]}.')]
Depth = Annotated[int | None, typer.Option("--max-loops", help="Depth of the runs; default: what was trained.")]
NumRows = Annotated[int | None, typer.Option(help="So many rows of the file, drawn by the seed; default: all.")]
MaxLength = Annotated[int | None, typer.Option(help="Cut longer rows off; default: the model's longest.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the default is cuda if present.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="Run configuration, YAML or JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from cognexis import __version__

        print(f"cognexis {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Recurrent-depth language models."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the model and the results.")] = Path("runs/quickstart"),
    minutes: Annotated[float, typer.Option(help="Minutes until training ends.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Initial weights, order of the text and loop counts.")] = 0,
) -> None:
    """Train a small model on real text, reload it without the package, and compare loop counts."""
    _load_package()
    from cognexis.training.quickstart import run_quickstart
    from cognexis.training.quickstart_training import QuickstartSettings

    run_quickstart(QuickstartSettings(output_dir=out, minutes=minutes, seed=seed))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a saved model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from stdin.")],
    num_loops: Annotated[int | None, typer.Option(help="How often the shared block runs.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many new tokens.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    config: Annotated[Path | None, typer.Option(help="Run configuration with an inference section.")] = None,
    sets: Sets = None,
    verify: Annotated[str | None, typer.Option(help="strict, warn or off; see the documentation of loading.")] = None,
    allow_tokenizer_mismatch: Annotated[
        bool, typer.Option("--allow-tokenizer-mismatch", help="Run although the tokenizer is not the model's.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the default is cuda if present.")] = None,
) -> None:
    """Continue a text at a loop count of your choice, token by token."""
    _load_package()
    from cognexis.hub.text_generation import TextRequest, TextSession

    request = TextRequest(
        checkpoint=checkpoint,
        prompt=sys.stdin.read() if prompt == "-" else prompt,
        chat=chat,
        overrides=tuple(sets or ()),
        num_loops=num_loops,
        max_new_tokens=max_new_tokens,
        seed=seed,
        verify=verify,
        allow_tokenizer_mismatch=allow_tokenizer_mismatch,
        device=device,
        config_file=config,
    )
    with contextlib.closing(TextSession(request).generate(request)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


@app.command()
def tokenize(
    tokenizer: Annotated[Path, typer.Option(help="Folder of a tokenizer or checkpoint, or a tokenizer.json.")],
    text: Annotated[str, typer.Option(help="The text; - reads it from stdin.")],
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Recognise control tokens; otherwise they are plain text.")
    ] = False,
    add_bos: Annotated[bool, typer.Option("--add-bos", help="Put the beginning-of-text token in front.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the ids and pieces of a text."""
    _load_package()
    from cognexis.artifacts.tokenizer_commands import tokenize as show

    given = sys.stdin.read() if text == "-" else text
    result = show(tokenizer, given, allow_special=allow_special, add_bos=add_bos)
    if as_json:
        _print_json(result)
        return
    for token_id, piece in zip(result["ids"], result["pieces"], strict=True):
        print(f"{token_id:7d}  {piece!r}")
    print(f"{len(result['ids'])} tokens, {len(given)} characters, {len(given.encode())} bytes")


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[str], typer.Argument(help="Text files or folders, or 'installed' for licensed text here.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids.")] = 8192,
    kind: Annotated[str, typer.Option("--type", help="sentencepiece, bpe or byte_reference.")] = "sentencepiece",
    max_characters: Annotated[int, typer.Option(help="At most so much text.")] = 20_000_000,
    licence: Annotated[str, typer.Option(help="SPDX identifier of the files, for the manifest.")] = "unknown",
) -> None:
    """Train a tokenizer; the same text gives the same ids."""
    _load_package()
    from cognexis.artifacts.tokenizer_commands import TrainingOrder, train

    order = TrainingOrder(
        inputs=inputs,
        output_dir=out,
        vocab_size=vocab_size,
        tokenizer_type=kind,
        max_characters=max_characters,
        licence=licence,
    )
    with _progress("training the tokenizer"):
        result = train(order, report=_report)
    _print_fields(result)


@tokenizer_app.command("inspect")
def tokenizer_inspect(
    tokenizer: Annotated[Path, typer.Argument(help="Folder of a tokenizer or checkpoint, or a tokenizer.json.")],
    text: Annotated[Path | None, typer.Option(help="File to measure compression on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a tokenizer and compare it with its manifest."""
    _load_package()
    from cognexis.artifacts.tokenizer_commands import inspect

    result = inspect(tokenizer, _read_text(text) if text is not None else None)
    _print_json(result) if as_json else _print_fields(result)


@app.command("inspect-checkpoint")
def inspect_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    as_json: AsJson = False,
) -> None:
    """Verify a checkpoint and show what it holds; exit code 1 if it would not load."""
    _load_package()
    from cognexis.hub.inspection import inspect_checkpoint as examine

    result = examine(folder)
    _print_json(result) if as_json else _print_checkpoint(result)
    if result["faults"]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: packages, devices, tools; exit code 1 if something necessary is missing."""
    from cognexis.hub.doctor import examine

    checks = examine()
    if as_json:
        _print_json([vars(check) for check in checks])
    else:
        _print_table(("check", "state", "detail"), [(check.name, check.state, check.detail) for check in checks])
    if any(check.state == "fault" for check in checks):
        raise typer.Exit(1)


@config_app.command("check")
def config_check(
    file: ConfigFile,
    command: Annotated[str | None, typer.Option(help="Demand the sections that this command needs.")] = None,
    sets: Sets = None,
    world_size: Annotated[int | None, typer.Option(help="Number of training processes.")] = None,
    files: Annotated[bool, typer.Option("--files", help="The files that are named must exist.")] = False,
) -> None:
    """Check a run configuration; every fault is listed."""
    from cognexis.artifacts.config_commands import check_command

    _, faults = check_command(file, command, sets or (), world_size=world_size, check_files=files)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(2)
    print(f"{file}: valid")


@config_app.command("resolve")
def config_resolve(
    file: ConfigFile,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(help="Write config.resolved.yaml into this folder as well.")] = None,
    world_size: Annotated[int | None, typer.Option(help="Number of training processes.")] = None,
) -> None:
    """Print a run configuration with every effective value."""
    from cognexis.artifacts.config_commands import resolve_command

    print(resolve_command(file, sets or (), folder=out, world_size=world_size), end="")


@config_app.command("defaults")
def config_defaults(section: Annotated[str | None, typer.Argument(help="One section only.")] = None) -> None:
    """Print the defaults; null stands for what follows from other settings."""
    from cognexis.artifacts.config_commands import show_defaults_command

    print(show_defaults_command(section), end="")


@config_app.command("migrate")
def config_migrate(file: ConfigFile) -> None:
    """Print an older run configuration in today's layout."""
    from cognexis.artifacts.config_commands import migrate_command

    print(migrate_command(file), end="")


@config_app.command("variants")
def config_variants(as_json: AsJson = False) -> None:
    """List the named model sizes."""
    from cognexis.artifacts.config_commands import list_variants_command

    rows = list_variants_command()
    if as_json:
        _print_json(rows)
    else:
        _print_table(tuple(rows[0]), [tuple(str(value) for value in row.values()) for row in rows])


@scheduler_app.command("collect")
def scheduler_collect(
    checkpoint: Checkpoint,
    data: RowFile,
    out: Annotated[Path, typer.Option(help="Folder for traces.jsonl, traces.parquet and manifest.json.")],
    max_loops: Depth = None,
    num_rows: NumRows = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Which rows, with --num-rows.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Record loss, gain and signals of every token after every loop."""
    _load_package()
    from cognexis.training.scheduler.commands import DataOptions, collect

    options = DataOptions(checkpoint, data, max_loops, num_rows, max_length, seed, device)
    with _progress("collecting traces"):
        manifest = collect(options, out)
    _print_json(manifest) if as_json else _print_fields({k: v for k, v in manifest.items() if k != "columns"})


@scheduler_app.command("fit")
def scheduler_fit(
    checkpoint: Checkpoint,
    data: RowFile,
    out: Annotated[Path, typer.Option(help="Folder for the model with its value head; not the checkpoint's.")],
    kind: Annotated[str, typer.Option(help="token or sequence.")] = "token",
    output_kind: Annotated[str, typer.Option(help="predicted_gain or continue_logit.")] = "predicted_gain",
    target: Annotated[str, typer.Option(help="loss_delta, accuracy_delta or compute_normalized.")] = "loss_delta",
    horizon: Annotated[str, typer.Option(help="best: gain of the best later loop; next: of the next.")] = "best",
    features: Annotated[str, typer.Option(help="Signals that the head reads too, with commas.")] = "relative_delta",
    bottleneck_size: Annotated[int, typer.Option(help="Width of the head.")] = 64,
    max_loops_embedded: Annotated[int, typer.Option(help="Loops with an embedding; 0: the loop is not seen.")] = 0,
    gain_threshold: Annotated[float, typer.Option(help="Nats worth a loop, for continue_logit.")] = 1e-3,
    unlabelled: Annotated[str, typer.Option(help="Positions without a target: ignore, or zero gain.")] = "ignore",
    steps: Annotated[int, typer.Option(help="At most so many steps.")] = 400,
    rows_per_step: Annotated[int, typer.Option(help="Rows of each step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 3e-3,
    max_loops: Depth = None,
    num_rows: NumRows = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="First weights, order of the rows, and which.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a value head on measured gains; the rest of the model stays as it is."""
    _load_package()
    from cognexis.training.scheduler.commands import DataOptions, fit

    head = {
        "kind": kind,
        "output_kind": output_kind,
        "features": [name.strip() for name in features.split(",") if name.strip()],
        "bottleneck_size": bottleneck_size,
        "max_loops_embedded": max_loops_embedded,
    }
    facts = fit(
        DataOptions(checkpoint, data, max_loops, num_rows, max_length, seed, device),
        out,
        report=_report,
        head=head,
        target=target,
        horizon=horizon,
        gain_threshold=gain_threshold,
        unlabelled=unlabelled,
        steps=steps,
        rows_per_step=rows_per_step,
        learning_rate=learning_rate,
    )
    _print_json(facts) if as_json else _print_fields({k: v for k, v in facts.items() if k != "settings"})


@scheduler_app.command("calibrate")
def scheduler_calibrate(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a model with a value head; scheduler.json changes.")],
    data: RowFile,
    method: Annotated[str, typer.Option(help="isotonic, linear, temperature or none.")] = "isotonic",
    by_loop: Annotated[bool, typer.Option("--by-loop", help="A map of its own for each loop.")] = False,
    tolerance: Annotated[float, typer.Option(help="Nats that the loss may lie above that of full depth.")] = 0.01,
    halt_dependency: Annotated[str, typer.Option(help="Whose agreement a token needs: row, prefix, token.")] = "row",
    max_loops: Depth = None,
    num_rows: NumRows = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Which rows, with --num-rows.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Bring predicted gains to the scale of measured ones, and choose thresholds."""
    _load_package()
    from cognexis.training.scheduler.commands import CalibrationOptions, DataOptions, calibrate

    options = DataOptions(checkpoint, data, max_loops, num_rows, max_length, seed, device)
    with _progress("calibrating"):
        content = calibrate(options, CalibrationOptions(method, by_loop, tolerance, halt_dependency))
    facts = content["value_head"]["calibrated"]
    _print_json(content) if as_json else _print_fields({"scheduler": content["scheduler"], "calibrated": facts})


@scheduler_app.command("report")
def scheduler_report(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a model with a calibrated value head.")],
    data: RowFile,
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and report.png.")],
    max_loops: Depth = None,
    num_rows: NumRows = None,
    max_length: MaxLength = None,
    seed: Annotated[int, typer.Option(help="Which rows, with --num-rows.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Judge a value head on rows that it has not seen."""
    _load_package()
    from cognexis.training.scheduler.commands import DataOptions, report
    from cognexis.training.scheduler.report import markdown

    options = DataOptions(checkpoint, data, max_loops, num_rows, max_length, seed, device)
    with _progress("measuring"):
        content = report(options, out)
    _print_json(content) if as_json else print(markdown(content), end="")


def main() -> None:
    """Run the command of ``sys.argv`` and exit with its code."""
    debug = "--debug" in sys.argv[1:]
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    """One line on stderr; the exit code."""
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # wrong usage, found by the parser
        print(f"error: {error.format_message()} (--help shows the usage)", file=sys.stderr)
        return int(error.exit_code)
    if isinstance(error, CognexisError | OSError):
        print(f"error: {error}", file=sys.stderr)
    else:
        print(f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
    return 2 if isinstance(error, InvalidConfigError | TokenizerError) else 1


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)


def _load_package() -> None:
    """Import torch, transformers and the model; nothing above needed them."""
    from transformers.utils import logging

    from cognexis.registration import __name__ as _  # noqa: F401

    logging.disable_progress_bar()


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidConfigError(f"{path}: not UTF-8 at byte {error.start}", path="text") from error


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(what: str) -> Any:
    """A spinner on a terminal; without one, a line."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        return console.status(what)
    console.print(what)
    return contextlib.nullcontext()


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


def _print_fields(content: dict[str, Any], indent: str = "") -> None:
    for key, value in content.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_fields(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}:")
            for item in value:
                shown = json.dumps(item, ensure_ascii=False) if isinstance(item, dict) else item
                print(f"{indent}  {shown}")
        else:
            print(f"{indent}{key}: {'-' if value is None else value}")


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 1000  # a file or a pipe has no edge
    console.print(table)


def _print_checkpoint(result: dict[str, Any]) -> None:
    _print_fields({key: result[key] for key in ("folder", "architecture", "parameters", "tokenizer") if result[key]})
    if result["metadata"]:
        _print_fields({"metadata": {key: value for key, value in result["metadata"].items() if value is not None}})
    if result["scheduler"]:
        _print_fields({"scheduler": result["scheduler"]["scheduler"]})
    tensors = [
        (name, str(tensor["shape"]), tensor["dtype"], tensor["file"]) for name, tensor in result["tensors"].items()
    ]
    _print_table(("tensor", "shape", "dtype", "file"), tensors)
    files = [(file["path"], file["kind"], f"{file['bytes']:,}", file["sha256"][:23]) for file in result["files"]]
    if files:
        _print_table(("file", "kind", "bytes", "checksum"), files)
    for note in result["notes"]:
        print(f"note: {note}")
    for fault in result["faults"]:
        print(f"fault: {fault}")
    print("verified: " + ("no" if result["faults"] else "every file of the manifest matches" if files else "unknown"))
