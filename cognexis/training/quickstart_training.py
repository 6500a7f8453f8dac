"""The training part of the quickstart: its settings, the model, and a trainer that ends by the clock.

The loop count of a training step is drawn from (seed, step) alone:

    N = min(cap, 1 + Poisson(lambda)),   ln lambda ~ Normal(ln(mean - 1) - sigma^2 / 2, sigma)

so that all depths from 1 to ``cap`` occur and ``mean`` is their mean before the cap (Geiping et al. 2025, arXiv
2502.05171, with mean + 1 there). What is unusual: training ends by the clock. The learning rate follows the share
of the time that is used up, so it reaches zero on a fast and on a slow machine alike; the number of steps, and with
it the result, depends on the machine; ``steps`` fixes it.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from cognexis.configuration_cognexis import CognexisConfig
from cognexis.errors import InvalidConfigError
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.training.callbacks.console import show_progress
from cognexis.training.curriculum import CurriculumSettings
from cognexis.training.data.loader import TrainingLoader
from cognexis.training.data.order import RowOrder
from cognexis.training.options import TrainerOptions
from cognexis.training.trainer import CognexisTrainer

_MOST_STEPS = 10**6


@dataclass(frozen=True)
class QuickstartSettings:
    """What the job does; the command line sets the first three.

    The other values gave the lowest held-out bits per byte among those tried, at the 0.6 million training tokens that
    two free cores manage in the time.
    """

    output_dir: Path = Path("runs/quickstart")
    minutes: float = 2.5
    """Time until training ends, the text and the tokenizer included."""
    seed: int = 0
    """Chooses the initial weights, the order of the rows and the loop counts."""
    steps: int | None = None
    """Train this many steps, whatever time they take; such a run is repeatable."""

    corpus_characters: int = 4_000_000
    held_out_share: float = 0.05
    tokenizer_characters: int = 1_000_000
    """Of the training documents, how many characters the tokenizer is trained on."""
    vocab_size: int = 4096
    row_length: int = 128
    rows_per_step: int = 8
    held_out_rows: int = 128

    learning_rate: float = 6e-3
    embedding_learning_rate: float = 1.2e-2
    weight_decay: float = 0.1
    warmup_share: float = 0.03
    gradient_clip_norm: float = 1.0
    mean_loops: float = 3.0
    sigma_loops: float = 0.5

    depths: tuple[int, ...] = (1, 2, 4, 8)
    prompt: str = 'def read_lines(path):\n    """Return'
    num_new_tokens: int = 40

    def __post_init__(self) -> None:
        positive = ("minutes", "rows_per_step", "held_out_rows", "num_new_tokens", "learning_rate")
        values = {name: getattr(self, name) for name in positive}
        faults = [
            f"{name} must be positive, got {value}" for name, value in values.items() if not 0 < value < math.inf
        ]
        if not 0 <= self.seed < 2**32:
            faults.append(f"seed must be in [0, 2**32), got {self.seed}")
        if self.steps is not None and self.steps < 1:
            faults.append(f"steps must be positive or None, got {self.steps}")
        if self.row_length < 2:
            faults.append(f"row_length must be at least 2, got {self.row_length}")
        if self.mean_loops <= 1:
            faults.append(f"mean_loops must be above 1, got {self.mean_loops}")
        if not self.depths or min(self.depths) < 1:
            faults.append(f"depths must be positive loop counts, got {self.depths}")
        if faults:
            raise InvalidConfigError("; ".join(faults))


@dataclass(frozen=True)
class TrainingResult:
    """What the training loop did."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    """Mean over the last 50 steps, at the loop counts that were drawn."""
    loop_histogram: dict[int, int]
    """Loop count -> steps that ran it."""
    num_threads: int


def build_model(tokenizer: PreTrainedTokenizerFast, settings: QuickstartSettings) -> CognexisForCausalLM:
    """cognexis-tiny for this tokenizer, with weights from the seed.

    The larger initial weights and the scaled embedding (by the square root of the width) are worth several
    hundred training steps here.
    """
    config = CognexisConfig.from_variant(
        "cognexis-tiny",
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        embedding_scale=math.sqrt(128),
    )
    torch.manual_seed(settings.seed)
    return CognexisForCausalLM(config)


def loop_counts(settings: QuickstartSettings, cap: int) -> CurriculumSettings:
    """The curriculum of the job: the distribution of the module docstring from the first step on."""
    return CurriculumSettings(
        target_max_loops=cap,
        initial_max_loops=cap,
        sampling_distribution="lognormal_poisson",
        mean=settings.mean_loops,
        sigma=settings.sigma_loops,
    )


class _Rows(Dataset[Tensor]):
    """Rows ``[R, T]`` of token ids, one by one."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def _batch(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def row_loader(rows: Tensor, batch_size: int, seed: int) -> TrainingLoader:
    """Batches without end; each epoch takes all rows in an order of its own.

    Raises:
        InvalidConfigError: there are fewer rows than a batch needs.
    """
    if len(rows) < batch_size:
        raise InvalidConfigError(f"the corpus yields {len(rows)} rows and a batch needs {batch_size}")
    order = RowOrder(len(rows), seed=seed)
    return TrainingLoader(_Rows(rows), order, _batch, batch_size=batch_size, prefetch_batches=0)


