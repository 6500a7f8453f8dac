"""A transformers ``Trainer`` that knows about loops.

Once per optimizer step it draws a loop count from (seed, step), the same on every process and for every micro-batch,
and passes it to the model as ``num_loops``. Around that:

    loss      = next-token loss [or the weighted losses of several depths]
                + lambda_value L_value + lambda_continue L_continue + w_c L_consistency + w_b L_balance
    gradient    of the core divided by the loops (by_loops), each parameter's and the global norm cut
    a step with NaN or infinity in state, loss or gradient on any process is skipped on all of them and counted

What is measured reaches every tracker, since it joins the line of ``Trainer.log``. Floating-point operations count
loops. A model trained with the stock ``Trainer`` works too: it then runs ``config.default_loops`` at every step.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.decoder.stability import residual_scale_report
from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.training.callbacks.gradients import (
    clip_each,
    divide_core_gradients,
    require_core_gradients,
    stage_norms,
)
from cognexis.training.callbacks.loop_statistics import loops_observed
from cognexis.training.callbacks.metrics import MetricBuffer
from cognexis.training.callbacks.spectral import SpectralMonitor
from cognexis.training.checkpointing.resumable_trainer import ResumableTrainer
from cognexis.training.curriculum import CurriculumSettings, LoopCurriculum, LoopSample
from cognexis.training.data.loop_metadata import METADATA_KEY
from cognexis.training.flops import forward_flops, step_flops
from cognexis.training.losses.auxiliary import listed_depth
from cognexis.training.losses.depth_losses import losses_by_depth
from cognexis.training.losses.objective import Objective
from cognexis.training.options import TrainerOptions


class _SkippedBatch(Exception):
    """A micro-batch gave NaN or infinity; its gradient is not computed."""


@contextmanager
def _exceptions_held_back(language_model: Any, wanted: bool) -> Iterator[None]:
    """Let a forward pass end although its state or loss is not finite.

    With several processes all of them must reach the same collectives. NaN then travels through the synchronised
    gradient, whose norm tells every process alike that the step is to be skipped. The two outer modules raise in
    training only, and nothing else in them looks at that flag.
    """
    outer = [language_model, language_model.model] if wanted else []
    before = [module.training for module in outer]
    for module in outer:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in zip(outer, before, strict=True):
            module.training = was_training


class CognexisTrainer(ResumableTrainer):
    """Trains a Cognexis causal language model.

    Args:
        curriculum: which loop counts are drawn; None draws between ``min_loops`` and ``trained_max_loops`` of the
            model from the first step on.
        options: losses, gradients, monitors, evaluation.
        kwargs: of ``ResumableTrainer``, and so of ``transformers.Trainer``.

    Attributes:
        metrics: what is added here joins the next log line.
        skipped_steps: optimizer steps that were not taken because of NaN or infinity.
    """

    objective: Objective

    def __init__(
        self,
        *args: Any,
        curriculum: CurriculumSettings | None = None,
        options: TrainerOptions | None = None,
        **kwargs: Any,
    ) -> None:
        given = kwargs.get("model", args[0] if args else None)
        uses_cache = getattr(getattr(given, "config", None), "use_cache", True)
        super().__init__(*args, **kwargs)
        self.options = options or TrainerOptions()
        config = self.language_model.config
        config.use_cache = uses_cache  # transformers would save a model that generates without a cache
        settings = curriculum or CurriculumSettings(
            target_max_loops=config.trained_max_loops,
            initial_max_loops=config.trained_max_loops,
            min_loops=config.min_loops,
            architecture_max_loops=config.trained_max_loops,
        )
        self._check_depths(settings)
        self.curriculum = LoopCurriculum(settings, self.args.seed, retain_intermediate=bool(self.options.multi_depth))
        self.objective = Objective(self.options, self.args.seed)
        self.metrics = MetricBuffer()
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._logged_histogram: Counter[int] = Counter()
        self._step_is_bad = False
        self._gradients_checked = False
        self._sample: tuple[int, LoopSample] | None = None
        if self.options.spectral_every:
            every, target = self.options.spectral_every, self.options.spectral_target
            self.add_callback(SpectralMonitor(self.metrics, every, target))
        head = self.language_model.model.value_head
        if head is not None and not self.objective.reads_value_head and self.args.world_size > 1:
            head.requires_grad_(False)  # a parameter without gradient would stop the synchronisation of all

    @property
    def language_model(self) -> Any:
        """The model without what parallelism, compilation and PEFT put around it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _check_depths(self, settings: CurriculumSettings) -> None:
        most = self.language_model.config.trained_max_loops
        allowed = self.language_model.config.max_loops
        wanted = {"curriculum.target_max_loops": (settings.target_max_loops, most)}
        wanted |= {"multi_depth": (max(self.options.multi_depth, default=1), most)}
        wanted |= {"eval_depths": (max(self.options.eval_depths, default=1), allowed)}
        wanted |= {"eval_loops": (self.options.eval_loops or 1, allowed)}
        for name, (loops, limit) in wanted.items():
            if loops > limit:
                raise InvalidConfigError(f"{name}={loops}: the model allows at most {limit}", path=name, value=loops)

    # ---- loop counts

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The micro-batches of one optimizer step; its loop count is drawn here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._draw(self._common_tag(batches))
        return batches, num_items

    def _draw(self, tag: str | None) -> LoopSample:
        step = self.state.global_step
        sample = self.curriculum.sample(step, tag)
        if self.options.multi_depth:
            depth = listed_depth(sample.sampled_loops, self.options.multi_depth)
            least, most = min(sample.min_loops, depth), max(sample.max_loops, depth)
            sample = LoopSample(least, most, depth, retain_intermediate=True)
        self._sample = (step, sample)
        return sample

    @property
    def step_sample(self) -> LoopSample:
        """What the current optimizer step runs."""
        if self._sample is None or self._sample[0] != self.state.global_step:
            return self._draw(None)
        return self._sample[1]

    @property
    def _columns_of_trainer(self) -> tuple[str, ...]:
        """Columns that the model does not see."""
        return (self.options.task_column, METADATA_KEY)

    def _common_tag(self, batches: list[Any]) -> str | None:
        """The tag of all rows of the step on all processes; None where they differ or have none."""
        profiles = self.curriculum.settings.task_profiles
        if not profiles:
            return None
        tags: set[str | None] = set()
        for batch in batches:
            given = batch.get(self.options.task_column)
            tags |= set(given) if isinstance(given, (list, tuple)) else {given}
        if dist.is_available() and dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, tags)
            tags = set().union(*gathered)
        return next(iter(tags)) if len(tags) == 1 else None

    # ---- loss and gradient

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch; in evaluation that of ``eval_loops``."""
        inputs = {
            name: value for name, value in inputs.items() if name not in (self.options.task_column, METADATA_KEY)
        }
        if not model.training:
            if self.options.eval_loops is not None:
                inputs.setdefault("num_loops", self.options.eval_loops)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["num_loops"] = self.step_sample.sampled_loops
        loss, outputs = None, None
        try:
            with self._observation(inputs), _exceptions_held_back(self.language_model, self.args.world_size > 1):
                loss, outputs = self._training_loss(model, inputs, num_items_in_batch)
        except NonFiniteError as error:
            self.metrics.alert("nonfinite", str(error))
        if self.args.world_size == 1 and (loss is None or not bool(torch.isfinite(loss))):
            raise _SkippedBatch
        return (loss, outputs) if return_outputs else loss

    def _training_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        step = self.state.global_step
        base: Any = super().compute_loss
        if not self.objective.needs_run:
            return base(model, inputs, True, num_items)
        scale = 1.0
        if self.args.average_tokens_across_devices and num_items is not None and self.args.world_size > 1:
            scale = self.accelerator.num_processes / self.get_tp_size()
        shares = self.current_gradient_accumulation_steps if num_items is not None else 1
        loss, outputs, terms = self.objective(
            self.language_model, model, inputs, step=step, num_items=num_items, scale=scale, shares=shares, base=base
        )
        self.metrics.add_all("loss", terms)
        return loss, outputs

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of a micro-batch; at the last one of a step, its gradients are put in order."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except _SkippedBatch:
            self._step_is_bad = True
            loss = torch.tensor(float("nan"), device=self.args.device)
        if self.accelerator.sync_gradients:
            self._finish_gradients(model)
        return loss

    def _finish_gradients(self, model: nn.Module) -> None:
        self.curriculum.record(self.state.global_step, self.step_sample.sampled_loops)
        core = self.language_model.model.recurrent
        if self._step_is_bad:
            self._drop_gradients(model)
            return
        if not self._gradients_checked:
            require_core_gradients(core)
            self._gradients_checked = True
        if self.options.loop_grad_normalization == "by_loops":
            divide_core_gradients(core, self.step_sample.sampled_loops)
        if self._is_logged_step:
            self.metrics.add_all("grad_norm", stage_norms(self.language_model))
        if self.options.clip_each_norm is not None:
            clip_each(model.parameters(), self.options.clip_each_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The global norm; where it is not finite, the step is made to change nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler_decides = self._has_scaler
        is_finite = bool(torch.isfinite(torch.as_tensor(norm)))
        if not is_finite and not scaler_decides and not self._step_is_bad:
            self.metrics.alert("nonfinite", f"gradient norm {float(norm)} at step {self.state.global_step}")
            self._step_is_bad = True
            self._drop_gradients(model)
        self._count_skip(self._step_is_bad)
        self._step_is_bad = False
        return norm

    @property
    def _has_scaler(self) -> bool:
        scaler = getattr(self.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled()

    def _drop_gradients(self, model: nn.Module) -> None:
        """Leave nothing to step with; under a gradient scaler, what makes it refuse the step."""
        if not self._has_scaler:
            model.zero_grad(set_to_none=True)
            return
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, float("inf"))

    def _count_skip(self, is_skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        if not is_skipped:
            return
        self.skipped_steps += 1
        self.metrics.count("skipped_steps")
        loops = self.step_sample.sampled_loops
        if self.curriculum.settings.lower_on_nonfinite and self.curriculum.lower_below(loops):
            self.metrics.alert("loops_lowered", f"no more than {self.curriculum.ceiling} loops from here on")
        if self._skipped_in_a_row >= self.options.max_skipped_steps:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} steps in a row gave NaN or infinity (last at step "
                f"{self.state.global_step} with {loops} loops); the newest checkpoint is {self.newest_checkpoint()}"
            )

    # ---- what is measured

    @property
    def _is_logged_step(self) -> bool:
        step, args = self.state.global_step + 1, self.args
        is_first = args.logging_first_step and step == 1
        return is_first or (args.logging_strategy == "steps" and step % max(1, self.state.logging_steps) == 0)

    @contextmanager
    def _observation(self, inputs: dict[str, Any]) -> Iterator[None]:
        every = self.options.observe_every
        wanted = self._is_logged_step if every is None else bool(every) and self.state.global_step % every == 0
        if not wanted or (every is None and self.args.torch_compile):  # hooks would compile the model anew
            yield
            return
        mask = inputs.get("attention_mask")
        is_real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        with loops_observed(self.language_model, self.metrics.add, is_real, self.observe_loop):
            yield

    def observe_loop(self, loop_index: int, hidden: Tensor, delta: Tensor) -> None:
        """For subclasses: called after each loop (from 1) of an observed step, with state and change ``[B, T, H]``."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; the lines of training carry what was measured since the last one."""
        if "loss" in logs:
            logs = {**logs, **self._loop_metrics(), **self.metrics.drain()}
        super().log(logs, start_time)

    def _loop_metrics(self) -> dict[str, float]:
        step = max(0, self.state.global_step - 1)
        counts = self.curriculum.histogram - self._logged_histogram
        self._logged_histogram = self.curriculum.histogram.copy()
        found = {f"loops/steps_{n}": float(counts[n]) for n in sorted(counts)}
        if total := sum(counts.values()):
            found["loops/mean"] = sum(n * count for n, count in counts.items()) / total
        found["loops/current_max"] = float(self.curriculum.current_max(step))
        if hasattr(self._loader, "metrics"):
            found |= self._loader.metrics.as_dict()
        if self.language_model.config.recurrent_residual_mode.startswith("learned"):
            report = residual_scale_report(self.language_model.model.recurrent, self.options.residual_scale_limit)
            found |= {f"residual_scale/{name}": high for name, (_, high) in report.items()}
        return found

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a micro-batch with the loops that it runs; see ``flops``."""
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if ids is None:
            return 0
        rows, length = ids.shape[:2]
        config = self.language_model.config
        if not self.language_model.training:
            loops = self.options.eval_loops or config.default_loops
            return int(forward_flops(config, rows * length, length, loops))
        return int(step_flops(config, rows * length, length, self.step_sample.sampled_loops))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in transformers, and the loss at each of ``eval_depths`` as ``<prefix>_loss_loops_<n>``."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if not self.options.eval_depths or isinstance(chosen, dict):
            return metrics
        losses = losses_by_depth(self, self.get_eval_dataloader(eval_dataset), self.options.eval_depths)
        by_depth = {f"{metric_key_prefix}_loss_loops_{depth}": loss for depth, loss in losses.items()}
        self.log(dict(by_depth))
        return metrics | by_depth

    # ---- what a checkpoint gets

    def training_record(self) -> TrainingRecord:
        """What the checkpoint says of its training."""
        record = self.language_model.training_record
        record.checkpoint_step = self.state.global_step
        record.sampled_loops = dict(sorted(self.curriculum.histogram.items()))
        if self.args.include_num_input_tokens_seen != "no":
            record.training_tokens_seen = int(self.state.num_input_tokens_seen)
        return record

    def settings(self) -> dict[str, Any]:
        """Also the curriculum and the options."""
        return super().settings() | {
            "curriculum": self.curriculum.settings.document(),
            "options": self.options.document(),
        }

    def state_files(self) -> dict[str, Any]:
        """The state of the curriculum."""
        return {"curriculum.json": self.curriculum.state_dict()}

    def extra_state(self) -> dict[str, Any]:
        """Skipped steps, which draws the last log line has counted, and what was measured since."""
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "logged_histogram": {str(n): count for n, count in sorted(self._logged_histogram.items())},
            "metrics": self.metrics.state_dict(),
        }

    def load_extra_state(self, extra: dict[str, Any], files: dict[str, Any]) -> None:
        """Take over what the two methods above gave."""
        state = files["curriculum.json"]
        self.curriculum.load_state_dict(state, allow_other_settings=self.allow_other_settings)
        self._logged_histogram = Counter({int(n): int(count) for n, count in extra["logged_histogram"].items()})
        self.metrics.load_state_dict(extra["metrics"])
        self.skipped_steps = int(extra["skipped_steps"])
        self._skipped_in_a_row = int(extra["skipped_in_a_row"])
