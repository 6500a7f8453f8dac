"""Train the small model on which adaptive depth is judged, and measure it at many depths.

    python -m cognexis.training.windowed_parity --out DIR [--hidden-size 64 --seconds 240 --max-length 24 ...]

The task is ``cognexis.tasks.windowed_parity``; every attention of the model reaches back over 8 tokens. Each step
draws one length n, uniform in 2 .. max_length, fresh rows of that length, and one loop count (log-normal Poisson, see
``draw_loops``); the last 8 loops carry the gradient. Training ends by the clock or after ``steps`` steps.

    accuracy[n][L] = share of right answers over all bits of held-out rows of n bits after L loops

DIR then holds the checkpoint, ``history.jsonl`` (one line for every 50 steps) and ``accuracy.json``. With ``--twin``
an equal model is trained for as long with one loop in every step; its accuracy is what the task yields without
recurrence. Held-out rows come from seeds that training cannot have; rows longer than ``max_length`` it never sees,
and of short rows there are too few for any to be new.

Reference: the design of the model is that of the preset ``cognexis-tiny``.
Letters: B rows, T tokens, L loops.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cognexis.checkpoints.json_file import write_json
from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.configuration_cognexis import CognexisConfig
from cognexis.errors import InvalidConfigError
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tasks.windowed_parity import BOS, IGNORED_LABEL, PAD, VOCAB_SIZE, WindowedParity, draw_rows
from cognexis.training.curriculum import CurriculumSettings
from cognexis.training.curriculum.sampling import draw_loops
from cognexis.training.loop_states import loops_watched
from cognexis.training.quickstart_training import learning_rate_share

WINDOW = 8
TRAINED_MAX_LOOPS, MAX_LOOPS = 32, 128
HELD_OUT_SEED = 2**32
_STEPS_PER_RECORD = 50
_ROWS_PER_CALL = 64


@dataclass(frozen=True)
class ParitySettings:
    """What the job does."""

    output_dir: Path = Path("runs/windowed_parity")
    hidden_size: int = 64
    """H, a multiple of 8: four heads."""
    seconds: float = 240.0
    """Training time of the model, and again of its twin."""
    steps: int | None = None
    """Train this many steps, whatever time they take; such a run is repeatable."""
    max_length: int = 24
    """Most bits in a training row."""
    mean_loops: float = 8.0
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    """Chooses initial weights, training rows and loop counts."""
    device: str = "auto"
    """A torch device; "auto" is CUDA where there is one."""
    twin: bool = False

    sigma_loops: float = 0.5
    weight_decay: float = 0.05
    warmup_share: float = 0.02
    gradient_clip_norm: float = 1.0
    held_out_rows: int = 512
    longer: tuple[int, ...] = (64, 128, 256)
    """Lengths that are measured besides ``max_length``."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)

    def __post_init__(self) -> None:
        rules = [
            ("hidden_size", self.hidden_size >= 8 and self.hidden_size % 8 == 0, "must be a positive multiple of 8"),
            ("seconds", 0 < self.seconds < math.inf, "must be positive and finite"),
            ("steps", self.steps is None or self.steps >= 1, "must be at least 1"),
            ("max_length", self.max_length >= 2, "must be at least 2"),
            ("mean_loops", 1 < self.mean_loops <= TRAINED_MAX_LOOPS, f"must be above 1, at most {TRAINED_MAX_LOOPS}"),
            ("batch_size", self.batch_size >= 1, "must be at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "must be positive and finite"),
            ("seed", 0 <= self.seed < 2**32, "must be in [0, 2**32)"),
            ("held_out_rows", self.held_out_rows >= 1, "must be at least 1"),
        ]
        for name, is_right, reason in rules:
            if not is_right:
                value = getattr(self, name)
                raise InvalidConfigError(f"{name}={value!r}: {reason}", path=name, value=value, reason=reason)

    def torch_device(self) -> torch.device:
        """The device to compute on.

        Raises:
            InvalidConfigError: torch does not know it, or it is CUDA and there is none.
        """
        has_cuda = torch.cuda.is_available()
        try:
            device = (
                torch.device("cuda" if has_cuda else "cpu") if self.device == "auto" else torch.device(self.device)
            )
        except RuntimeError as error:
            raise InvalidConfigError(f"device={self.device!r}: no device of torch", path="device") from error
        if device.type == "cuda" and not has_cuda:
            raise InvalidConfigError(f"device={self.device!r}: torch finds no CUDA device", path="device")
        return device


def build_model(settings: ParitySettings) -> CognexisForCausalLM:
    """One prelude, one core and one coda block with sliding attention; weights from the seed."""
    windowed = ["sliding_attention"]
    config = CognexisConfig.from_variant(
        "cognexis-tiny",
        vocab_size=VOCAB_SIZE,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=PAD,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_attention_heads=4,
        num_key_value_heads=4,
        prelude_layer_types=windowed,
        core_layer_types=windowed,
        coda_layer_types=windowed,
        sliding_window=WINDOW,
        trained_max_loops=TRAINED_MAX_LOOPS,
        max_loops=MAX_LOOPS,
        default_loops=TRAINED_MAX_LOOPS,
        kv_slots=TRAINED_MAX_LOOPS,
        backprop_loops=8,
        initializer_range=0.05,
        embedding_scale=math.sqrt(settings.hidden_size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model: Any = CognexisForCausalLM(config)
    return model.to(settings.torch_device())


def train(
    model: CognexisForCausalLM,
    settings: ParitySettings,
    loops_of_step: Callable[[int], int],
    history: Path,
    title: str = "training",
) -> TrainingRecord:
    """Train in place; one step at least.

    Args:
        loops_of_step: the loop count of each step, counted from 0.
        history: JSONL file that gets step, seconds, loss (mean since the line before) and learning rate.
        title: what stands beside the progress bar.

    Raises:
        NonFiniteError: the loss or a state became NaN or infinite.
    """
    optimizer = _optimizer(model, settings)
    rows = torch.Generator().manual_seed(settings.seed)
    histogram: Counter[int] = Counter()
    loss_sum, num_tokens = torch.zeros((), device=model.device), 0
    model.train()
    start = time.perf_counter()
    with (
        history.open("w", buffering=1, encoding="utf-8") as file,
        tqdm(total=settings.steps, desc=title, unit="step", disable=None) as bar,
    ):
        for step in count():
            elapsed = time.perf_counter() - start
            progress = step / settings.steps if settings.steps else min(1.0, elapsed / settings.seconds)
            if step and (step % _STEPS_PER_RECORD == 0 or progress >= 1):
                taken = (step - 1) % _STEPS_PER_RECORD + 1
                record = {"step": step, "seconds": round(elapsed, 2), "loss": round(loss_sum.item() / taken, 6)}
                file.write(json.dumps(record | {"learning_rate": optimizer.param_groups[0]["lr"]}) + "\n")
                bar.set_postfix_str(f"{elapsed:.0f} s, loss {record['loss']:.4f}", refresh=False)
                loss_sum.zero_()
            if step and progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * learning_rate_share(progress, settings.warmup_share)
            num_bits = int(torch.randint(2, settings.max_length + 1, (), generator=rows))
            batch = draw_rows(settings.batch_size, num_bits, rows)
            num_loops = loops_of_step(step)
            loss_sum += _train_step(model, optimizer, *batch, num_loops, settings.gradient_clip_norm)
            histogram[num_loops] += 1
            num_tokens += batch[0].numel()
            bar.update()
    model.eval()
    return TrainingRecord(
        checkpoint_step=histogram.total(),
        training_tokens_seen=num_tokens,
        sampled_loops=dict(sorted(histogram.items())),
    )


def _train_step(
    model: CognexisForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    labels: Tensor,
    num_loops: int,
    clip_norm: float,
) -> Tensor:
    ids, labels = (tensor.to(model.device, non_blocking=True) for tensor in (ids, labels))
    loss = model(input_ids=ids, shift_labels=labels, num_loops=num_loops, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _optimizer(model: nn.Module, settings: ParitySettings) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def answers_by_loop(model: CognexisForCausalLM, input_ids: Tensor, loops: Sequence[int]) -> Tensor:
    """Most probable tokens ``[len(loops), B, T]`` after each loop count, all read in one run of the deepest.

    Args:
        input_ids: ``[B, T]`` without padding.
        loops: loop counts of at least 1, rising.
    """
    executed = count(1)
    answers: list[Tensor] = []

    def answer(state: Tensor, logits: Callable[[], Tensor]) -> None:
        if next(executed) in loops:
            answers.append(logits().argmax(-1))

    with loops_watched(model, answer):
        model(input_ids=input_ids, num_loops=loops[-1], allow_extrapolation=True, use_cache=False)
    return torch.stack(answers)


def held_out(num_rows: int, num_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of at most ``num_rows`` distinct rows (short rows have fewer); a training seed never gives them.

    Args:
        seed: any below 2**32, so that several sets can be drawn.
    """
    rows = WindowedParity(min(num_rows, 2 ** min(num_bits, 30)), num_bits=num_bits, seed=HELD_OUT_SEED + seed)
    return rows.ids, rows.labels


def accuracy_table(
    model: CognexisForCausalLM, settings: ParitySettings, depths: Sequence[int]
) -> dict[int, dict[int, float]]:
    """Share of right answers over all bits of held-out rows: length -> loop count -> accuracy."""
    table: dict[int, dict[int, float]] = {}
    for num_bits in (settings.max_length, *settings.longer):
        ids, labels = held_out(settings.held_out_rows, num_bits, settings.seed)
        right = torch.zeros(len(depths))
        for some_ids, some_labels in zip(ids.split(_ROWS_PER_CALL), labels.split(_ROWS_PER_CALL), strict=True):
            answers = answers_by_loop(model, some_ids.to(model.device), depths).cpu()
            right += (answers == some_labels).sum((1, 2))
        shares = right / (labels != IGNORED_LABEL).sum()
        table[num_bits] = dict(zip(depths, (round(share, 6) for share in shares.tolist()), strict=True))
    return table


def run(settings: ParitySettings) -> dict[str, Any]:
    """Run the whole job; returns what ``accuracy.json`` holds."""
    folder = settings.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfigError(f"output folder {folder} cannot be used: {error.strerror}", path="out") from error
    model = build_model(settings)
    model.training_record = train(model, settings, partial(_loops_of_step, settings), folder / "history.jsonl")
    model.save_pretrained(folder)
    result: dict[str, Any] = {
        "settings": asdict(settings) | {"output_dir": str(folder), "device": str(model.device)},
        "num_parameters": model.num_parameters(),
        "steps": model.training_record.checkpoint_step,
        "accuracy": accuracy_table(model, settings, settings.depths),
    }
    if settings.twin:
        twin = build_model(settings)
        record = train(twin, settings, lambda step: 1, folder / "twin_history.jsonl", title="twin")
        result |= {"twin_steps": record.checkpoint_step, "twin_accuracy": accuracy_table(twin, settings, [1])}
    write_json(folder / "accuracy.json", result)
    return result


def _loops_of_step(settings: ParitySettings, step: int) -> int:
    curriculum = CurriculumSettings(
        target_max_loops=TRAINED_MAX_LOOPS,
        initial_max_loops=TRAINED_MAX_LOOPS,
        sampling_distribution="lognormal_poisson",
        mean=settings.mean_loops,
        sigma=settings.sigma_loops,
    )
    return draw_loops(curriculum, settings.seed, step, TRAINED_MAX_LOOPS)


def _shown(accuracy: dict[int, dict[int, float]]) -> str:
    depths = list(next(iter(accuracy.values())))
    lines = ["bits \\ loops" + "".join(f"{depth:8d}" for depth in depths)]
    lines += [f"{bits:12d}" + "".join(f"{row[depth]:8.4f}" for depth in depths) for bits, row in accuracy.items()]
    return "\n".join(lines)


def read_arguments(arguments: Sequence[str] | None = None) -> ParitySettings:
    """The settings that a command line asks for."""
    defaults = ParitySettings()
    parser = argparse.ArgumentParser(description="Train and measure the windowed-parity model.")
    parser.add_argument("--out", dest="output_dir", type=Path, required=True, help="folder of the checkpoint")
    for name, kind in (
        ("hidden_size", int),
        ("seconds", float),
        ("steps", int),
        ("max_length", int),
        ("mean_loops", float),
        ("batch_size", int),
        ("seed", int),
        ("device", str),
        ("held_out_rows", int),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=getattr(defaults, name))
    parser.add_argument("--lr", dest="learning_rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--twin", action="store_true", help="also train an equal model with one loop")
    return ParitySettings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Train, measure, print the table."""
    settings = read_arguments()
    torch.set_float32_matmul_precision("high")
    result = run(settings)
    print(f"{result['num_parameters']:,} parameters, {result['steps']} steps; accuracy of held-out rows")
    print(_shown(result["accuracy"]))
    if settings.twin:
        print(f"trained with one loop, {result['twin_steps']} steps\n{_shown(result['twin_accuracy'])}")


if __name__ == "__main__":
    main()
