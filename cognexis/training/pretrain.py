"""A training run as a run configuration describes it.

    cognexis train --config configs/cognexis-tiny.yaml
    accelerate launch -m cognexis.training.pretrain --config configs/train.yaml

Both start :func:`pretrain`: the configuration is checked and its resolved form written into the output folder, then
the model is built, the data are opened, and a ``CognexisTrainer`` runs, from the newest verified checkpoint of that
folder if there is one. Weights are float32 and matrix products run in ``precision.compute_dtype`` under autocast;
with ``optimizer_state_dtype: bf16`` weights and moments are bfloat16. The finished model, in ``model.dtype``, and its
tokenizer lie in ``<output_dir>/model``.

Not read here: ``data.corruption_policy`` (of ``cognexis data build``), ``inference`` and ``safety`` (of the commands
that serve the model).
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from cognexis.artifacts.run_config import load_run_config, resolve, training_arguments_of, write_resolved
from cognexis.artifacts.run_config.run_config import RunConfig
from cognexis.artifacts.shipped_tokenizer import DEFAULT_TOKENIZER, load_default_tokenizer
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.modeling_cognexis import CognexisForCausalLM
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.training.activation_checkpointing import set_activation_checkpointing
from cognexis.training.callbacks.console import show_progress
from cognexis.training.checkpointing.retention import Retention
from cognexis.training.compilation import compile_for_training
from cognexis.training.curriculum import CurriculumSettings
from cognexis.training.data.manifest import read_data_manifest
from cognexis.training.data.opening import TokenData, open_data
from cognexis.training.losses.linear_cross_entropy import CHUNK_ELEMENTS
from cognexis.training.options import TrainerOptions
from cognexis.training.trainer import CognexisTrainer

logger = logging.getLogger("cognexis.training")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_UNUSED_BY_MODEL = ("domains", "loop_metadata")


@dataclass(frozen=True)
class PretrainOrder:
    """What a run configuration does not say.

    Attributes:
        overrides: settings as "path=value".
        resume: "auto", a checkpoint's folder, or None to begin anew.
        allow_other_settings: go on from a checkpoint of other settings.
        report_to: trackers by the names of transformers, such as "tensorboard" and "trackio".
        log_every: optimizer steps between log lines.
        spectral_every: optimizer steps between measurements of singular values; 0: never.
        compile: compile blocks and core with torch.compile; every loop count shares the graphs.
        full_determinism: the same bits on every run of a GPU too, at the price of slower kernels.
        use_cpu: run on the CPU although there is a GPU.
        show_progress: a progress bar and log lines on the terminal.
        on_save_error: "stop" or "continue" when a checkpoint cannot be written.
    """

    overrides: tuple[str, ...] = ()
    resume: str | None = "auto"
    allow_other_settings: bool = False
    report_to: tuple[str, ...] = ()
    log_every: int = 10
    spectral_every: int = 0
    compile: bool = False
    full_determinism: bool = False
    use_cpu: bool = False
    show_progress: bool = True
    on_save_error: str = "stop"

    def __post_init__(self) -> None:
        if type(self.log_every) is not int or self.log_every < 1:
            raise InvalidConfigError(f"log_every={self.log_every!r}: must be at least 1", path="log_every")


@dataclass(frozen=True)
class PretrainResult:
    """What a run did.

    Attributes:
        output_dir: folder of the checkpoints.
        model_dir: folder of the finished model; None when a signal ended the run.
        steps: optimizer steps behind the model.
        loss: mean training loss of this call's steps.
        evaluation: the last evaluation, by metric.
        stop_signal: number of the signal that ended the run.
        loop_histogram: loop count -> steps.
        skipped_steps: steps not taken because of NaN or infinity.
    """

    output_dir: str
    model_dir: str | None
    steps: int
    loss: float
    evaluation: dict[str, float]
    stop_signal: int | None
    loop_histogram: dict[int, int] = field(default_factory=dict)
    skipped_steps: int = 0


def pretrain(source: str | Path | RunConfig, order: PretrainOrder | None = None) -> PretrainResult:
    """Run a training.

    Args:
        source: the run configuration, or its file.

    Raises:
        InvalidConfigError: lists every fault of the configuration.
        ArtifactMismatchError: tokenizer, data and model do not belong together.
        CheckpointError: a checkpoint that was asked for is damaged, or one cannot be written.
    """
    order = order or PretrainOrder()
    config = read_config(source, order)
    trainer = build_trainer(config, order)
    output = trainer.train(order.resume)
    finished = trainer.stop_signal is None
    folder = Path(trainer.args.output_dir)
    evaluation = [line for line in trainer.state.log_history if "eval_loss" in line]
    if finished:
        _save_model(trainer, folder / "model", config)
    return PretrainResult(
        output_dir=str(folder),
        model_dir=str(folder / "model") if finished else None,
        steps=trainer.state.global_step,
        loss=float(output.training_loss),
        evaluation=evaluation[-1] if evaluation else {},
        stop_signal=trainer.stop_signal,
        loop_histogram=dict(sorted(trainer.curriculum.histogram.items())),
        skipped_steps=trainer.skipped_steps,
    )


def read_config(source: str | Path | RunConfig, order: PretrainOrder) -> RunConfig:
    """The resolved configuration of a run, checked for the processes that take part."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not isinstance(source, RunConfig):
        source = load_run_config(source, "train", order.overrides, world_size=world_size, check_files=True)
    return resolve(source, world_size)


