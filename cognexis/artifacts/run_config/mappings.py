"""What other libraries need to know of a run configuration, as plain keyword dictionaries."""

from typing import Any

from cognexis.artifacts.run_config.resolving import resolve
from cognexis.artifacts.run_config.run_config import RunConfig
from cognexis.errors import InvalidConfigError

_OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
_SCHEDULERS = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments_of(config: RunConfig) -> dict[str, Any]:
    """Keywords for ``transformers.TrainingArguments``; the loop curriculum is the trainer's own matter.

    Raises:
        InvalidConfigError: there is no training section.
    """
    if config.training is None:
        raise InvalidConfigError("training: the section is missing", path="training")
    config = resolve(config)
    training: Any = config.training
    rule, batch, data, checkpoint = training.optimization, training.batch, training.data, training.checkpoint
    cosine = rule.scheduler == "cosine"
    return {
        "output_dir": checkpoint.output_dir,
        "run_name": config.run.name,
        "seed": config.run.seed,
        "data_seed": config.run.seed,
        "max_steps": rule.total_steps,
        "optim": _OPTIMIZERS[rule.optimizer],
        "learning_rate": rule.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[rule.scheduler],
        "lr_scheduler_kwargs": {"min_lr": rule.min_learning_rate} if cosine else {},
        "warmup_steps": rule.warmup_steps,
        "weight_decay": rule.weight_decay,
        "adam_beta1": rule.beta1,
        "adam_beta2": rule.beta2,
        "adam_epsilon": rule.epsilon,
        "max_grad_norm": rule.gradient_clip_norm or 0.0,
        "per_device_train_batch_size": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "bf16": training.precision.compute_dtype == "bf16",
        "fp16": training.precision.compute_dtype == "fp16",
        "save_strategy": "steps",
        "save_steps": checkpoint.save_every_steps,
        "save_total_limit": checkpoint.keep_last or None,
        "dataloader_num_workers": data.num_workers,
        "dataloader_prefetch_factor": data.prefetch_batches if data.num_workers else None,
        "remove_unused_columns": False,
    }


def loop_keywords_of(config: RunConfig) -> dict[str, Any]:
    """The loop keywords of ``generate()`` that the inference section asks for.

    Scheduler, tier and dependency belong to the adaptive modes; in fixed mode they stay in the section.
    """
    inference = resolve(config).inference
    is_adaptive = inference.loop_mode != "fixed"
    of_mode = ("quality_tier", "halt_dependency") if is_adaptive else ("num_loops",)
    keywords = {name: getattr(inference, name) for name in ("loop_mode", "min_loops", "max_loops", *of_mode)}
    keywords |= inference.compute_budget.model_dump()
    keywords = {name: value for name, value in keywords.items() if value is not None}
    if is_adaptive:
        keywords["scheduler"] = inference.scheduler.spec()
    if inference.cache_policy != "depth_indexed":
        keywords["cache_policy"] = inference.cache_policy
    return keywords | ({"allow_extrapolation": True} if inference.research_override else {})
