"""The training loss of a micro-batch with all its terms; see ``auxiliary`` for the terms.

    loss = sum_i w_i CE_i + (lambda_value L_value + lambda_continue L_continue + w_c L_consistency + w_b L_balance) / A

CE is a sum over the targets of all A micro-batches and processes divided by their number, or where that is not known
the mean of this micro-batch; the other terms are means of a micro-batch, so they are divided by A here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cognexis.training.curriculum.sampling import early_loop
from cognexis.training.losses.auxiliary import early_consistency, multi_depth_loss, router_balance, value_head_losses
from cognexis.training.losses.linear_cross_entropy import chunked_causal_lm_loss, shifted_targets
from cognexis.training.losses.watched_run import WatchedRun, watched
from cognexis.training.options import TrainerOptions

_LOSS_KEYS = ("labels", "shift_labels", "loss_mask")


class Objective:
    """The loss that ``options`` describe.

    Args:
        seed: of the earlier loop that the consistency term looks at.
    """

    def __init__(self, options: TrainerOptions, seed: int) -> None:
        self.options = options
        self.seed = seed
        self.reads_value_head = options.lambda_value > 0 or options.lambda_continue > 0

    @property
    def needs_run(self) -> bool:
        """Whether more is needed than the loss that the model returns."""
        options = self.options
        is_extra = self.reads_value_head or options.consistency_weight > 0 or options.router_balance_weight > 0
        return is_extra or bool(options.multi_depth) or options.fused_loss

    def __call__(
        self,
        language_model: Any,
        model: Any,
        inputs: dict[str, Any],
        *,
        step: int,
        num_items: Tensor | int | None,
        scale: float,
        shares: int,
        base: Callable[..., Any],
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Run the model and add up the terms.

        Args:
            language_model: the model itself.
            model: the same with what parallelism put around it.
            step: optimizer step, for what is drawn.
            num_items: targets of all micro-batches and processes, or None.
            scale: processes whose gradients are averaged, where ``num_items`` counts all of them.
            shares: A of the module docstring.
            base: ``Trainer.compute_loss``.

        Returns:
            The loss, the model's output, and the terms by name.
        """
        with watched(language_model) as run:
            if self.options.fused_loss or self.options.multi_depth:
                outputs = model(**_without_loss(inputs, self.options.fused_loss))
                loss = self._cross_entropy(run, inputs, num_items) * scale
            else:
                loss, outputs = base(model, inputs, True, num_items)
        extra, terms = self._auxiliary(run, inputs, step)
        return loss + extra / shares, outputs, {"cross_entropy": loss.detach(), **terms}

    def _cross_entropy(self, run: WatchedRun, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        given = {name: inputs.get(name) for name in _LOSS_KEYS}
        model = run.model

        def of_state(normed: Tensor) -> Tensor:
            if self.options.fused_loss:
                return chunked_causal_lm_loss(normed, model.lm_head, num_items_in_batch=num_items, **given)
            loss: Tensor = model.loss_function(
                logits=model.lm_head(normed),
                vocab_size=model.config.vocab_size,
                num_items_in_batch=num_items,
                **given,
            )
            return loss

        if not self.options.multi_depth:
            return of_state(run.final)
        return multi_depth_loss(run, dict(self.options.multi_depth), of_state)

    def _auxiliary(self, run: WatchedRun, inputs: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        total = run.final.new_zeros((), dtype=torch.float32)
        terms: dict[str, Tensor] = {}

        def add(name: str, weight: float, value: Tensor) -> None:
            nonlocal total
            total = total + weight * value
            terms[name] = value.detach()

        is_real = _real_tokens(inputs, run.final)
        if self.reads_value_head:
            shape, vocab_size = run.final.shape[:2], run.model.config.vocab_size
            given = {name: inputs.get(name) for name in _LOSS_KEYS}
            targets, weights = shifted_targets(shape, vocab_size, **given)
            device = run.final.device
            value, further = value_head_losses(
                run,
                targets.to(device),
                (weights > 0).to(device),
                is_real,
                horizon=options.gain_horizon,
                gain_threshold=options.gain_threshold,
            )
            add("value", options.lambda_value, value)
            add("continue", options.lambda_continue, further)
        if options.consistency_weight > 0:
            early = early_loop(self.seed, step, run.num_loops)
            add("consistency", options.consistency_weight, early_consistency(run, early, is_real))
        if options.router_balance_weight > 0:
            add("router_balance", options.router_balance_weight, router_balance(run.model))
        return total, terms


def _without_loss(inputs: dict[str, Any], skip_head: bool) -> dict[str, Any]:
    """The inputs of a forward pass that computes no loss, and with ``skip_head`` next to no logits."""
    kept = {name: value for name, value in inputs.items() if name not in _LOSS_KEYS}
    return kept | {"logits_to_keep": 1} if skip_head else kept


def _real_tokens(inputs: dict[str, Any], like: Tensor) -> Tensor:
    """``[B, T]`` bool, False at padding."""
    mask, documents = inputs.get("attention_mask"), inputs.get("document_ids")
    if isinstance(documents, Tensor):
        return (documents >= 0).to(like.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool().to(like.device)
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