def build_trainer(source: str | Path | RunConfig, order: PretrainOrder) -> CognexisTrainer:
    """The trainer of a run, ready to train; the resolved configuration is written by then. See :func:`pretrain`."""
    config = read_config(source, order)
    training: Any = config.training
    arguments = TrainingArguments(**_arguments(config, order))
    if arguments.process_index == 0:
        write_resolved(config, training.checkpoint.output_dir, arguments.world_size)
    set_seed(config.run.seed)
    tokenizer = _tokenizer(config)
    model = _model(config, tokenizer)
    data = _open(config, training.data.train_manifest, "train_manifest", arguments)
    held_out = None
    if training.data.validation_manifest is not None:
        held_out = _open(config, training.data.validation_manifest, "validation_manifest", arguments)
    rule = training.data
    window = rule.shuffle_buffer or None
    collate = _Collate(data, rule.document_boundary_attention)
    loader = data.training_loader(
        seed=config.run.seed,
        batch_size=arguments.per_device_train_batch_size,
        shuffle=rule.shuffle_buffer != 0,
        window=window,
        collate=collate,
        rank=arguments.process_index,
        world_size=arguments.world_size,
        num_workers=rule.num_workers,
        prefetch_batches=rule.prefetch_batches,
    )
    recomputation = training.activation_checkpointing
    stages = {name: getattr(recomputation, name) for name in ("prelude", "recurrent", "coda")}
    if any(value != "none" for value in stages.values()):
        set_activation_checkpointing(model, **stages)
    if order.compile:
        compile_for_training(model)
    checkpoint = training.checkpoint
    trainer = CognexisTrainer(
        model=model,
        args=arguments,
        train_loader=loader,
        eval_dataset=None if held_out is None else held_out.rows,
        data_collator=collate,
        processing_class=tokenizer,
        curriculum=CurriculumSettings.from_section(training.loop_curriculum, model.config.trained_max_loops),
        options=options_of(config, order),
        retention=Retention(checkpoint.keep_last, checkpoint.keep_best),
        on_save_error=order.on_save_error,
        data_checksum=data.checksum,
        allow_other_settings=order.allow_other_settings,
    )
    _set_loss_scale(trainer, training.precision)
    show_progress(trainer, order.show_progress)
    return trainer


def options_of(config: RunConfig, order: PretrainOrder) -> TrainerOptions:
    """The trainer's options of a resolved configuration."""
    training, log = config.training, config.logging
    assert training is not None and config.model is not None
    depths = config.evaluation.loop_counts if config.evaluation is not None else None
    losses = training.losses
    logits = config.model.vocab_size * training.batch.micro_batch_size * training.data.sequence_length
    return TrainerOptions(
        multi_depth=dict(zip(losses.multi_depth.depths, losses.multi_depth.weights, strict=True)),
        lambda_value=losses.lambda_value,
        lambda_continue=losses.lambda_continue,
        loop_grad_normalization=training.loop_curriculum.loop_grad_normalization,
        fused_loss=logits > CHUNK_ELEMENTS,
        observe_every=None if log.log_loop_stats and log.log_hidden_norms == "summary" else 0,
        spectral_every=order.spectral_every,
        eval_depths=tuple(depth for depth in depths or () if depth <= config.model.max_loops),
    )


def _arguments(config: RunConfig, order: PretrainOrder) -> dict[str, Any]:
    """Keywords of ``TrainingArguments``."""
    training: Any = config.training
    found = training_arguments_of(config)
    rule = training.optimization
    if rule.scheduler == "linear":  # that of transformers always ends at 0
        found |= {"lr_scheduler_type": "polynomial"}
        found |= {"lr_scheduler_kwargs": {"lr_end": rule.min_learning_rate, "power": 1.0}}
    if training.precision.optimizer_state_dtype == "bf16":
        found |= {"bf16": False, "fp16": False}  # weights are bfloat16 already
        if training.precision.compute_dtype != "bf16":
            raise InvalidConfigError(
                "training.precision.optimizer_state_dtype='bf16': needs compute_dtype='bf16'",
                path="training.precision.optimizer_state_dtype",
                value="bf16",
            )
    evaluates = training.data.validation_manifest is not None
    found.pop("save_total_limit")
    return found | {
        "logging_steps": order.log_every,
        "logging_first_step": True,
        "report_to": list(order.report_to) or "none",
        "disable_tqdm": not order.show_progress,
        "full_determinism": order.full_determinism,
        "use_cpu": order.use_cpu or not torch.accelerator.is_available(),
        "include_num_input_tokens_seen": "all",
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.checkpoint.save_every_steps if evaluates else None,
        "per_device_eval_batch_size": training.batch.micro_batch_size,
        "prediction_loss_only": True,
        "ddp_find_unused_parameters": False,
        "dataloader_num_workers": 0,  # of the evaluation; the training loader has its own
        "dataloader_prefetch_factor": None,
        "log_level": config.logging.level if order.show_progress else "error",
    }