def learning_rate_share(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` is in [0, 1]."""
    warmup = min(1.0, (progress + 0.001) / warmup_share)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: CognexisForCausalLM, rows: Tensor, settings: QuickstartSettings, seconds: float) -> TrainingResult:
    """Train for ``seconds``, or for ``settings.steps`` steps; one step at least. Progress is shown on stderr."""
    start = time.perf_counter()
    num_threads = _choose_threads(model, rows[: settings.rows_per_step])
    clock = _Clock(start, seconds, settings)
    optimizer = _optimizer(model, settings)
    arguments = TrainingArguments(
        str(settings.output_dir),
        max_steps=settings.steps or _MOST_STEPS,
        per_device_train_batch_size=settings.rows_per_step,
        max_grad_norm=settings.gradient_clip_norm,
        seed=settings.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = _ClockedTrainer(
        model=model,
        args=arguments,
        train_loader=row_loader(rows, settings.rows_per_step, settings.seed),
        optimizers=(optimizer, LambdaLR(optimizer, clock.learning_rate_share)),
        callbacks=[clock],
        curriculum=loop_counts(settings, model.config.trained_max_loops),
        options=TrainerOptions(observe_every=0),
    )
    show_progress(trainer, False)
    trainer.clock = clock
    trainer.train()
    if trainer.stop_signal is not None:
        raise SystemExit(128 + trainer.stop_signal)
    return TrainingResult(
        steps=len(clock.losses),
        tokens=len(clock.losses) * settings.rows_per_step * settings.row_length,
        seconds=time.perf_counter() - start,
        loss=_recent_mean(clock.losses),
        loop_histogram=dict(sorted(trainer.curriculum.histogram.items())),
        num_threads=num_threads,
    )


class _Clock(TrainerCallback):
    """Ends the training when its time is over, and sets the learning rate by the share of it that is used up."""

    def __init__(self, start: float, seconds: float, settings: QuickstartSettings) -> None:
        self.start, self.seconds, self.settings = start, seconds, settings
        self.losses: list[float] = []
        self.num_loops = 0
        self.display = _ProgressDisplay(seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def learning_rate_share(self, step: int) -> float:
        """Of the peak, for the next step."""
        progress = step / self.settings.steps if self.settings.steps else self.elapsed / self.seconds
        return learning_rate_share(min(1.0, progress), self.settings.warmup_share)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the clock."""
        elapsed = self.elapsed
        self.display.update(elapsed, step=state.global_step, loss=_recent_mean(self.losses), num_loops=self.num_loops)
        if not self.settings.steps and elapsed >= self.seconds:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the display."""
        self.display.close()


class _ClockedTrainer(CognexisTrainer):
    """Tells the clock the loss and the loops of every step; a signal ends it without a checkpoint."""

    clock: _Clock

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.clock.losses.append(float(loss))
        self.clock.num_loops = self.step_sample.sampled_loops
        return loss

    def _save_checkpoint(self, *_: Any) -> None:
        """The job saves its result itself."""


def _optimizer(model: nn.Module, settings: QuickstartSettings) -> torch.optim.AdamW:
    """AdamW; the learning rates of its groups are those at the end of the warm-up."""
    embeddings: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = scales if parameter.ndim < 2 else embeddings if "embed_tokens" in name else matrices
        group.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": embeddings, "lr": settings.embedding_learning_rate, "weight_decay": decay},
        {"params": scales, "lr": rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def _choose_threads(model: CognexisForCausalLM, batch: Tensor) -> int:
    """Set and return the number of threads that is fastest right now.

    More is not always faster: a small model cannot feed many cores, and where another program shares the cores
    its threads wait for each other.
    """
    most = torch.get_num_threads()
    seconds: dict[int, float] = {}
    for num_threads in sorted({1, most, *(2**power for power in range(1, 5) if 2**power < most)}):
        torch.set_num_threads(num_threads)
        for call in range(4):
            if call == 1:  # the first one warms up
                start = time.perf_counter()
            model(input_ids=batch, labels=batch, num_loops=2, use_cache=False).loss.backward()
        seconds[num_threads] = time.perf_counter() - start
    model.zero_grad()
    fastest = min(seconds, key=seconds.__getitem__)
    torch.set_num_threads(fastest)
    return fastest


class _ProgressDisplay:
    """A bar on a terminal; elsewhere a line every 15 seconds, so that a log stays readable."""

    def __init__(self, total_seconds: float) -> None:
        self.total_seconds = total_seconds
        self.next_line = 0.0
        layout = "training {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_seconds, bar_format=layout, disable=not is_terminal)

    def update(self, elapsed: float, *, step: int, loss: float, num_loops: int) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(f"step {step}, loss {loss:.3f}, {num_loops} loops", refresh=False)
            self.bar.update(min(elapsed, self.total_seconds) - self.bar.n)
        elif elapsed >= self.next_line:
            self.next_line = elapsed + 15
            position = f"{elapsed:4.0f}/{self.total_seconds:.0f} s"
            print(f"training {position}, step {step}, loss {loss:.3f}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def _recent_mean(losses: list[float]) -> float:
    recent = losses[-50:]
    return sum(recent) / len(recent)
