"""The ``training`` section: data, optimisation, batch, precision, loop curriculum, checkpoints, losses.

Defaults that depend on other settings are null here and filled in by ``resolve``.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from cognexis.artifacts.run_config.section import (
    DTYPE_ALIASES,
    Count,
    CountOrZero,
    Loops,
    NotNegative,
    Positive,
    Section,
    Share,
    Text,
    as_listed,
    spelled,
)

_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def _checked_loss_scale(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("dynamic", "none"):
            raise ValueError("must be dynamic, none or a positive number")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
        raise ValueError("must be dynamic, none or a positive number")
    return value


def _checked_recomputation(value: str) -> str:
    if not re.fullmatch(r"none|every_block|every_[1-9][0-9]{0,4}_loops", value):
        raise ValueError("must be none, every_block or every_<k>_loops with k of 1 or more")
    return value


def _checked_milestones(value: dict[str, Any]) -> dict[str, Any]:
    for step, loops in value.items():
        if not re.fullmatch(r"[0-9]{1,18}", step):
            raise ValueError(f"{step!r} is no optimizer step")
        if isinstance(loops, bool) or not isinstance(loops, int) or not 1 <= loops <= 65_536:
            raise ValueError(f"step {step} maps to {loops!r}, which is no loop count between 1 and 65536")
    return value


class DataSettings(Section):
    """Where the documents come from and how they become blocks."""

    train_manifest: Text | None = None
    """manifest of the training shards"""
    validation_manifest: Text | None = None
    """manifest of the validation shards"""
    sequence_length: Annotated[int, Field(ge=2, le=2**31 - 1)] = 2048
    """predicted tokens of a block; a packed block holds one token more"""
    packing: bool = True
    """join documents into full blocks"""
    document_boundary_attention: bool | None = None
    """documents of a block do not see each other; null: as `model.document_boundary_attention`"""
    position_reset: Literal["auto", "reset", "continue"] = "auto"
    """positions at a document start; auto: restart when documents do not see each other"""
    num_workers: CountOrZero = 2
    """loader processes"""
    prefetch_batches: Count = 8
    """batches that wait in the queue of a worker"""
    shuffle_buffer: CountOrZero | None = None
    """rows of a shuffle window; null: the whole index"""
    corruption_policy: Literal["fail", "skip", "quarantine"] = "skip"
    """what a broken record does"""


class OptimizationSettings(Section):
    """The optimizer and its learning rate."""

    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """update rule"""
    learning_rate: Positive = 2e-4
    """peak learning rate"""
    min_learning_rate: NotNegative = 2e-5
    """learning rate at the end of the schedule"""
    weight_decay: NotNegative = 0.1
    """decoupled weight decay"""
    beta1: _Beta = 0.9
    """decay of the first moment"""
    beta2: _Beta = 0.95
    """decay of the second moment"""
    epsilon: Positive = 1e-8
    """added to the root of the second moment"""
    gradient_clip_norm: Positive | None = 1.0
    """global gradient norm is cut to this; null: not cut"""
    warmup_steps: CountOrZero = 2000
    """optimizer steps of rising learning rate"""
    total_steps: Count = 500_000
    """optimizer steps of the run"""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """course of the learning rate after the warm-up"""


class BatchSettings(Section):
    """How many tokens one optimizer step sees."""

    global_batch_tokens: Count | None = None
    """tokens per optimizer step over all processes; null: the product of the following with the sequence length"""
    micro_batch_size: Count = 2
    """rows per process and forward pass"""
    gradient_accumulation_steps: Count = 16
    """forward passes per optimizer step"""


class PrecisionSettings(Section):
    """Number formats."""

    compute_dtype: Annotated[Literal["bf16", "fp16", "fp32"], spelled(DTYPE_ALIASES)] = "bf16"
    """format of activations and matrix products"""
    optimizer_state_dtype: Annotated[Literal["fp32", "bf16"], spelled(DTYPE_ALIASES)] = "fp32"
    """format of moments and master weights"""
    loss_scale: Annotated[Any, AfterValidator(_checked_loss_scale)] = "dynamic"
    """dynamic, none or a positive number; used with fp16 only"""


class LoopCurriculumSettings(Section):
    """Which loop counts a training step may draw."""

    mode: Literal["fixed", "ramp_then_sample"] = "ramp_then_sample"
    """fixed: always the target; otherwise the maximum grows and counts are drawn below it"""
    warmup_steps: CountOrZero = 10_000
    """optimizer steps at the initial maximum"""
    ramp_steps: CountOrZero = 50_000
    """optimizer steps from the initial to the target maximum; 0: at once"""
    ramp: Literal["linear", "cosine", "exponential", "milestone"] = "linear"
    """course of the maximum"""
    exponential_base: Annotated[float, Field(gt=1.0)] = 64.0
    """B of the exponential ramp (B^p - 1) / (B - 1)"""
    milestones: Annotated[dict[str, Any], AfterValidator(_checked_milestones)] = Field(default_factory=dict)
    """optimizer step -> maximum, for the milestone ramp"""
    min_loops: Loops | None = None
    """smallest count drawn; null: `model.min_loops`"""
    initial_max_loops: Loops | None = None
    """maximum during the warm-up; null: 2, or what the bounds allow"""
    target_max_loops: Loops | None = None
    """maximum after the ramp; null: `model.trained_max_loops`"""
    sampling_distribution: Annotated[
        Literal["fixed", "uniform", "geometric", "truncated_normal", "stratified", "lognormal_poisson"],
        spelled({"truncated_geometric": "geometric"}),
    ] = "geometric"
    """how counts are drawn between the minimum and the current maximum"""
    continue_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """of the geometric distribution"""
    mean: Positive | None = None
    """of truncated_normal and lognormal_poisson; null: moves with the current maximum"""
    std: Positive = 1.0
    """of truncated_normal"""
    sigma: Positive = 0.5
    """of lognormal_poisson"""
    cap: Loops | None = None
    """largest count of lognormal_poisson; null: the current maximum"""
    window: Count = 100
    """draws in which stratified meets every depth its share of times"""
    high_depth_fraction: Share = 0.05
    """share of draws between the current maximum and the target"""
    loop_grad_normalization: Literal["none", "by_loops"] = "none"
    """by_loops: the core's gradient is divided by the executed loops"""


