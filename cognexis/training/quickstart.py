"""The quickstart: train cognexis-tiny on real text, save it, reload it elsewhere, compare loop counts.

    corpus -> tokenizer -> rows -> train -> save -> reload in a process without the package -> table

The table stands beside its compute and is measured on the reloaded model; the job fails if that model's held-out
loss is not the trained model's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cognexis.artifacts.text_corpus import Corpus, standard_library_corpus
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.checkpoints.card_facts import CardFacts, DepthScore
from cognexis.checkpoints.hashing import file_checksum
from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.training.quickstart_reload import __file__ as reload_script
from cognexis.training.quickstart_reload import mean_loss, pack_rows, spread_rows
from cognexis.training.quickstart_training import QuickstartSettings, TrainingResult, build_model, train

_RESULT_FILE = "quickstart.json"
_LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DepthResult:
    """One row of the table, measured on the reloaded model."""

    num_loops: int
    effective_depth: int
    loss: float
    perplexity: float
    bits_per_byte: float
    flops_per_token: float
    generated_tokens_per_second: float
    continuation: str


@dataclass(frozen=True)
class QuickstartResult:
    """Everything that the job prints, and writes as ``quickstart.json``."""

    output_dir: str
    data: dict[str, Any]
    num_parameters: int
    training: TrainingResult
    loss_before_saving: dict[int, float]
    """Loop count -> held-out loss of the model in memory."""
    model_class: str
    """Where the reloading process found the model's code."""
    depths: list[DepthResult]
    prompt: str
    seconds: dict[str, float]
    """Phase -> wall time."""

    def table(self) -> str:
        """Quality beside compute, a row for each loop count."""
        first = self.depths[0]
        lines = ["loops  blocks  held-out loss  perplexity  bits/byte  MFLOP/token  compute  generated tokens/s"]
        for depth in self.depths:
            lines.append(
                f"{depth.num_loops:5d}  {depth.effective_depth:6d}  {depth.loss:13.4f}  {depth.perplexity:10.2f}"
                f"  {depth.bits_per_byte:9.4f}  {depth.flops_per_token / 1e6:11.2f}"
                f"  {depth.flops_per_token / first.flops_per_token:6.2f}x"
                f"  {depth.generated_tokens_per_second:18.0f}"
            )
        return "\n".join(lines)

    def continuations(self) -> str:
        """The prompt and what each loop count makes of it."""
        parts = [f"--- num_loops={depth.num_loops} ---\n{self.prompt}{depth.continuation}" for depth in self.depths]
        return "\n\n".join(parts)


def run_quickstart(settings: QuickstartSettings, report: Callable[[str], None] | None = None) -> QuickstartResult:
    """Run the whole job.

    Args:
        report: receives what a user should read, piece by piece; None prints it.

    Raises:
        InvalidConfigError: a setting is out of range, or the output folder holds something else.
        CheckpointError: the saved model does not load, or gives another loss than the trained one.
    """
    report = report or partial(print, flush=True)
    clock = _PhaseClock()
    _claim(settings.output_dir)

    corpus = standard_library_corpus(settings.corpus_characters)
    training_text, held_out_text = corpus.split(settings.held_out_share)
    report(_describe(corpus, training_text, held_out_text))
    clock.end("corpus")

    tokenizer = train_tokenizer(_first_characters(training_text, settings.tokenizer_characters), settings.vocab_size)
    clock.end("tokenizer")
    rows = pack_rows(training_text.documents, tokenizer, settings.row_length)
    held_out = spread_rows(pack_rows(held_out_text.documents, tokenizer, settings.row_length), settings.held_out_rows)
    clock.end("encoding")

    model = build_model(tokenizer, settings)
    num_parameters = model.num_parameters()
    seconds = max(1.0, settings.minutes * 60 - sum(clock.seconds.values()))
    duration = f"{settings.steps} steps" if settings.steps else f"{seconds:.0f} s"
    report(
        f"tokenizer: {len(tokenizer)} ids; {rows.numel():,} training tokens\n"
        f"model: cognexis-tiny, {num_parameters:,} parameters; training for {duration} on the CPU"
    )
    training = train(model, rows, settings, seconds)
    report(
        f"trained {training.steps} steps, {training.tokens:,} tokens, {training.tokens / training.seconds:,.0f} "
        f"tokens/s on {training.num_threads} threads; loss {training.loss:.3f}; loop count -> steps "
        f"{training.loop_histogram}"
    )
    clock.end("training")

    model.eval()
    loss_before_saving = {num_loops: mean_loss(model, held_out, num_loops) for num_loops in settings.depths}
    clock.end("evaluation")
    manifest = {"training": training_text.manifest(), "held_out": held_out_text.manifest()}
    _write_json(settings.output_dir / "data_manifest.json", manifest)
    model.training_record = TrainingRecord(
        checkpoint_step=training.steps,
        training_tokens_seen=training.tokens,
        data_manifest_checksum=file_checksum(settings.output_dir / "data_manifest.json"),
        sampled_loops=training.loop_histogram,
    )
    model.config.tokenizer_checksum = tokenizer.checksum
    model.save_pretrained(settings.output_dir)
    tokenizer.save_pretrained(settings.output_dir)
    clock.end("saving")

    answer = reload_and_measure(settings, held_out_text)
    clock.end("reloading and measuring")
    result = QuickstartResult(
        output_dir=str(settings.output_dir),
        data=manifest,
        num_parameters=num_parameters,
        training=training,
        loss_before_saving=loss_before_saving,
        model_class=answer["model_class"],
        depths=[DepthResult(**record) for record in answer["depths"]],
        prompt=settings.prompt,
        seconds=clock.seconds,
    )
    check_same_loss(result)
    model.card_facts = _card_facts(corpus, result)
    model.save_pretrained(settings.output_dir)  # again, now that the card can name what was measured
    _write_json(settings.output_dir / _RESULT_FILE, asdict(result))
    report(_summary(result))
    return result