def _tokenizer(config: RunConfig) -> CognexisTokenizer | None:
    """The tokenizer of the run, checked against the configuration.

    Where none is named, it is that of the package if the data were made with it, and else none.
    """
    rule = config.tokenizer
    path = Path(rule.path) if rule is not None and rule.path is not None else None
    if path is None:
        tokenizer = load_default_tokenizer()
        if tokenizer.checksum != _checksum_of_data(config):
            return None
        path = DEFAULT_TOKENIZER
    else:
        tokenizer = CognexisTokenizer.from_pretrained(path if path.is_dir() else path.parent)
    if rule is not None and rule.checksum is not None and tokenizer.checksum != rule.checksum:
        reason = f"{path} has {tokenizer.checksum}"
        raise ArtifactMismatchError(
            f"tokenizer.checksum={rule.checksum!r}: {reason}", path="tokenizer.checksum", value=rule.checksum
        )
    assert config.model is not None
    if len(tokenizer) > config.model.vocab_size:
        raise ArtifactMismatchError(
            f"model.vocab_size={config.model.vocab_size}: {path} has {len(tokenizer)} ids",
            path="model.vocab_size",
            value=config.model.vocab_size,
        )
    return tokenizer


def _checksum_of_data(config: RunConfig) -> str | None:
    """Checksum of the tokenizer that made the training data."""
    assert config.training is not None
    manifest = config.training.data.train_manifest
    if manifest is None:
        return None
    return (read_data_manifest(manifest).tokenizer or {}).get("checksum")


def _model(config: RunConfig, tokenizer: CognexisTokenizer | None) -> CognexisForCausalLM:
    """A model with weights from the seed."""
    assert config.model is not None and config.training is not None
    settings = config.model.config()
    if tokenizer is not None:
        settings.tokenizer_checksum = tokenizer.checksum
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings, name, getattr(tokenizer, name))
    model: Any = CognexisForCausalLM(settings)
    is_half = config.training.precision.optimizer_state_dtype == "bf16"
    return model.to(torch.bfloat16 if is_half else torch.float32)


def _open(config: RunConfig, manifest: str | None, name: str, arguments: TrainingArguments) -> TokenData:
    assert config.training is not None and config.model is not None
    rule = config.training.data
    if manifest is None:
        raise InvalidConfigError(f"training.data.{name}: is required", path=f"training.data.{name}")
    reset = rule.position_reset
    if reset == "auto":
        reset = "reset" if rule.document_boundary_attention else "continue"
    checksum = config.tokenizer.checksum if config.tokenizer is not None else None
    return open_data(
        manifest,
        sequence_length=rule.sequence_length,
        packed=rule.packing,
        position_reset=reset,
        vocab_size=config.model.vocab_size,
        tokenizer_checksum=checksum,
        verify=arguments.process_index == 0,
    )


class _Collate:
    """Batches of token rows; without document boundaries the model is not told of documents."""

    def __init__(self, data: TokenData, has_boundaries: bool | None) -> None:
        self.inner = data.collator()
        self.dropped = _UNUSED_BY_MODEL if has_boundaries else (*_UNUSED_BY_MODEL, "document_ids")

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        return {name: value for name, value in self.inner(rows).items() if name not in self.dropped}


def _set_loss_scale(trainer: CognexisTrainer, precision: Any) -> None:
    """Replace the dynamic scale of float16 by a fixed one, or by none."""
    if precision.compute_dtype != "fp16" or precision.loss_scale == "dynamic":
        return
    if precision.loss_scale == "none":
        trainer.accelerator.scaler = torch.amp.GradScaler(enabled=False)
        return
    never = 2**31 - 1
    trainer.accelerator.scaler = torch.amp.GradScaler(
        init_scale=float(precision.loss_scale), growth_interval=never, backoff_factor=1 - 1e-12
    )


def _save_model(trainer: CognexisTrainer, folder: Path, config: RunConfig) -> None:
    """The finished model in the format that its configuration names, with its tokenizer."""
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save or trainer.is_fsdp_enabled:
        return
    model = trainer.language_model
    model.training_record = trainer.training_record()
    assert config.model is not None
    model.to(_DTYPES.get(config.model.dtype or "", model.dtype)).save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)


if __name__ == "__main__":
    from cognexis.training.commands import main

    main()