class CheckpointSettings(Section):
    """When checkpoints are written and which are kept."""

    save_every_steps: Count = 1000
    """optimizer steps between checkpoints"""
    keep_last: CountOrZero = 5
    """newest checkpoints that stay; 0: all"""
    keep_best: CountOrZero = 3
    """best checkpoints by validation loss that stay besides"""
    output_dir: Text | None = None
    """folder of the checkpoints; null: `runs/<run.name>`"""


class RecomputationSettings(Section):
    """Activations that the backward pass computes again, by stage: none, every_block or every_<k>_loops."""

    prelude: Annotated[str, AfterValidator(_checked_recomputation)] = "none"
    """of the prelude"""
    recurrent: Annotated[str, AfterValidator(_checked_recomputation)] = "none"
    """of the core; every_<k>_loops keeps the state of every k-th loop"""
    coda: Annotated[str, AfterValidator(_checked_recomputation)] = "none"
    """of the coda"""


class MultiDepthSettings(Section):
    """Losses at several depths, weighted."""

    depths: Annotated[tuple[Loops, ...], as_listed] = ()
    """loop counts whose states get a loss; empty: the last one only"""
    weights: Annotated[tuple[NotNegative, ...], as_listed] = ()
    """one weight per depth, not all 0"""


class LossSettings(Section):
    """Terms of the training loss besides the next-token loss."""

    multi_depth: MultiDepthSettings = MultiDepthSettings()
    lambda_value: NotNegative = 0.0
    """weight of the value head's regression loss"""
    lambda_continue: NotNegative = 0.0
    """weight of the value head's continue loss"""


class TrainingSection(Section):
    """Everything that only a training run needs."""

    data: DataSettings = DataSettings()
    optimization: OptimizationSettings = OptimizationSettings()
    batch: BatchSettings = BatchSettings()
    precision: PrecisionSettings = PrecisionSettings()
    loop_curriculum: LoopCurriculumSettings = LoopCurriculumSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    activation_checkpointing: RecomputationSettings = RecomputationSettings()
    losses: LossSettings = LossSettings()