def reload_and_measure(settings: QuickstartSettings, held_out: Corpus) -> dict[str, Any]:
    """Load the saved folder in a process that cannot import this package; see ``quickstart_reload``."""
    request = {
        "folder": str(settings.output_dir.resolve()),
        "documents": held_out.documents,
        "row_length": settings.row_length,
        "num_rows": settings.held_out_rows,
        "depths": settings.depths,
        "prompt": settings.prompt,
        "num_new_tokens": settings.num_new_tokens,
        "num_threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="cognexis-quickstart-") as scratch:
        request_file, answer_file = Path(scratch, "request.json"), Path(scratch, "answer.json")
        _write_json(request_file, request)
        environment = os.environ | {
            "HF_MODULES_CACHE": scratch,  # the code that comes with the model is unpacked here
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # threads do not spin while another program has their core
            "PYTHONSAFEPATH": "1",  # the folder of the script is not searched for modules
        }
        process = subprocess.run(
            [sys.executable, reload_script, str(request_file), str(answer_file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            cwd=scratch,
        )
        if process.returncode != 0:
            last_lines = "\n".join(process.stderr.strip().splitlines()[-15:])
            raise CheckpointError(f"{settings.output_dir} does not load without the package:\n{last_lines}")
        answer: dict[str, Any] = json.loads(answer_file.read_text(encoding="utf-8"))
    return answer


def check_same_loss(result: QuickstartResult) -> None:
    """Compare the reloaded model with the one that was trained.

    Raises:
        CheckpointError: their held-out losses differ at some loop count.
    """
    for depth in result.depths:
        expected = result.loss_before_saving[depth.num_loops]
        if not abs(depth.loss - expected) <= _LOSS_TOLERANCE * max(1.0, expected):
            raise CheckpointError(
                f"at {depth.num_loops} loops the reloaded model has a held-out loss of {depth.loss:.6f}, "
                f"the trained model {expected:.6f}"
            )


class _PhaseClock:
    """Wall time of each phase since the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = round(now - self._start, 2)
        self._start = now


def _claim(folder: Path) -> None:
    """Make the output folder; one that holds anything but an earlier quickstart is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / _RESULT_FILE).exists():
            raise InvalidConfigError(f"output folder {folder} holds other files than an earlier quickstart's")
        _write_json(folder / _RESULT_FILE, {})  # replaced at the end; until then it marks the folder as ours
    except OSError as error:
        raise InvalidConfigError(f"output folder {folder} cannot be used: {error.strerror}") from error


def _card_facts(corpus: Corpus, result: QuickstartResult) -> CardFacts:
    return CardFacts(
        name="cognexis-tiny, quickstart",
        license="apache-2.0",
        language=("en", "code"),
        summary=f"A demonstration: about one million parameters, trained for minutes on {corpus.package} "
        f"({corpus.version}, {corpus.licence}). It shows that one checkpoint runs at many depths; it knows little.",
        scores=tuple(
            DepthScore(f"{corpus.package}, held out", "loss", depth.loss, depth.num_loops, depth.flops_per_token)
            for depth in result.depths
        ),
    )


def _first_characters(corpus: Corpus, num_characters: int) -> Iterator[str]:
    """Whole documents until ``num_characters`` are reached."""
    for document in corpus.documents:
        if num_characters <= 0:
            return
        num_characters -= len(document)
        yield document


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(corpus: Corpus, training: Corpus, held_out: Corpus) -> str:
    return (
        f"text: {corpus.package} ({corpus.version}), licence {corpus.licence}, found on this machine\n"
        f"      {len(corpus)} files, {corpus.num_characters:,} characters: {len(training)} files for training, "
        f"{len(held_out)} held out ({held_out.num_characters:,} characters)"
    )


def _summary(result: QuickstartResult) -> str:
    first = result.depths[0]
    best = min(result.depths, key=lambda depth: depth.loss)
    phases = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    return f"""
The saved model, loaded where the package cannot be imported; its held-out loss is the trained model's
(within {_LOSS_TOLERANCE:g}). Loss beside the compute that it takes:

{result.table()}

lowest loss: {best.num_loops} loops, {first.loss - best.loss:.4f} below {first.num_loops} loops, \
at {best.flops_per_token / first.flops_per_token:.2f} times the compute
class that was loaded: {result.model_class}

{result.continuations()}

time: {phases}; {sum(result.seconds.values()):.0f} s in all
model, tokenizer, code, data_manifest.json and {_RESULT_FILE}: {result.output_dir}"""
