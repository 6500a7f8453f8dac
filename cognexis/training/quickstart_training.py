"""The training part of the quickstart: its settings, the model, the loop counts, the loop over steps.

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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from cognexis.configuration_cognexis import CognexisConfig
from cognexis.errors import InvalidConfigError
from cognexis.modeling_cognexis import CognexisForCausalLM


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


def draw_loops(seed: int, step: int, *, mean: float, sigma: float, cap: int) -> int:
    """The loop count of an optimizer step, a function of the arguments and of nothing else."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    rate = math.exp(generator.normal(math.log(mean - 1) - sigma**2 / 2, sigma))
    return min(cap, 1 + int(generator.poisson(rate)))


def row_batches(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end; each epoch takes all rows in an order of its own, except a last partial batch."""
    if len(rows) < batch_size:
        raise InvalidConfigError(f"the corpus yields {len(rows)} rows and a batch needs {batch_size}")
    for epoch in count():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]]


def learning_rate_share(progress: float, warmup_share: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` is in [0, 1]."""
    warmup = min(1.0, (progress + 0.001) / warmup_share)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


def train(model: CognexisForCausalLM, rows: Tensor, settings: QuickstartSettings, seconds: float) -> TrainingResult:
    """Train for ``seconds``, or for ``settings.steps`` steps; one step at least. Progress is shown on stderr."""
    start = time.perf_counter()
    num_threads = _choose_threads(model, rows[: settings.rows_per_step])
    optimizer = _optimizer(model, settings)
    batches = row_batches(rows, settings.rows_per_step, settings.seed)
    histogram: Counter[int] = Counter()
    losses: list[float] = []
    display = _ProgressDisplay(seconds)
    model.train()
    for step in count():
        elapsed = time.perf_counter() - start
        progress = step / settings.steps if settings.steps else min(1.0, elapsed / seconds)
        if progress >= 1 and losses:
            break
        num_loops = draw_loops(
            settings.seed,
            step,
            mean=settings.mean_loops,
            sigma=settings.sigma_loops,
            cap=model.config.trained_max_loops,
        )
        share = learning_rate_share(progress, settings.warmup_share)
        losses.append(_train_step(model, optimizer, next(batches), num_loops, share, settings.gradient_clip_norm))
        histogram[num_loops] += 1
        display.update(elapsed, step=step, loss=_recent_mean(losses), num_loops=num_loops)
    display.close()
    return TrainingResult(
        steps=len(losses),
        tokens=len(losses) * settings.rows_per_step * settings.row_length,
        seconds=time.perf_counter() - start,
        loss=_recent_mean(losses),
        loop_histogram=dict(sorted(histogram.items())),
        num_threads=num_threads,
    )


def _optimizer(model: nn.Module, settings: QuickstartSettings) -> torch.optim.AdamW:
    """AdamW; ``peak`` of a group is its learning rate at the end of the warm-up."""
    embeddings: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = scales if parameter.ndim < 2 else embeddings if "embed_tokens" in name else matrices
        group.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": matrices, "peak": rate, "weight_decay": decay},
        {"params": embeddings, "peak": settings.embedding_learning_rate, "weight_decay": decay},
        {"params": scales, "peak": rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def _train_step(
    model: CognexisForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    num_loops: int,
    rate_share: float,
    clip_norm: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate_share
    loss = model(input_ids=batch, labels=batch, num_loops=num_loops, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


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
